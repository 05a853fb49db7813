"""Tokenisation and chat templates give the same tokens as `transformers`, and never two BOS."""

import json
import tracemalloc
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from checkpoint.chat_template import ChatError, ChatTemplate, load_chat_template
from gateway.requests.tokenization import PromptTokenizer, TooLongError
from tests.helpers.demo_folders import MODEL_DIR, make_folder

BOS = "<|endoftext|>"
MAX_TOKENS = 1 << 20

# Written for these tests, in the style of the models that people serve.
LLAMA3 = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = 'none' %}
{%- endif %}
{%- if tools is not none %}
    {{- tools | tojson(indent=4) }}
{%- endif %}
{{- '<|start|>system\n' + system + '<|end|>' }}
{%- for message in messages %}
    {{- '<|start|>' + message.role + '\n' + message.content | trim + '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant\n' }}
{%- endif %}
"""
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
BLOCKS = """{% for message in messages %}
    {% if loop.index0 > 2 %}
        {% break %}
    {% endif %}
  {% if message.role == "assistant" %}
{% generation %}{{ message.content }}{% endgeneration %}
  {% else %}
{{ message | tojson }}
  {% endif %}
{% endfor %}
{% set ns = namespace(last='') %}{% for m in messages %}{% set ns.last = m.role %}{% endfor %}{{ ns.last }}
{{ {'a': '<&>', 'b': [1, 2]} | tojson(sort_keys=True, separators=(',', ':')) }}
"""
CONVERSATION = [
    {"role": "user", "content": "  What is <b> & \u00e9?\n"},
    {"role": "assistant", "content": "A tag."},
    {"role": "user", "content": "Thanks \U0001f600"},
]


def encode(folder: Path, text: str, *, add_special_tokens: bool = True) -> list[int]:
    return PromptTokenizer(folder).encode(text, add_special_tokens=add_special_tokens, max_tokens=MAX_TOKENS)


def the_template(folder: Path) -> ChatTemplate:
    template = load_chat_template(folder)
    assert template is not None
    return template


def chat_ids(folder: Path, messages: list[dict[str, str]], *, add_generation_prompt: bool = True) -> list[int]:
    text = the_template(folder).render(messages, add_generation_prompt=add_generation_prompt)
    return encode(folder, text, add_special_tokens=False)


@pytest.mark.parametrize("source", [LLAMA3, MISTRAL, BLOCKS], ids=["llama3", "mistral", "blocks"])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_chats_become_the_same_tokens_as_in_transformers(
    tmp_path: Path, source: str, add_generation_prompt: bool
) -> None:
    folder = make_folder(tmp_path, config={"chat_template": source})
    ours = chat_ids(folder, CONVERSATION, add_generation_prompt=add_generation_prompt)
    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        CONVERSATION, add_generation_prompt=add_generation_prompt, return_dict=False
    )
    assert ours == theirs


@pytest.mark.parametrize("text", ["def f(x):\n    return x\n", "", f"a{BOS}b", " \u00e9\U0001f600\t", "x = 1\n" * 2000])
def test_text_becomes_the_same_tokens_as_in_transformers(text: str) -> None:
    ours = encode(MODEL_DIR, text)
    assert ours == AutoTokenizer.from_pretrained(MODEL_DIR)(text).input_ids


def test_bos_is_never_added_twice(tmp_path: Path) -> None:
    """This tokenizer's post-processor adds BOS to any text, and this template writes BOS itself."""
    folder = make_folder(tmp_path, config={"chat_template": MISTRAL})
    bos_id = 0
    for ids in (encode(folder, "Hi"), chat_ids(folder, [{"role": "user", "content": "Hi"}])):
        assert ids.count(bos_id) == 1
        assert ids[0] == bos_id


@pytest.mark.parametrize("line", ["value = 17\n", " " * 60 + "\n", "\u00e9\U0001f600\n"])
def test_a_text_far_too_long_is_refused_after_reading_its_beginning(line: str) -> None:
    tokenizer = PromptTokenizer(MODEL_DIR)
    text = line * (1 << 17)
    with pytest.raises(TooLongError) as refused:
        tokenizer.encode(text, add_special_tokens=True, max_tokens=100)
    assert 100 < refused.value.num_tokens < len(text.encode()) // 4


def test_a_long_text_of_few_tokens_is_read() -> None:
    """The limit is on tokens, and no limit on characters can stand in for it."""
    tokenizer = PromptTokenizer(MODEL_DIR)
    text = " " * 300_000
    whole = AutoTokenizer.from_pretrained(MODEL_DIR)(text).input_ids
    assert tokenizer.encode(text, add_special_tokens=True, max_tokens=len(whole)) == whole
    assert len(text) > 8 * len(whole), "it is counted in pieces first"


def test_truncation_saved_in_a_folder_is_off(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    stored = json.loads((folder / "tokenizer.json").read_text())
    stored["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    assert len(encode(folder, "a b c d e f g h")) > 4


def render(source: str, **tokens: str) -> str:
    return ChatTemplate(source, special_tokens=tokens).render(CONVERSATION, add_generation_prompt=True)


def test_a_template_may_refuse_the_conversation() -> None:
    template = ChatTemplate(MISTRAL, special_tokens={"bos_token": BOS, "eos_token": BOS})
    with pytest.raises(ChatError, match="roles must alternate user/assistant"):
        template.render(CONVERSATION[1:], add_generation_prompt=True)


@pytest.mark.parametrize("source", ["{{ 1 + 'a' }}", "{{ missing.attribute }}", "{{ 1 / 0 }}"])
def test_a_template_that_fails_is_an_error_of_the_request(source: str) -> None:
    with pytest.raises(ChatError, match="chat template refused"):
        render(source)


@pytest.mark.parametrize(
    "source", ["{{ messages.append(1) }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.clear() }}"]
)
def test_templates_run_in_a_sandbox(source: str) -> None:
    with pytest.raises(ChatError):
        render(source)


def test_endless_recursion_in_a_template_is_an_error_of_the_request() -> None:
    with pytest.raises(ChatError, match="calls itself too often"):
        render("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}")


def test_the_output_of_a_template_is_limited() -> None:
    with pytest.raises(ChatError, match="writes more than 16777216 characters"):
        render("{% for i in range(100000) %}{{ 'x' * 1000 }}{% endfor %}")


def test_a_template_that_does_not_compile_names_its_line() -> None:
    with pytest.raises(ChatError, match="line 2"):
        ChatTemplate("ok\n{% if %}", special_tokens={})


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "is nested too deeply"),
        ("{% if a %}" + "{% elif b %}" * 10_000 + "{% endif %}", "is nested too deeply"),
        ("{{ a }}" * 20_000, "has 140000 characters, and at most 131072 are read"),
        ("{% autoescape 'a' * 10000000 %}{% endautoescape %}", "line 1: autoescape takes true or false"),
    ],
    ids=["parentheses", "branches", "length", "autoescape"],
)
def test_an_oversized_template_is_refused(source: str, words: str) -> None:
    with pytest.raises(ChatError, match=words):
        ChatTemplate(source, special_tokens={})


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10000000 }}",
        "{{ 'b' ~ 'a' * 10000000 }}",
        "{{ ('a' * 10000000)[3] }}",
        "{{ 'a' | center(10000000) }}",
        "{% set a = 'a' * 10000000 %}",
        "{% if ('a' * 10000000) is string %}{% endif %}",
        "{% for a in ['a' * 10000000] %}{% endfor %}",
        "{% macro f(a='a' * 10000000) %}{% endmacro %}",
        "{% filter center(10000000) %}a{% endfilter %}",
    ],
)
def test_a_template_evaluates_nothing_before_it_is_rendered(source: str) -> None:
    """`plan` and the gateway compile it in their own processes, and `{{ 9 ** (9 ** 9) }}` never ends."""
    tracemalloc.start()
    try:
        ChatTemplate(source, special_tokens={})
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 5_000_000


def test_a_template_knows_the_date() -> None:
    assert render("{{ strftime_now('%Y') }}").startswith("20")


def test_templates_are_found_wherever_folders_keep_them(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "named {{ bos_token }}"}]
    bos_object = {"content": "<B>", "special": True}
    folder = make_folder(tmp_path, config={"chat_template": named, "bos_token": bos_object})
    assert the_template(folder).render(CONVERSATION) == "named <B>"
    assert the_template(folder).render(CONVERSATION, variables={"tools": []}) == "tools"
    folder = make_folder(tmp_path, config={"chat_template": named}, jinja="from its file")
    assert the_template(folder).render(CONVERSATION) == "from its file"


def test_a_folder_without_template(tmp_path: Path) -> None:
    assert load_chat_template(make_folder(tmp_path, config={"chat_template": None})) is None


def test_a_folder_without_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.json is missing"):
        PromptTokenizer(tmp_path)

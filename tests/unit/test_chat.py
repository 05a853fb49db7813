"""Tokenisation and chat templates: the same tokens as `transformers`, and never two BOS."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from checkpoint.chat_template import ChatError, ChatTemplate, load_chat_template
from gateway.requests.tokenization import INLINE_CHARS, PromptTokenizer

MODEL_DIR = Path(__file__).parents[2] / "models" / "demo-target"
BOS = "<|endoftext|>"

# Written for these tests in the manner of the models that people serve.
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


def make_folder(path: Path, *, config: dict[str, Any] | None = None, jinja: str | None = None) -> Path:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL_DIR / name, path)
    stored = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({**stored, **(config or {})}))
    if jinja is not None:
        (path / "chat_template.jinja").write_text(jinja)
    return path


@pytest.mark.parametrize("source", [LLAMA3, MISTRAL, BLOCKS], ids=["llama3", "mistral", "blocks"])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
async def test_chats_become_the_tokens_that_transformers_makes(
    tmp_path: Path, source: str, add_generation_prompt: bool
) -> None:
    folder = make_folder(tmp_path, config={"chat_template": source})
    ours = await PromptTokenizer(folder).encode_chat(CONVERSATION, add_generation_prompt=add_generation_prompt)
    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        CONVERSATION, add_generation_prompt=add_generation_prompt, return_dict=False
    )
    assert ours == theirs


@pytest.mark.parametrize("text", ["def f(x):\n    return x\n", "", f"a{BOS}b", " \u00e9\U0001f600\t", "x = 1\n" * 2000])
async def test_text_becomes_the_tokens_that_transformers_makes(text: str) -> None:
    assert (
        await PromptTokenizer(MODEL_DIR).encode_text(text) == AutoTokenizer.from_pretrained(MODEL_DIR)(text).input_ids
    )


async def test_never_two_bos(tmp_path: Path) -> None:
    """This tokenizer's post-processor adds BOS to any text, and this template writes BOS itself."""
    tokenizer = PromptTokenizer(make_folder(tmp_path, config={"chat_template": MISTRAL}))
    bos_id = 0
    text_ids = await tokenizer.encode_text("Hi")
    assert text_ids.count(bos_id) == 1
    assert text_ids[0] == bos_id
    chat_ids = await tokenizer.encode_chat([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    assert chat_ids.count(bos_id) == 1
    assert chat_ids[0] == bos_id


async def test_long_texts_are_tokenised_alike(tmp_path: Path) -> None:
    tokenizer = PromptTokenizer(MODEL_DIR)
    line = "value = 17\n"
    repeats = INLINE_CHARS // len(line) + 1  # the first count that leaves the event loop
    longer, shorter = await tokenizer.encode_text(line * repeats), await tokenizer.encode_text(line * (repeats - 1))
    assert longer[: len(shorter) - 1] == shorter[:-1]


async def test_truncation_that_a_folder_keeps_is_off(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    stored = json.loads((folder / "tokenizer.json").read_text())
    stored["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    tokenizer = PromptTokenizer(folder)
    assert len(await tokenizer.encode_text("a b c d e f g h")) > 4


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


def test_a_template_that_does_not_compile_names_its_line() -> None:
    with pytest.raises(ChatError, match="line 2"):
        ChatTemplate("ok\n{% if %}", special_tokens={})


def test_the_date_of_today() -> None:
    assert render("{{ strftime_now('%Y') }}").startswith("20")


def test_where_templates_come_from(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "named {{ bos_token }}"}]
    bos_object = {"content": "<B>", "special": True}
    folder = make_folder(tmp_path, config={"chat_template": named, "bos_token": bos_object})
    template = load_chat_template(folder)
    assert template is not None
    assert template.render(CONVERSATION, add_generation_prompt=True) == "named <B>"
    template = load_chat_template(make_folder(tmp_path, config={"chat_template": named}, jinja="from its file"))
    assert template is not None
    assert template.render(CONVERSATION, add_generation_prompt=True) == "from its file"


def test_a_folder_without_template(tmp_path: Path) -> None:
    assert load_chat_template(make_folder(tmp_path, config={"chat_template": None})) is None


def test_a_folder_without_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.json is missing"):
        PromptTokenizer(tmp_path)

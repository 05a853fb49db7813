"""Bodies of OpenAI's API: what they ask of a scheduler, and what is refused."""

import contextlib
import json
import random
from pathlib import Path
from typing import Any

import grpc
import pytest

from checkpoint.chat_template import ChatTemplate
from echelon.pb import inference_pb2 as pb
from echelon.pb.process_pb2 import GatewaySpec
from echelon.pb.reading_pb2 import (
    CALL_FORM_DEEPSEEK,
    CALL_FORM_HERMES,
    CALL_FORM_LLAMA_JSON,
    CALL_FORM_MISTRAL,
    CALL_FORM_PYTHONIC,
    CALL_FORM_QWEN_XML,
    REASONING_BEGUN,
    REASONING_POSSIBLE,
    REASONING_UNSPECIFIED,
    Presentation,
    Reading,
)
from echelon.pb.sampling_pb2 import SamplingParams
from gateway.requests.anthropic.messages import MessagesBody
from gateway.requests.conversation import render_chat
from gateway.requests.forms import Form, read_request, read_simple_request
from gateway.requests.openai.bodies import ChatBody, CompletionBody, DetokenizeBody, TokenizeChatBody, parse_body
from gateway.requests.openai.chat import ask_chat, chat_of
from gateway.requests.openai.job_lines import join_item, join_lines
from gateway.requests.openai.responses import ResponseBody, join_request
from gateway.requests.refusal import Refusal
from gateway.requests.validation import RequestValidator, build_validator
from tests.helpers.demo_folders import make_folder

MODEL_DIR = Path(__file__).parents[2] / "models" / "demo-target"
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def validator() -> RequestValidator:
    spec = GatewaySpec(model_name="demo", model_dir=str(MODEL_DIR), max_model_len=64, vocab_size=4096)
    return build_validator(spec)


def completion(validator: RequestValidator, **body: Any) -> Reading:
    return read_request(Form.COMPLETION, json.dumps({"prompt": "x", **body}).encode(), validator)


def chat(validator: RequestValidator, **body: Any) -> Reading:
    return read_request(Form.CHAT, json.dumps({"messages": HELLO, **body}).encode(), validator)


def refusal(form: Form, body: Any, validator: RequestValidator) -> Refusal:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(Refusal) as refused:
        read_request(form, data, validator)
    return refused.value


@pytest.mark.parametrize("ask", [completion, chat])
def test_every_setting_reaches_the_scheduler(ask: Any, validator: RequestValidator) -> None:
    settings: dict[str, Any] = {
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 7,
        "min_p": 0.125,
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "repetition_penalty": 1.5,
        "min_tokens": 2,
        "max_tokens": 9,
        "n": 3,
        "stop_token_ids": [4, 5],
        "ignore_eos": True,
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
        "prompt_logprobs": 1,
        "seed": 11,
    }
    wishes = {"stop": ["a", "b"], "logit_bias": {"17": -100}, "cache_salt": "s"}
    wishes["attention"] = {"mode": "budgeted"}
    (submit,) = ask(
        validator,
        **settings,
        **wishes,
        speculation={"enabled": True, "num_speculative_tokens": 2, "lower_draft": False},
    ).submits
    assert submit.sampling == SamplingParams(**settings, stop=["a", "b"], logit_bias={17: -100})
    assert submit.speculation == pb.Speculation(enabled=True, num_speculative_tokens=2, lower_draft=False)
    assert submit.cache_salt == "s"
    assert submit.attention.mode == "budgeted"
    assert ask(validator, seed=-1).submits[0].sampling.seed == 2**64 - 1
    (plain,) = ask(validator, **dict.fromkeys([*settings, *wishes, "speculation", "model", "stream", "n"])).submits
    assert plain.sampling.n == 1, "null is no value"
    assert plain.sampling.max_tokens == 64 - len(plain.prompt_token_ids)


def test_lengths_of_the_two_apis(validator: RequestValidator) -> None:
    assert completion(validator).submits[0].sampling.max_tokens == 16
    assert chat(validator).submits[0].sampling.max_tokens == 64 - 3
    assert chat(validator, max_tokens=5).submits[0].sampling.max_tokens == 5
    assert chat(validator, max_tokens=5, max_completion_tokens=6).submits[0].sampling.max_tokens == 6


def test_prompts(validator: RequestValidator) -> None:
    def ids(prompt: Any, **more: Any) -> list[list[int]]:
        return [list(submit.prompt_token_ids) for submit in completion(validator, prompt=prompt, **more).submits]

    (hello,) = ids("Hello", add_special_tokens=False)
    (with_bos,) = ids("Hello")
    assert with_bos == [0, *hello]
    assert ids([3, 4]) == [[3, 4]]
    assert ids(["Hello", "Hello"], add_special_tokens=False) == [hello, hello]
    assert ids([[3, 4], [5]]) == [[3, 4], [5]]


def test_log_probabilities(validator: RequestValidator) -> None:
    def asked(reading: Reading) -> tuple[int | None, int | None]:
        sampling = reading.submits[0].sampling
        return (
            sampling.logprobs if sampling.HasField("logprobs") else None,
            sampling.prompt_logprobs if sampling.HasField("prompt_logprobs") else None,
        )

    assert asked(completion(validator)) == (None, None)
    assert asked(completion(validator, logprobs=0)) == (0, None)
    assert asked(completion(validator, logprobs=3, echo=True)) == (3, 3)
    assert asked(chat(validator, logprobs=False)) == (None, None)
    assert asked(chat(validator, logprobs=True)) == (0, None)
    assert asked(chat(validator, logprobs=True, top_logprobs=5)) == (5, None)


def test_an_echo_has_the_prompts_text_and_can_be_all_that_is_wanted(validator: RequestValidator) -> None:
    reading = completion(validator, prompt="def f", echo=True, max_tokens=0)
    assert reading.presentation.only_echo
    assert reading.submits[0].sampling.max_tokens == 1
    (echo,) = reading.presentation.echoes
    assert (echo.text, echo.first_token) == ("def f", "<|endoftext|>")
    (echo,) = completion(validator, prompt=[519, 290], echo=True).presentation.echoes
    assert (echo.text, echo.first_token) == ("def f", "def")


def test_how_the_answer_is_wanted(validator: RequestValidator) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    wishes = chat(validator, stream=True, stream_options=options, return_token_ids=True).presentation
    assert (wishes.stream, wishes.include_usage, wishes.continuous_usage, wishes.token_ids) == (True,) * 4
    wishes = chat(validator, user="me", **{"bad\r\nname": 1}, store=False).presentation
    assert list(wishes.ignored_fields) == ["user", "store"], "names that a header can hold"


def conversation(template: str | None, **body: Any) -> Presentation:
    compiled = None if template is None else ChatTemplate(template, special_tokens={})
    return ask_chat(json.dumps({"messages": HELLO, **body}).encode(), compiled).presentation


def test_calls_are_found_where_the_template_teaches_their_form() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert conversation("<tool_call>", tools=tools).call_form == CALL_FORM_HERMES
    assert conversation("<tool_call>", tools=tools, tool_choice="auto", parallel_tool_calls=False).one_call
    assert not conversation("<tool_call>", tools=tools, tool_choice="none").call_form
    assert not conversation("<tool_call>").call_form
    assert conversation("<tool_call><function=", tools=tools).call_form == CALL_FORM_QWEN_XML
    assert conversation("[TOOL_CALLS]", tools=tools).call_form == CALL_FORM_MISTRAL
    assert conversation("<|python_tag|>", tools=tools).call_form == CALL_FORM_LLAMA_JSON
    assert conversation("[func_name1(a=b)]", tools=tools).call_form == CALL_FORM_PYTHONIC
    assert conversation("<\uff5ctool\u2581calls\u2581begin\uff5c>", tools=tools).call_form == CALL_FORM_DEEPSEEK
    for template in ("plain", None):
        with pytest.raises(Refusal, match='tool_choice: must be "none"'):
            conversation(template, tools=tools)


def test_a_choice_of_tools_forces_calls() -> None:
    schema = {"type": "object", "properties": {"x": {"type": "null"}}, "required": ["x"], "additionalProperties": False}
    tools = [
        {"type": "function", "function": {"name": "f", "parameters": schema}},
        {"type": "function", "function": {"name": "g"}},
    ]

    def forced(choice: Any, **body: Any) -> str:
        body = {"messages": HELLO, "tools": tools, "tool_choice": choice, **body}
        asked = ask_chat(json.dumps(body).encode(), ChatTemplate("<tool_call>", special_tokens={}))
        return json.dumps(asked.forced_calls) if asked.forced_calls else ""

    assert forced("auto") == forced("none") == ""
    assert "json_1" in forced("required")
    named = forced({"type": "function", "function": {"name": "f"}})
    assert "json_0" in named
    assert "json_1" not in named
    for choice, message in (
        ("any", 'tool_choice: must be "auto", "none"'),
        ({"type": "function", "function": {"name": "h"}}, "tool_choice.function.name: 'h' is none of tools"),
        ({"type": "function"}, "tool_choice: must be"),
    ):
        with pytest.raises(Refusal, match=message):
            forced(choice)
    with pytest.raises(Refusal, match=r'^tools\[0\].type: must be "function", got \'"retrieval"\''):
        forced("auto", tools=[{"type": "retrieval"}])
    bad = {"type": "function", "function": {"name": "f", "parameters": {"uniqueItems": True}}}
    with pytest.raises(Refusal, match=r"^tools\[0\].function.parameters: cannot be enforced"):
        forced("required", tools=[bad])


def test_reasoning_is_found_where_the_template_knows_it(tmp_path: Path) -> None:
    assert conversation("plain").reasoning == REASONING_UNSPECIFIED
    template = "{{ messages[0].content }}{% if enable_thinking %}<think>\n{% else %}</think>{% endif %}"
    folder = make_folder(tmp_path, config={"chat_template": template})
    spec = GatewaySpec(model_name="demo", model_dir=str(folder), max_model_len=64, vocab_size=4096)
    for thinks, reasoning in ((True, REASONING_BEGUN), (False, REASONING_POSSIBLE)):
        body = {"messages": HELLO, "chat_template_kwargs": {"enable_thinking": thinks}}
        reading = read_request(Form.CHAT, json.dumps(body).encode(), build_validator(spec))
        assert reading.presentation.reasoning == reasoning


TEMPLATE = """
{%- for m in messages %}[{{ m.role }}:{{ m.content }}
{%- for call in m.tool_calls or [] %}|{{ call.function.name }}={{ call.function.arguments.a }}{% endfor -%}
{{ '|' + m.reasoning_content if m.reasoning_content else '' }}{{ '|' + m.tool_call_id if m.tool_call_id else '' }}]
{%- endfor %}{{ tools[0].function.name if tools else '' }}{{ documents[0].text if documents else '' }}
{{- reasoning_effort or '' }}{{ '!' if enable_thinking else '' }}{{ '>' if add_generation_prompt else '' }}"""


def rendered(body: dict[str, Any], template: str = TEMPLATE) -> str:
    fields = parse_body(TokenizeChatBody, json.dumps(body).encode())
    return render_chat(chat_of(fields), ChatTemplate(template, special_tokens={}))


def test_a_conversation_reaches_the_template() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 5}'}}
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning": "why", "refusal": None},
        {"role": "tool", "content": "5", "tool_call_id": "1"},
    ]
    variables = {"tools": [{"type": "function", "function": {"name": "f"}}], "documents": [{"text": "doc"}]}
    kwargs = {"chat_template_kwargs": {"enable_thinking": True}, "reasoning_effort": "low"}
    text = rendered({"messages": messages, **variables, **kwargs})
    assert text == "[user:one\ntwo][assistant:|f=5|why][tool:5|1]fdoclow!>"
    assert rendered({"messages": HELLO, "add_generation_prompt": False}) == "[user:Hello]"
    beginning = [*HELLO, {"role": "assistant", "content": "Go"}]
    assert rendered({"messages": beginning, "continue_final_message": True}) == "[user:Hello][assistant:Go"


def test_a_developer_speaks_as_the_system_where_the_template_knows_none() -> None:
    body = {"messages": [{"role": "developer", "content": "x"}]}
    assert rendered(body, "{{ messages[0].role }}") == "system"
    assert rendered(body, "{{ messages[0].role }}{# developer #}") == "developer"


@pytest.mark.parametrize(
    ("form", "body", "message"),
    [
        (Form.CHAT, b"{", "request: is not JSON: EOF"),
        (Form.CHAT, b"[]", "request: must be an object, got []"),
        (Form.CHAT, b"[" * 100_000, "request: is not JSON: recursion limit exceeded"),
        (Form.CHAT, {}, "messages: is missing"),
        (Form.CHAT, {"messages": []}, "messages: is empty"),
        (Form.CHAT, {"messages": [{"content": "x"}]}, "messages[0].role: is missing"),
        (Form.CHAT, {"messages": [{"role": "", "content": "x"}]}, "messages[0].role: is empty"),
        (
            Form.CHAT,
            {"messages": [{"role": "user", "content": 5}]},
            "messages[0].content: must be a valid string, got 5",
        ),
        (
            Form.CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0].type: must be \"text\", got 'image_url'",
        ),
        (
            Form.CHAT,
            {"messages": [{"role": "a", "tool_calls": [{"function": {"arguments": "{"}}]}]},
            "messages[0].tool_calls[0].function.arguments: is not JSON",
        ),
        (Form.CHAT, {"messages": HELLO, "temperature": "hot"}, 'temperature: must be a valid number, got "hot"'),
        (Form.CHAT, {"messages": HELLO, "temperature": -1}, "temperature: must be finite and >= 0, got -1"),
        (Form.CHAT, {"messages": HELLO, "temperature": 1e300}, "temperature: must be finite and >= 0, got inf"),
        (Form.CHAT, {"messages": HELLO, "top_logprobs": 3}, "top_logprobs: needs logprobs: true"),
        (Form.CHAT, {"messages": HELLO, "logprobs": True, "top_logprobs": 21}, "top_logprobs: must be in [0, 20]"),
        (Form.CHAT, {"messages": HELLO, "max_tokens": 0}, "max_tokens: must be >= 1, got 0"),
        (Form.CHAT, {"messages": HELLO, "max_completion_tokens": 0}, "max_completion_tokens: must be >= 1, got 0"),
        (Form.CHAT, {"messages": HELLO, "n": 1 << 40}, "n: must be less than or equal to 2147483647"),
        (Form.CHAT, {"messages": HELLO, "stop": [1]}, "stop[0]: must be a valid string, got 1"),
        (Form.CHAT, {"messages": HELLO, "stop": [""]}, "stop[0]: is empty"),
        (Form.CHAT, {"messages": HELLO, "logit_bias": {"x": 1}}, "logit_bias.x: must match pattern"),
        (
            Form.CHAT,
            {"messages": HELLO, "logit_bias": {"5000": 1}},
            "logit_bias: token id must be in [0, 4096), got 5000",
        ),
        (Form.CHAT, {"messages": HELLO, "stream_options": {}}, "stream_options: needs stream: true"),
        (Form.CHAT, {"messages": HELLO, "stream": True, "prompt_logprobs": 1}, "prompt_logprobs: are not streamed"),
        (Form.CHAT, {"messages": HELLO, "add_special_tokens": True}, "add_special_tokens: must be false"),
        (Form.CHAT, {"messages": HELLO, "speculation": {"tokens": 1}}, "speculation.tokens: is not a field"),
        (
            Form.CHAT,
            {"messages": HELLO, "response_format": {"type": "xml"}},
            "response_format.type: must be one of text, json_object",
        ),
        (
            Form.CHAT,
            {
                "messages": HELLO,
                "response_format": {"type": "json_schema", "json_schema": {"schema": {"uniqueItems": True}}},
            },
            'response_format.json_schema.schema: cannot be enforced: Unimplemented keys: ["uniqueItems"]',
        ),
        (
            Form.CHAT,
            {"messages": HELLO, "response_format": {"type": "json_schema"}},
            "response_format.json_schema: must be an object with a schema",
        ),
        (
            Form.CHAT,
            {"messages": HELLO, "response_format": {"type": "json_object"}, "guided_regex": "a"},
            "guided_regex: response_format is given too",
        ),
        (Form.COMPLETION, {"prompt": "a", "guided_regex": "("}, "guided_regex: cannot be enforced"),
        (
            Form.COMPLETION,
            {"prompt": "a", "structured_outputs": {"choice": []}},
            "structured_outputs.choice: needs texts",
        ),
        (
            Form.COMPLETION,
            {"prompt": "a", "structured_outputs": {"structural_tag": "{}"}},
            "structured_outputs.structural_tag: is not a field",
        ),
        (
            Form.COMPLETION,
            {"prompt": "a", "guided_regex": "a", "ignore_eos": True},
            "ignore_eos: must be false with structured_output",
        ),
        (Form.CHAT, {"messages": HELLO, "tools": [{"a": 1}]}, 'tool_choice: must be "none"'),
        (Form.CHAT, {"messages": HELLO, "tool_choice": "required"}, "tool_choice: needs tools"),
        (Form.CHAT, {"messages": HELLO, "audio": {"voice": "x"}}, "audio: is not supported"),
        (Form.COMPLETION, {"prompt": ["a", [1]]}, "prompt[1]: must be a valid string, got [1]"),
        (Form.COMPLETION, {"prompt": []}, "prompt: the prompt is empty"),
        (Form.COMPLETION, {"prompt": [[1], []]}, "prompt[1]: the prompt is empty"),
        (
            Form.COMPLETION,
            {"prompt": [[1], [2, 5000]]},
            "prompt[1][1]: token id 5000 is outside the vocabulary of 4096",
        ),
        (Form.COMPLETION, {"prompt": [5000]}, "prompt[0]: token id 5000 is outside"),
        (Form.COMPLETION, {"prompt": ["a", "x = 1\n" * 99]}, "prompt[1]: the prompt has"),
        (
            Form.COMPLETION,
            {"prompt": ["a"] * 1025},
            "prompt: at most 1024 samples of all prompts are allowed, got 1025",
        ),
        (Form.COMPLETION, {"prompt": ["a"] * 17, "n": 61}, "prompt: at most 1024 samples of all prompts"),
        (Form.COMPLETION, {"prompt": "a", "suffix": "b"}, "suffix: is not supported"),
        (Form.COMPLETION, {"prompt": "a", "best_of": 2}, "best_of: must be n, 1, got 2"),
        (Form.COMPLETION, {"prompt": "a", "max_tokens": 0}, "max_tokens: must be >= 1, got 0"),
        (
            Form.COMPLETION,
            {"prompt": "a", "echo": True, "logprobs": 1, "stream": True},
            "logprobs: are not streamed for the prompt",
        ),
        (Form.TOKENIZE, {}, "messages: is missing"),
        (Form.DETOKENIZE, {"tokens": [1, 5000]}, "tokens[1]: token id 5000 is outside the vocabulary of 4096"),
    ],
)
def test_what_is_refused_is_named_in_the_clients_words(
    form: Form, body: Any, message: str, validator: RequestValidator
) -> None:
    refused = refusal(form, body, validator)
    assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
    assert refused.message.startswith(message)


SCHEMA = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"type": "null"}}}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}}, '"b"'),
        ({"response_format": {"type": "json_object"}}, '{"type": "object"'),
        ({"response_format": {"type": "regex", "regex": "a+b"}}, "a+b"),
        ({"response_format": {"type": "text"}}, ""),
        ({"structured_outputs": {"json": SCHEMA}}, '"b"'),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, '"b"'),
        ({"structured_outputs": {"json_object": True}}, '{"type": "object"'),
        ({"structured_outputs": {"grammar": 'start: "q"'}}, 'start: \\"q\\"'),
        ({"guided_json": SCHEMA}, '"b"'),
        ({"guided_choice": ["yes", "no"]}, "yes"),
        ({"guided_grammar": 'root ::= "q"'}, 'start: \\"q\\"'),
    ],
)
@pytest.mark.parametrize("ask", [completion, chat])
def test_forms_of_the_output_reach_the_scheduler(
    ask: Any, body: dict[str, Any], words: str, validator: RequestValidator
) -> None:
    source = ask(validator, **body).submits[0].grammar
    assert bool(source) == bool(words)
    assert words in source
    assert source.find('"b"') <= source.find('"a"'), "properties come in the order of the schema"


def test_a_short_form_is_not_read_on_the_event_loop(validator: RequestValidator) -> None:
    request = pb.GenerateRequest(text="x", structured_output=pb.StructuredOutput(regex="a"))
    body = json.dumps({"prompt": "x", "guided_regex": "a"}).encode()
    assert read_simple_request(Form.GENERATE, request.SerializeToString(), validator) is None
    assert read_simple_request(Form.COMPLETION, body, validator) is None


def nonsense(rng: random.Random, depth: int = 0) -> Any:
    simple = [None, True, 0, -1, 2**64, 10**400, 0.5, 1e308, float("nan"), "", "a", "\ud800", "5", "auto", [], {}]
    match rng.randrange(6 if depth < 4 else 4):
        case 4:
            return [nonsense(rng, depth + 1) for _ in range(rng.randrange(4))]
        case 5:
            keys = rng.sample(
                ["role", "content", "type", "text", "5", "tool_calls", "function", "arguments", "enabled"], 4
            )
            return {key: nonsense(rng, depth + 1) for key in keys}
    return rng.choice(simple)


def encoded(form: Form, body: Any) -> bytes:
    if form is not Form.RESPONSE:
        return json.dumps(body).encode()
    return join_request({}, json.dumps({**body, "prompt": None}).encode())


def test_nonsense_is_refused_and_does_no_other_harm(validator: RequestValidator) -> None:
    rng = random.Random(1)
    bodies = {
        Form.COMPLETION: CompletionBody,
        Form.CHAT: ChatBody,
        Form.DETOKENIZE: DetokenizeBody,
        Form.MESSAGES: MessagesBody,
        Form.RESPONSE: ResponseBody,
    }
    num_read = 0
    for _ in range(1000):
        form = rng.choice(list(bodies))
        body: dict[str, Any] = {"prompt": "hi", "messages": HELLO, "tokens": [1], "max_tokens": 3, "input": HELLO}
        body |= {name: nonsense(rng) for name in rng.sample(list(bodies[form].model_fields), rng.randrange(3))}
        with contextlib.suppress(Refusal):
            read_request(form, encoded(form, body), validator)
            num_read += 1
    assert 20 < num_read < 900, "some make sense"


@pytest.mark.parametrize("form", [form for form in Form if form not in (Form.GENERATE, Form.JOB_LINES, Form.JOB_ITEM)])
def test_another_model_is_not_found(form: Form, validator: RequestValidator) -> None:
    body = {"model": "llama", "prompt": "a", "messages": HELLO, "tokens": [1], "max_tokens": 3, "input": "x"}
    refused = refusal(form, encoded(form, body), validator)
    assert refused.code is grpc.StatusCode.NOT_FOUND
    assert refused.message.startswith("model: 'llama' is not served here; this server has 'demo'")


def test_lines_of_a_job_are_found_where_they_are() -> None:
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}
    lines = [json.dumps(line), "", json.dumps({**line, "custom_id": "é"}), "no json", json.dumps({**line, "url": "/x"})]
    data = "\n".join(lines).encode()
    found = read_request(Form.JOB_LINES, join_lines("", data), None).lines  # type: ignore[arg-type]
    assert [entry.number for entry in found] == [0, 2, 3, 4]
    assert [data[entry.start :][: entry.num_bytes].decode() for entry in found] == [lines[i] for i in (0, 2, 3, 4)]
    assert [entry.custom_id for entry in found] == ["a", "é", "", ""]
    assert [entry.problem.partition(":")[0] for entry in found] == ["", "", "request", "url"]


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"custom_id": ""}, "custom_id: "),
        ({"custom_id": 3}, "custom_id: "),
        ({"method": "GET"}, "method: must be 'POST', got"),
        ({"url": "/v1/chat/completions"}, "url: must be that of the job, /v1/completions, got '/v1/chat/completions'"),
        ({"body": []}, "body: "),
        ({"body": {"stream": True}}, "body.stream: must be false"),
    ],
    ids=str,
)
def test_a_line_that_is_no_request_is_named(fields: dict[str, Any], problem: str) -> None:
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {}, **fields}
    data = join_lines("/v1/completions", json.dumps(line).encode())
    (found,) = read_request(Form.JOB_LINES, data, None).lines  # type: ignore[arg-type]
    assert found.problem.startswith(problem)


def test_an_item_has_its_own_seed_or_the_given_one(validator: RequestValidator) -> None:
    for seed in (None, 7, -1):
        body = {"prompt": "x", "max_tokens": 3} if seed is None else {"prompt": "x", "max_tokens": 3, "seed": seed}
        line = {"custom_id": "a", "url": "/v1/completions", "body": body}
        reading = read_request(Form.JOB_ITEM, join_item(2**64 - 2, json.dumps(line).encode()), validator)
        assert reading.endpoint == "/v1/completions"
        assert reading.submits[0].sampling.seed == {None: 2**64 - 2, 7: 7, -1: 2**64 - 1}[seed]

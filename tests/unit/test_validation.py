"""What the gateway refuses, and how it resolves the rest."""

import json
from pathlib import Path
from typing import Any

import grpc
import pytest

from echelon.pb import inference_pb2 as pb
from echelon.pb.process_pb2 import GatewaySpec
from echelon.pb.sampling_pb2 import SamplingParams
from gateway.requests.refusal import Refusal
from gateway.requests.sampling import load_sampling_defaults, resolve_sampling
from gateway.requests.validation import RequestValidator, build_validator
from gateway.requests.wire import MAX_FIELDS, Malformed, strict_decoder

MODEL_DIR = Path(__file__).parents[2] / "models" / "demo-target"
decode = strict_decoder(pb.GenerateRequest)


@pytest.fixture(scope="module")
def validator() -> RequestValidator:
    return build_validator(GatewaySpec(model_name="demo", model_dir=str(MODEL_DIR), max_model_len=32, vocab_size=4096))


def request(*, ids: list[int] | None = None, sampling: dict[str, Any] | None = None, **fields: Any) -> Any:
    if ids is not None:
        fields["token_ids"] = pb.TokenIds(ids=ids)
    elif not fields.keys() & {"text", "chat"}:
        fields["text"] = "def f():"
    return pb.GenerateRequest(sampling=SamplingParams(**(sampling or {})), **fields)


def chat_of(*, extra: str = "", **fields: Any) -> pb.ChatMessages:
    return pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="Hi", extra=extra)], **fields)


def refusal(validator: RequestValidator, wrong: pb.GenerateRequest) -> Refusal:
    with pytest.raises(Refusal) as caught:
        validator.validate(wrong)
    return caught.value


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"temperature": -0.5}, "sampling.temperature: must be finite and >= 0, got -0.5"),
        ({"temperature": float("nan")}, "sampling.temperature: must be finite and >= 0, got nan"),
        ({"temperature": float("inf")}, "sampling.temperature: must be finite and >= 0, got inf"),
        ({"top_p": 1.5}, "sampling.top_p: must be in (0, 1], got 1.5"),
        ({"top_p": 0.0}, "sampling.top_p: must be in (0, 1], got 0"),
        ({"top_k": -2}, "sampling.top_k: must be >= 1, or 0 or -1 for off, got -2"),
        ({"min_p": 1.1}, "sampling.min_p: must be in [0, 1], got 1.1"),
        ({"repetition_penalty": 0.0}, "sampling.repetition_penalty: must be finite and > 0, got 0"),
        ({"presence_penalty": 2.5}, "sampling.presence_penalty: must be in [-2, 2], got 2.5"),
        ({"frequency_penalty": -3.0}, "sampling.frequency_penalty: must be in [-2, 2], got -3"),
        ({"max_tokens": 0}, "sampling.max_tokens: must be >= 1, got 0"),
        ({"min_tokens": -1}, "sampling.min_tokens: must be >= 0, got -1"),
        ({"min_tokens": 9, "max_tokens": 8}, "sampling.min_tokens: must be at most max_tokens, 8 "),
        ({"logprobs": 21}, "sampling.logprobs: must be in [0, 20], got 21"),
        ({"prompt_logprobs": -1}, "sampling.prompt_logprobs: must be in [0, 20], got -1"),
        ({"n": 65}, "sampling.n: must be in [1, 64], got 65"),
        ({"n": 0}, "sampling.n: must be in [1, 64], got 0"),
        ({"stop": ["a", ""]}, "sampling.stop[1]: is empty"),
        ({"stop": ["a"] * 65}, "sampling.stop: at most 64 strings, got 65"),
        ({"stop": ["a", "b" * 1025]}, "sampling.stop[1]: at most 1024 characters, got 1025"),
        ({"stop_token_ids": [1] * 1025}, "sampling.stop_token_ids: at most 1024 tokens, got 1025"),
        ({"logit_bias": dict.fromkeys(range(1025), 1.0)}, "sampling.logit_bias: at most 1024 tokens, got 1025"),
        ({"stop_token_ids": [4096]}, "sampling.stop_token_ids[0]: must be in [0, 4096), got 4096"),
        ({"stop_token_ids": [1, -1]}, "sampling.stop_token_ids[1]: must be in [0, 4096), got -1"),
        ({"logit_bias": {5000: 1.0}}, "sampling.logit_bias: token id must be in [0, 4096), got 5000"),
        ({"logit_bias": {5: 101.0}}, "sampling.logit_bias[5]: must be in [-100, 100], got 101"),
        ({"logit_bias": {5: float("nan")}}, "sampling.logit_bias[5]: must be in [-100, 100], got nan"),
    ],
)
def test_sampling_out_of_range(validator: RequestValidator, sampling: dict[str, Any], message: str) -> None:
    refused = refusal(validator, request(sampling=sampling))
    assert refused.code == grpc.StatusCode.INVALID_ARGUMENT
    assert refused.message.startswith(message)


@pytest.mark.parametrize(
    "sampling",
    [
        {
            "temperature": 0.0,
            "top_p": 1.0,
            "top_k": 1,
            "min_p": 1.0,
            "presence_penalty": -2.0,
            "frequency_penalty": 2.0,
        },
        {"n": 64, "logprobs": 20, "prompt_logprobs": 0, "max_tokens": 1, "min_tokens": 1},
        {"stop_token_ids": [0, 4095], "logit_bias": {0: -100.0, 4095: 100.0}, "top_k": -1},
    ],
)
def test_the_ends_of_the_ranges_are_allowed(validator: RequestValidator, sampling: dict[str, Any]) -> None:
    validator.validate(request(sampling=sampling))


@pytest.mark.parametrize(
    ("wrong", "code", "message"),
    [
        (request(model="llama"), "NOT_FOUND", "model: 'llama' is not served here; this server has 'demo'"),
        (request(request_id="x" * 129), "INVALID_ARGUMENT", "request_id: at most 128 characters are allowed, got 129"),
        (
            request(attention=pb.Attention(mode="half")),
            "INVALID_ARGUMENT",
            "attention.mode: must be full or budgeted, got 'half'",
        ),
        (request(cache_salt="\u00e9" * 129), "INVALID_ARGUMENT", "cache_salt: at most 256 bytes are allowed, got 258"),
        (request(ids=[]), "INVALID_ARGUMENT", "token_ids: the prompt is empty"),
        (request(ids=[1, 4096]), "INVALID_ARGUMENT", "token_ids[1]: token id 4096 is outside the vocabulary of 4096"),
        (request(ids=[1] * 32), "INVALID_ARGUMENT", "token_ids: the prompt has 32 tokens, but max_model_len is 32"),
        (request(text="x = 1\n" * 100), "INVALID_ARGUMENT", "text: the prompt has "),
        (
            request(chat=chat_of(chat_template_kwargs="{'a': 1}")),
            "INVALID_ARGUMENT",
            "chat.chat_template_kwargs: is not JSON: ",
        ),
        (
            request(chat=chat_of(chat_template_kwargs="[1]")),
            "INVALID_ARGUMENT",
            "chat.chat_template_kwargs: must be a JSON object, got list",
        ),
        (
            request(chat=chat_of(chat_template_kwargs="[" * 100_000)),
            "INVALID_ARGUMENT",
            "chat.chat_template_kwargs: is nested too deeply",
        ),
        (
            request(chat=chat_of(chat_template_kwargs='{"messages": []}')),
            "INVALID_ARGUMENT",
            "chat.chat_template_kwargs: messages is a field of its own",
        ),
        (
            request(chat=chat_of(chat_template_kwargs='{"tools": {}}')),
            "INVALID_ARGUMENT",
            "chat.chat_template_kwargs: tools must be a list of objects",
        ),
        (
            request(chat=chat_of(extra='{"content": "x"}')),
            "INVALID_ARGUMENT",
            "chat.messages[0].extra: content is a field of its own",
        ),
        (
            request(chat=chat_of(add_generation_prompt=True, continue_final_message=True)),
            "INVALID_ARGUMENT",
            "chat.add_generation_prompt: begins a new message",
        ),
        (
            request(ids=[1], add_special_tokens=False),
            "INVALID_ARGUMENT",
            "add_special_tokens: is for text",
        ),
        (
            request(text="x = 1\n" * 50_000),  # counted in pieces
            "INVALID_ARGUMENT",
            "text: the prompt has at least ",
        ),
        (
            request(model="m" * 100_000),
            "NOT_FOUND",
            f"model: '{'m' * 100}...' is not served here; this server has 'demo'",
        ),
        (pb.GenerateRequest(), "INVALID_ARGUMENT", "input: one of text, chat and token_ids is needed"),
        (request(chat=pb.ChatMessages()), "INVALID_ARGUMENT", "chat.messages: is empty"),
        (
            request(chat=pb.ChatMessages(messages=[pb.ChatMessage(content="Hi")])),
            "INVALID_ARGUMENT",
            "chat.messages[0].role: is empty",
        ),
    ],
)
def test_bad_requests(validator: RequestValidator, wrong: Any, code: str, message: str) -> None:
    refused = refusal(validator, wrong)
    assert refused.code.name == code
    assert refused.message.startswith(message)


def test_a_salt_reaches_the_scheduler(validator: RequestValidator) -> None:
    assert validator.validate(request(cache_salt="s" * 256)).cache_salt == "s" * 256


def test_the_longest_prompt_leaves_room_for_one_token(validator: RequestValidator) -> None:
    submit = validator.validate(request(ids=[1] * 31))
    assert submit.sampling.max_tokens == 1


def test_special_tokens_are_added_to_text_unless_the_client_has_done_so(validator: RequestValidator) -> None:
    bos = [0]
    plain = validator.validate(request(text="def f():", add_special_tokens=False)).prompt_token_ids
    assert list(validator.validate(request(text="def f():")).prompt_token_ids) == bos + list(plain)
    rendered = validator.validate(request(text="<|endoftext|>def f():", add_special_tokens=False))
    assert list(rendered.prompt_token_ids) == bos + list(plain)


def test_every_setting_of_a_submit_is_resolved(validator: RequestValidator) -> None:
    submit = validator.validate(request(ids=[1, 2], sampling={"top_k": -1, "logprobs": 0}))
    unset = {
        name
        for name in SamplingParams.DESCRIPTOR.fields_by_name
        if name not in ("stop", "stop_token_ids", "logit_bias") and not submit.sampling.HasField(name)
    }
    assert unset == {"prompt_logprobs"}  # unset: not asked for; logprobs 0: those of the chosen token
    assert submit.sampling.top_k == 0
    assert submit.sampling.max_tokens == 30
    assert submit.sampling.n == 1
    assert submit.sampling.skip_special_tokens
    assert submit.request_id


def test_seeds_are_kept_or_drawn_anew(validator: RequestValidator) -> None:
    given = validator.validate(request(sampling={"seed": 0}))
    assert given.sampling.seed == 0
    drawn = {validator.validate(request()).sampling.seed for _ in range(3)}
    assert len(drawn) == 3


def test_max_tokens_is_cut_to_what_fits(validator: RequestValidator) -> None:
    submit = validator.validate(request(ids=[1] * 20, sampling={"max_tokens": 100}))
    assert submit.sampling.max_tokens == 12
    refused = refusal(validator, request(ids=[1] * 20, sampling={"min_tokens": 13}))
    assert "max_model_len leaves room for 12" in refused.message


def write_generation_config(folder: Path, **values: Any) -> Path:
    (folder / "generation_config.json").write_text(json.dumps(values))
    return folder


def test_defaults_come_from_generation_config(tmp_path: Path) -> None:
    folder = write_generation_config(
        tmp_path, temperature=0.6, top_p=0.95, top_k=20, repetition_penalty=1.05, max_new_tokens=7, min_p=None
    )
    defaults = load_sampling_defaults(folder)
    nothing = resolve_sampling(SamplingParams(), defaults, room=100, vocab_size=9)
    assert nothing.temperature == pytest.approx(0.6)
    assert nothing.top_p == pytest.approx(0.95)
    assert (nothing.top_k, nothing.max_tokens, nothing.min_p) == (20, 7, 0)
    given = SamplingParams(temperature=0, top_k=0, top_p=1, max_tokens=50)
    explicit = resolve_sampling(given, defaults, room=100, vocab_size=9)
    assert (explicit.temperature, explicit.top_k, explicit.top_p, explicit.max_tokens) == (0, 0, 1, 50)
    assert explicit.repetition_penalty == pytest.approx(1.05)


def test_defaults_without_generation_config(tmp_path: Path) -> None:
    defaults = load_sampling_defaults(tmp_path)
    assert (defaults.temperature, defaults.top_p, defaults.top_k, defaults.repetition_penalty) == (1, 1, 0, 1)


def test_do_sample_is_ignored(tmp_path: Path) -> None:
    assert load_sampling_defaults(write_generation_config(tmp_path, do_sample=False)).temperature == 1


@pytest.mark.parametrize("values", [{"top_p": 2.0}, {"temperature": "hot"}, {"top_k": 0.5}])
def test_a_bad_generation_config_names_file_and_key(tmp_path: Path, values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"generation_config\.json: .*{next(iter(values))}"):
        load_sampling_defaults(write_generation_config(tmp_path, **values))


def test_resolving_does_not_change_the_defaults(tmp_path: Path) -> None:
    defaults = load_sampling_defaults(tmp_path)
    before = defaults.SerializeToString(deterministic=True)
    resolve_sampling(SamplingParams(stop=["a"], logit_bias={1: 2.0}, n=3), defaults, room=9, vocab_size=9)
    assert defaults.SerializeToString(deterministic=True) == before


def test_strict_decoding_accepts_what_protobuf_writes() -> None:
    full = request(
        chat=pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="h\u00e9 \U0001f600")] * 2),
        sampling={"logit_bias": {1: 2.0, 70000: -1.0}, "stop": ["\u00e9"], "stop_token_ids": [1, -5], "seed": 1 << 63},
        speculation=pb.Speculation(enabled=False, num_speculative_tokens=3),
    )
    assert decode(full.SerializeToString()) == full
    long = request(ids=list(range(0, 1 << 20, 997)))
    assert decode(long.SerializeToString()) == long


@pytest.mark.parametrize("cut", range(1, 30))
def test_truncated_messages_are_malformed(cut: int) -> None:
    whole = request(text="Hello", sampling={"temperature": 1.0, "stop": ["ab"], "seed": 300}).SerializeToString()
    if cut < len(whole):
        decoded = decode(whole[:-cut])
        # A cut between two fields leaves a shorter, valid message.
        assert isinstance(decoded, Malformed) or decoded.SerializeToString() == whole[:-cut]


def test_a_field_of_another_wire_type_is_unknown() -> None:
    as_varint = b"\x1a\x01a" + b"\x32\x02\x08\x01"  # sampling.temperature is a float, not a varint
    decoded = decode(as_varint)
    assert isinstance(decoded, Malformed)
    assert decoded.error.startswith("sampling: unknown field number 1")


def test_fields_are_limited_at_every_depth() -> None:
    messages = [b"\x0a\x00"] * (MAX_FIELDS // 2)
    chat = b"".join(messages)
    inside = b"\x22" + _varint(len(chat)) + chat
    assert not isinstance(decode(inside), Malformed)
    assert decode(inside * 2 + b"\x2a\x02\x08\x01") == Malformed(error=f"request: has more than {MAX_FIELDS} fields")


def _varint(value: int) -> bytes:
    data = b""
    while value >= 0x80:
        data, value = data + bytes([value & 0x7F | 0x80]), value >> 7
    return data + bytes([value])

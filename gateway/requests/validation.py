"""Turns client requests into scheduler requests. A request is refused here or is well-formed from here on."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from checkpoint.chat_template import ChatTemplate
from childproc.request_limits import ATTENTION_MODES, MAX_CACHE_SALT_BYTES, MAX_REQUEST_ID_CHARS
from echelon.pb import inference_pb2, process_pb2, scheduler_pb2
from echelon.pb.reading_pb2 import REASONING_UNSPECIFIED
from echelon.pb.sampling_pb2 import SamplingParams
from gateway.requests.conversation import render_chat
from gateway.requests.grammar import composed, grammar_of
from gateway.requests.reasoning import reasoning_before_a_form
from gateway.requests.refusal import Refusal, invalid, shown
from gateway.requests.sampling import load_sampling_defaults, resolve_sampling
from gateway.requests.tokenization import PromptTokenizer, TooLongError
from gateway.requests.wire import Malformed, strict_decoder


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestValidator:
    """Turns a GenerateRequest into a Submit, or raises Refusal with a message that names the field.

    What that costs depends on the client's text: long texts and conversations are for a process of their own.
    """

    model_id: str
    model_name: str
    max_model_len: int
    vocab_size: int
    defaults: SamplingParams
    tokenizer: PromptTokenizer

    def read(self, data: bytes) -> scheduler_pb2.Submit:
        return self.validate(decode_request(data))

    def validate(
        self, request: inference_pb2.GenerateRequest, forced_calls: Sequence[Mapping[str, Any]] | None = None
    ) -> scheduler_pb2.Submit:
        """The deadline is the caller's to fill in, after this returns: tokenising takes time too.

        `forced_calls`: the grammar of calls to which the answer keeps.
        """
        self._check_names(request)
        token_ids = self.tokenize(request)
        self._check_prompt(request.WhichOneof("input") or "input", token_ids)
        sampling = resolve_sampling(
            request.sampling,
            self.defaults,
            room=self.max_model_len - len(token_ids),
            vocab_size=self.vocab_size,
        )
        submit = scheduler_pb2.Submit(
            request_id=request.request_id or f"req-{secrets.token_hex(8)}",
            prompt_token_ids=token_ids,
            sampling=sampling,
            speculation=request.speculation,
            cache_salt=request.cache_salt,
            attention=request.attention if request.HasField("attention") else None,
            grammar=self._grammar(request, forced_calls, token_ids, sampling),
            model_id=self.model_id,
        )
        if request.HasField("resume_from"):
            _check_resume(request, sampling)
            self._check_same_model(request.resume_from)
            submit.resume_from.CopyFrom(request.resume_from)
        return submit

    def _grammar(
        self,
        request: inference_pb2.GenerateRequest,
        forced_calls: Sequence[Mapping[str, Any]] | None,
        prompt: Sequence[int],
        sampling: SamplingParams,
    ) -> str:
        if not request.HasField("structured_output") and forced_calls is None:
            return ""
        if sampling.ignore_eos:
            raise invalid("sampling.ignore_eos: must be false with structured_output, which ends the output with EOS")
        if not self.tokenizer.eos_token_ids(self.vocab_size):
            raise invalid("structured_output: needs a model with an EOS token, to end the output")
        is_chat = request.WhichOneof("input") == "chat"
        reasoning = reasoning_before_a_form(prompt, self.tokenizer) if is_chat else REASONING_UNSPECIFIED
        if forced_calls is None:
            return grammar_of(request.structured_output, reasoning)
        if request.HasField("structured_output"):
            raise invalid("structured_output: cannot be combined with a tool_choice that forces a call")
        return composed(forced_calls, reasoning, field="tool_choice")

    def _check_names(self, request: inference_pb2.GenerateRequest) -> None:
        if len(request.request_id) > MAX_REQUEST_ID_CHARS:
            raise invalid(
                f"request_id: at most {MAX_REQUEST_ID_CHARS} characters are allowed, got {len(request.request_id)}"
            )
        if (num_bytes := len(request.cache_salt.encode())) > MAX_CACHE_SALT_BYTES:
            raise invalid(f"cache_salt: at most {MAX_CACHE_SALT_BYTES} bytes are allowed, got {num_bytes}")
        if request.attention.mode not in ("", *ATTENTION_MODES):
            raise invalid(
                f"attention.mode: must be {' or '.join(ATTENTION_MODES)}, got {shown(request.attention.mode)}"
            )

    def _check_same_model(self, resume: inference_pb2.Resume) -> None:
        """Raises Refusal: the tokens of one model are no beginning for another's."""
        if resume.model_id and resume.model_id != self.model_id:
            raise Refusal(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"resume_from: the output was begun by another model, and {self.model_name!r} is served now; send the "
                "request again without it",
            )

    def check_model(self, name: str) -> None:
        """Raises Refusal."""
        if name and name != self.model_name:
            raise Refusal(
                grpc.StatusCode.NOT_FOUND,
                f"model: {shown(name)} is not served here; this server has {self.model_name!r}",
            )

    def tokenize(self, request: inference_pb2.GenerateRequest) -> Sequence[int]:
        """The prompt's tokens. Raises Refusal."""
        self.check_model(request.model)
        kind, max_tokens = request.WhichOneof("input"), self.max_model_len - 1
        if request.HasField("add_special_tokens") and kind != "text":
            raise invalid("add_special_tokens: is for text; a chat template writes special tokens itself")
        try:
            match kind:
                case "text":
                    adds = request.add_special_tokens if request.HasField("add_special_tokens") else True
                    return self.tokenizer.encode(request.text, add_special_tokens=adds, max_tokens=max_tokens)
                case "chat":
                    text = render_chat(request.chat, self._template())
                    return self.tokenizer.encode(text, add_special_tokens=False, max_tokens=max_tokens)
                case "token_ids":
                    return request.token_ids.ids
        except TooLongError as err:
            raise self._too_long(f"{kind}: the prompt has at least {err.num_tokens} tokens") from err
        raise invalid("input: one of text, chat and token_ids is needed")

    def _template(self) -> ChatTemplate:
        if self.tokenizer.chat_template is None:
            raise invalid(f"chat: model {self.model_name!r} has no chat template; send text instead")
        return self.tokenizer.chat_template

    def _check_prompt(self, field: str, token_ids: Sequence[int]) -> None:
        if not token_ids:
            raise invalid(f"{field}: the prompt is empty; at least one token is needed")
        if len(token_ids) >= self.max_model_len:
            raise self._too_long(f"{field}: the prompt has {len(token_ids)} tokens")
        if max(token_ids) >= self.vocab_size:
            i, token_id = next((i, token_id) for i, token_id in enumerate(token_ids) if token_id >= self.vocab_size)
            raise invalid(f"{field}[{i}]: token id {token_id} is outside the vocabulary of {self.vocab_size}")

    def _too_long(self, what: str) -> Refusal:
        return invalid(
            f"{what}, but max_model_len is {self.max_model_len} and output needs a token: at most "
            f"{self.max_model_len - 1} are allowed"
        )


def _check_resume(request: inference_pb2.GenerateRequest, sampling: SamplingParams) -> None:
    """What only a gateway can tell: a scheduler checks the rest. Raises Refusal."""
    if not request.request_id:
        raise invalid("request_id: resume_from needs that of the request which it resumes")
    if sampling.temperature > 0 and not request.sampling.HasField("seed"):
        raise invalid("sampling.seed: resume_from needs the seed, which the first message of the stream has told")
    if (given := len(request.resume_from.samples)) != sampling.n:
        raise invalid(f"resume_from.samples: must be as many as n, {sampling.n}, got {given}")


def is_simple(request: inference_pb2.GenerateRequest) -> bool:
    """It costs no more than its bytes: neither a template nor a grammar is read."""
    return request.WhichOneof("input") != "chat" and not request.HasField("structured_output")


_decode = strict_decoder(inference_pb2.GenerateRequest)


def decode_request(data: bytes) -> inference_pb2.GenerateRequest:
    """Raises Refusal."""
    request = _decode(data)
    if isinstance(request, Malformed):
        raise invalid(request.error)
    return request


def build_validator(spec: process_pb2.GatewaySpec) -> RequestValidator:
    """What a gateway's settings and its model folder say. Raises LoadError naming what is wrong in the folder."""
    model_dir = Path(spec.model_dir)
    return RequestValidator(
        model_id=spec.model_id,
        model_name=spec.model_name,
        max_model_len=spec.max_model_len,
        vocab_size=spec.vocab_size,
        defaults=load_sampling_defaults(model_dir),
        tokenizer=PromptTokenizer(model_dir),
    )

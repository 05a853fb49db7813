"""Turns client requests into scheduler requests. A request is refused here or is well-formed from here on."""

import secrets
from dataclasses import dataclass

import grpc

from checkpoint.chat_template import ChatError
from echelon.pb import inference_pb2, scheduler_pb2
from echelon.pb.sampling_pb2 import SamplingParams
from gateway.requests.refusal import Refusal, invalid
from gateway.requests.sampling import resolve_sampling
from gateway.requests.tokenization import PromptTokenizer

_MAX_REQUEST_ID_CHARS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestValidator:
    """Turns a GenerateRequest into a Submit, or raises Refusal with a message that names the field."""

    model_name: str
    max_model_len: int
    vocab_size: int
    defaults: SamplingParams
    tokenizer: PromptTokenizer

    async def validate(self, request: inference_pb2.GenerateRequest) -> scheduler_pb2.Submit:
        """The deadline is the caller's to fill in, after this returns: tokenising takes time too."""
        self._check_names(request)
        token_ids = await self._tokenize(request)
        self._check_prompt(request.WhichOneof("input") or "input", token_ids)
        sampling = resolve_sampling(
            request.sampling,
            self.defaults,
            room=self.max_model_len - len(token_ids),
            vocab_size=self.vocab_size,
        )
        return scheduler_pb2.Submit(
            request_id=request.request_id or f"req-{secrets.token_hex(8)}",
            prompt_token_ids=token_ids,
            sampling=sampling,
            speculation=request.speculation,
        )

    def _check_names(self, request: inference_pb2.GenerateRequest) -> None:
        if len(request.request_id) > _MAX_REQUEST_ID_CHARS:
            raise invalid(
                f"request_id: at most {_MAX_REQUEST_ID_CHARS} characters are allowed, got {len(request.request_id)}"
            )
        if request.model and request.model != self.model_name:
            raise Refusal(
                grpc.StatusCode.NOT_FOUND,
                f"model: {request.model!r} is not served here; this server has {self.model_name!r}",
            )

    async def _tokenize(self, request: inference_pb2.GenerateRequest) -> list[int]:
        match request.WhichOneof("input"):
            case "text":
                return await self.tokenizer.encode_text(request.text)
            case "chat":
                return await self._tokenize_chat(request.chat)
            case "token_ids":
                return list(request.token_ids.ids)
            case _:
                raise invalid("input: one of text, chat and token_ids is needed")

    async def _tokenize_chat(self, chat: inference_pb2.ChatMessages) -> list[int]:
        if self.tokenizer.chat_template is None:
            raise invalid(f"chat: model {self.model_name!r} has no chat template; send text instead")
        if not chat.messages:
            raise invalid("chat.messages: is empty")
        for i, message in enumerate(chat.messages):
            if not message.role:
                raise invalid(f"chat.messages[{i}].role: is empty; usual roles are system, user and assistant")
        add_generation_prompt = chat.add_generation_prompt if chat.HasField("add_generation_prompt") else True
        messages = [{"role": message.role, "content": message.content} for message in chat.messages]
        try:
            return await self.tokenizer.encode_chat(messages, add_generation_prompt=add_generation_prompt)
        except ChatError as err:
            raise invalid(f"chat.messages: {err}") from err

    def _check_prompt(self, field: str, token_ids: list[int]) -> None:
        if not token_ids:
            raise invalid(f"{field}: the prompt is empty; at least one token is needed")
        if len(token_ids) >= self.max_model_len:
            raise invalid(
                f"{field}: the prompt has {len(token_ids)} tokens, but max_model_len is {self.max_model_len} and "
                f"output needs a token: at most {self.max_model_len - 1} are allowed"
            )
        for i, token_id in enumerate(token_ids):
            if token_id >= self.vocab_size:
                raise invalid(f"{field}[{i}]: token id {token_id} is outside the vocabulary of {self.vocab_size}")

"""Anthropic's /v1/messages."""

import json
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from echelon.pb.inference_pb2 import FINISH_REASON_LENGTH
from echelon.pb.reading_pb2 import Reading
from gateway.access.caller import Caller
from gateway.core import Replies
from gateway.doors.approximations import approximations
from gateway.doors.events import Event, NamedEvent
from gateway.doors.http_errors import HttpProblem
from gateway.doors.http_exchange import Call
from gateway.doors.replies.blocks import Block, Change, End, block_changes, whole_reply
from gateway.requests.forms import Form

_ERRORS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def error_body(problem: HttpProblem) -> dict[str, Any]:
    kind = _ERRORS.get(problem.status, "invalid_request_error" if problem.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": problem.message}}


class MessagesApi:
    form = Form.MESSAGES

    def __init__(self, model: Callable[[], str]) -> None:
        self._model = model

    def prepare(self, data: bytes, caller: Caller) -> bytes:
        return data

    def answer(self, reading: Reading, call: Call, caller: Caller) -> "MessageAnswer":
        return MessageAnswer(reading, message_id=f"msg_{call.request_id}", model=self._model())

    def error_body(self, problem: HttpProblem) -> dict[str, Any]:
        return error_body(problem)

    def error_event(self, problem: HttpProblem) -> Event:
        return NamedEvent("error", json.dumps(error_body(problem)))


class MessageAnswer:
    """One message, whole or streamed."""

    def __init__(self, reading: Reading, *, message_id: str, model: str) -> None:
        self._wishes = reading.presentation
        self._num_prompt_tokens = len(reading.submits[0].prompt_token_ids)
        self._head = {"id": message_id, "type": "message", "role": "assistant", "model": model}

    async def whole(self, replies: Replies) -> str:
        end = await whole_reply(self._wishes, replies)
        content = [_content(block) for block in end.blocks]
        return json.dumps({**self._head, "content": content, **_stop(end), "usage": _usage(end)})

    async def events(self, replies: Replies) -> AsyncIterator[Event]:
        last: int | None = None
        async for change in block_changes(self._wishes, replies):
            if last is None:
                last = -1
                yield self._start()
            if isinstance(change, End):
                for event in _end(change):
                    yield event
            else:
                last = change.place
                for event in _grow(change):
                    yield event

    def _start(self) -> Event:
        usage = {"input_tokens": self._num_prompt_tokens, "output_tokens": 0}
        message: dict[str, Any] = {
            **self._head,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage,
        }
        return _event("message_start", message=message)


def _event(kind: str, **fields: Any) -> Event:
    return NamedEvent(kind, json.dumps({"type": kind, **fields}))


def _grow(change: Change) -> Iterator[Event]:
    index, block = change.place, change.block
    if change.is_new:
        if index:
            yield _event("content_block_stop", index=index - 1)
        yield _event("content_block_start", index=index, content_block=_opening(block))
    if change.text:
        yield _event("content_block_delta", index=index, delta=_delta(block, change.text))


def _end(end: End) -> Iterator[Event]:
    if end.blocks:
        yield _event("content_block_stop", index=len(end.blocks) - 1)
    yield _event("message_delta", delta=_stop(end), usage=_usage(end))
    yield _event("message_stop")


def _opening(block: Block) -> dict[str, Any]:
    return _content(Block(block.kind, name=block.name, call_id=block.call_id))


def _content(block: Block) -> dict[str, Any]:
    match block.kind:
        case "thought":
            return {"type": "thinking", "thinking": block.text, "signature": ""}
        case "said":
            return {"type": "text", "text": block.text}
        case "call":
            return {"type": "tool_use", "id": block.call_id, "name": block.name, "input": _input(block.text)}


def _input(arguments: str) -> Any:
    """An object; what a model that was not forced has written may be none."""
    try:
        return json.loads(arguments) if arguments else {}
    except ValueError:
        return {"arguments": arguments}


def _delta(block: Block, text: str) -> dict[str, Any]:
    match block.kind:
        case "thought":
            return {"type": "thinking_delta", "thinking": text}
        case "said":
            return {"type": "text_delta", "text": text}
        case "call":
            return {"type": "input_json_delta", "partial_json": text}


def _stop(end: End) -> dict[str, Any]:
    if end.finished.reason == FINISH_REASON_LENGTH:
        reason = "max_tokens"
    elif end.finished.stop_str:
        reason = "stop_sequence"
    else:
        reason = "tool_use" if any(block.kind == "call" for block in end.blocks) else "end_turn"
    return {"stop_reason": reason, "stop_sequence": end.finished.stop_str or None}


def _usage(end: End) -> dict[str, Any]:
    """Tokens that were cached are not among the input tokens, as in Anthropic's own."""
    cached = end.usage.cached_prompt_tokens
    return {
        "input_tokens": end.usage.prompt_tokens - cached,
        "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": end.usage.completion_tokens,
        **approximations(end.usage),
    }

"""How the answers of OpenAI's two APIs differ."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from echelon.pb.sampling_pb2 import PositionLogprobs
from gateway.doors.openai.logprobs import Columns, chat_columns, completion_columns
from gateway.doors.replies.reply_parser import Argued, Called, Piece, ReplyParser, Said, Thought


class Shape(Protocol):
    """The fields of a choice that are an API's own."""

    kind: str
    event_kind: str
    id_prefix: str
    has_one_prompt: bool  # what is said of the prompt stands beside the choices, otherwise in each

    def columns(self, positions: Sequence[PositionLogprobs], start: int) -> Columns: ...

    def opening(self, echo: str) -> dict[str, Any] | None:
        """What a choice's stream begins with; None: nothing."""

    def pieces(self, text: str, parser: ReplyParser, *, is_last: bool) -> Iterator[dict[str, Any]]:
        """What a text adds to a stream."""

    def end(self) -> dict[str, Any]:
        """Of a stream."""

    def whole(self, text: str, parser: ReplyParser) -> dict[str, Any]:
        """If it is not streamed."""


class ChatShape:
    kind = "chat.completion"
    event_kind = "chat.completion.chunk"
    id_prefix = "chatcmpl-"
    has_one_prompt = True

    def columns(self, positions: Sequence[PositionLogprobs], start: int) -> Columns:
        return chat_columns(positions)

    def opening(self, echo: str) -> dict[str, Any] | None:
        return {"delta": {"role": "assistant", "content": ""}}

    def pieces(self, text: str, parser: ReplyParser, *, is_last: bool) -> Iterator[dict[str, Any]]:
        return ({"delta": _delta(piece)} for piece in parser.feed(text, is_last=is_last))

    def end(self) -> dict[str, Any]:
        return {"delta": {}}

    def whole(self, text: str, parser: ReplyParser) -> dict[str, Any]:
        return {"message": {"role": "assistant", **_message(parser.feed(text, is_last=True))}}


class CompletionShape:
    kind = event_kind = "text_completion"
    id_prefix = "cmpl-"
    has_one_prompt = False

    def columns(self, positions: Sequence[PositionLogprobs], start: int) -> Columns:
        return completion_columns(positions, start)

    def opening(self, echo: str) -> dict[str, Any] | None:
        return {"text": echo} if echo else None

    def pieces(self, text: str, parser: ReplyParser, *, is_last: bool) -> Iterator[dict[str, Any]]:
        if text:
            yield {"text": text}

    def end(self) -> dict[str, Any]:
        return {"text": ""}

    def whole(self, text: str, parser: ReplyParser) -> dict[str, Any]:
        return {"text": text}


def _delta(piece: Piece) -> dict[str, Any]:
    match piece:
        case Said(text):
            return {"content": text}
        case Thought(text):
            return _reasoning(text)
        case Called(index):
            return {"tool_calls": [{"index": index, **_call(piece, piece.arguments)}]}
        case Argued(index, arguments):
            return {"tool_calls": [{"index": index, "function": {"arguments": arguments}}]}


def _message(pieces: Sequence[Piece]) -> dict[str, Any]:
    content = "".join(piece.text for piece in pieces if isinstance(piece, Said))
    reasoning = "".join(piece.text for piece in pieces if isinstance(piece, Thought))
    calls = [piece for piece in pieces if isinstance(piece, Called)]
    arguments = [call.arguments for call in calls]
    for piece in pieces:
        if isinstance(piece, Argued):
            arguments[piece.index] += piece.arguments
    message: dict[str, Any] = {"content": content if content or not calls else None}
    if reasoning:
        message |= _reasoning(reasoning)
    if calls:
        message["tool_calls"] = [_call(*both) for both in zip(calls, arguments, strict=True)]
    return message


def _reasoning(text: str) -> dict[str, str]:
    """Under both names by which clients look for it."""
    return {"reasoning": text, "reasoning_content": text}


def _call(call: Called, arguments: str) -> dict[str, Any]:
    return {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": arguments}}

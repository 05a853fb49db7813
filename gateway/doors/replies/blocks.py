"""A reply as blocks: of reasoning, of text, and of calls, in the order in which the model writes them."""

import json
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from echelon.pb.inference_pb2 import Finished, GenerateComplete, Usage
from echelon.pb.reading_pb2 import REASONING_BEGUN, REASONING_UNSPECIFIED, Presentation
from gateway.core import Replies
from gateway.doors.replies.reply_parser import Argued, Called, Piece, ReplyParser, Said, Thought

_MAX_CALLS = 1 << 20  # as many as there are


@dataclass(slots=True)
class Block:
    kind: Literal["thought", "said", "call"]
    text: str = ""  # of a call: its arguments
    name: str = ""  # of a call's tool
    call_id: str = ""


class Change(NamedTuple):
    """Text joins a block; if it is new, those before it are complete."""

    place: int  # of the block
    block: Block
    is_new: bool
    text: str


class End(NamedTuple):
    blocks: list[Block]
    finished: Finished
    usage: Usage


def parser_of(wishes: Presentation, **options: Any) -> ReplyParser:
    """`options` are further ones of a ReplyParser."""
    return ReplyParser(
        finds_reasoning=wishes.reasoning != REASONING_UNSPECIFIED,
        begins_in_reasoning=wishes.reasoning == REASONING_BEGUN,
        call_form=wishes.call_form,
        parameter_types=json.loads(wishes.parameter_types or "{}"),
        max_calls=1 if wishes.one_call else _MAX_CALLS,
        **options,
    )


async def block_changes(wishes: Presentation, replies: Replies) -> AsyncIterator[Change | End]:
    """Of a request for one sample; the last item is its End. Raises Refusal."""
    parser, blocks = parser_of(wishes), list[Block]()
    async for _, reply in replies:
        if isinstance(reply, GenerateComplete):
            for change in _changes(blocks, parser.feed("", is_last=True)):
                yield change
            yield End(blocks, reply.finished[0], reply.usage)
        else:
            for change in _changes(blocks, parser.feed(reply.text)):
                yield change


async def whole_reply(wishes: Presentation, replies: Replies) -> End:
    """The same at once."""
    async for change in block_changes(wishes, replies):
        if isinstance(change, End):
            return change
    raise AssertionError("replies end with a complete one")


def _changes(blocks: list[Block], pieces: Iterable[Piece]) -> Iterator[Change]:
    """Adds the pieces to the blocks."""
    for piece in pieces:
        match piece:
            case Said(text):
                new = None if blocks and blocks[-1].kind == "said" else Block("said")
            case Thought(text):
                new = None if blocks and blocks[-1].kind == "thought" else Block("thought")
            case Called(name=name, call_id=call_id, arguments=text):
                new = Block("call", name=name, call_id=call_id)
            case Argued(arguments=text):
                new = None
        if new is not None:
            blocks.append(new)
        blocks[-1].text += text
        yield Change(len(blocks) - 1, blocks[-1], new is not None, text)

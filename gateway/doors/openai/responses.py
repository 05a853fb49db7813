"""OpenAI's /v1/responses."""

import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from echelon.pb.inference_pb2 import FINISH_REASON_ABORT, FINISH_REASON_LENGTH
from echelon.pb.reading_pb2 import Reading
from gateway.access.caller import Caller
from gateway.core import Replies
from gateway.doors.approximations import approximations
from gateway.doors.events import Event, NamedEvent
from gateway.doors.http_errors import HttpProblem, error_body
from gateway.doors.http_exchange import Call
from gateway.doors.openai.response_store import ResponseStore
from gateway.doors.replies.blocks import Block, Change, End, block_changes, whole_reply
from gateway.requests.forms import Form
from gateway.requests.openai.responses import join_request

_PREFIXES = {"thought": "rs", "said": "msg", "call": "fc"}
_KINDS = {
    "thought": "response.reasoning_text",
    "said": "response.output_text",
    "call": "response.function_call_arguments",
}
_NOTHING_YET: dict[str, Any] = {"error": None, "incomplete_details": None, "usage": None}


class ResponsesApi:
    form = Form.RESPONSE

    def __init__(self, model: Callable[[], str], store: ResponseStore) -> None:
        self._model = model
        self._store = store

    def prepare(self, data: bytes, caller: Caller) -> bytes:
        return join_request(self._store.earlier(caller.name, data), data)

    def answer(self, reading: Reading, call: Call, caller: Caller) -> "ResponseAnswer":
        return ResponseAnswer(reading, call.request_id, self._model(), caller.name, self._store)

    def error_body(self, problem: HttpProblem) -> dict[str, Any]:
        return error_body(problem)

    def error_event(self, problem: HttpProblem) -> Event:
        error = error_body(problem)["error"]
        data = {"type": "error", "code": error["code"], "message": error["message"], "param": error["param"]}
        return NamedEvent("error", json.dumps(data))


class ResponseAnswer:
    """One response, whole or streamed."""

    def __init__(self, reading: Reading, answer_id: str, model: str, caller: str, store: ResponseStore) -> None:
        self._wishes = reading.presentation
        self._answer_id = answer_id
        self._caller = caller
        self._store = store
        self._number = -1  # of the last event
        self._open: tuple[int, Block] | None = None  # the block that grows
        self._head = {
            "id": f"resp_{answer_id}",
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            **json.loads(self._wishes.response.fields),
        }

    async def whole(self, replies: Replies) -> str:
        end = await whole_reply(self._wishes, replies)
        return json.dumps(self._finish(end))

    async def events(self, replies: Replies) -> AsyncIterator[Event]:
        opened = False
        async for change in block_changes(self._wishes, replies):
            if not opened:
                opened = True
                begun = {**self._head, "status": "in_progress", "output": [], **_NOTHING_YET}
                yield self._event("response.created", response=begun)
                yield self._event("response.in_progress", response=begun)
            if isinstance(change, End):
                for event in self._end(change):
                    yield event
            else:
                for event in self._grow(change):
                    yield event

    def _event(self, kind: str, **fields: Any) -> Event:
        self._number += 1
        return NamedEvent(kind, json.dumps({"type": kind, "sequence_number": self._number, **fields}))

    def _grow(self, change: Change) -> Iterator[Event]:
        if change.is_new:
            if self._open is not None:
                yield from self._close(*self._open, "completed")
            yield from self._begin(change.place, change.block)
        self._open = change.place, change.block
        if change.text:
            place = self._place(change.place, change.block)
            yield self._event(
                f"{_KINDS[change.block.kind]}.delta", **place, delta=change.text, **_logprobs(change.block)
            )

    def _begin(self, index: int, block: Block) -> Iterator[Event]:
        empty = Block(block.kind, name=block.name, call_id=block.call_id)
        item = self._item(index, empty, "in_progress")
        if block.kind != "call":
            item["content"] = []
        yield self._event("response.output_item.added", output_index=index, item=item)
        if block.kind == "said":
            yield self._event("response.content_part.added", **self._place(index, block), part=_part(empty))

    def _close(self, index: int, block: Block, status: str) -> Iterator[Event]:
        place = self._place(index, block)
        if block.kind == "call":
            done = {"arguments": block.text, "name": block.name}
        else:
            done = {"text": block.text, **_logprobs(block)}
        yield self._event(f"{_KINDS[block.kind]}.done", **place, **done)
        if block.kind == "said":
            yield self._event("response.content_part.done", **place, part=_part(block))
        item = self._item(index, block, status)
        yield self._event("response.output_item.done", output_index=index, item=item)

    def _end(self, end: End) -> Iterator[Event]:
        response = self._finish(end)
        if self._open is not None:
            yield from self._close(*self._open, response["status"])
        yield self._event(f"response.{response['status']}", response=response)

    def _place(self, index: int, block: Block) -> dict[str, Any]:
        place = {"item_id": self._item_id(index, block), "output_index": index}
        return place if block.kind == "call" else {**place, "content_index": 0}

    def _item_id(self, index: int, block: Block) -> str:
        return f"{_PREFIXES[block.kind]}_{self._answer_id}_{index}"

    def _item(self, index: int, block: Block, status: str) -> dict[str, Any]:
        head = {"id": self._item_id(index, block), "status": status}
        match block.kind:
            case "thought":
                return {**head, "type": "reasoning", "summary": [], "content": [_part(block)]}
            case "said":
                return {**head, "type": "message", "role": "assistant", "content": [_part(block)]}
            case "call":
                call = {"call_id": block.call_id, "name": block.name, "arguments": block.text}
                return {**head, "type": "function_call", **call}

    def _finish(self, end: End) -> dict[str, Any]:
        """The response; it is stored, if that is wanted."""
        is_cut = end.finished.reason in (FINISH_REASON_LENGTH, FINISH_REASON_ABORT)
        status = "incomplete" if is_cut else "completed"
        output = [self._item(i, block, "completed") for i, block in enumerate(end.blocks)]
        if is_cut and output:
            output[-1]["status"] = "incomplete"
        cut = {"reason": "max_output_tokens"} if is_cut else None
        fields = {**_NOTHING_YET, "incomplete_details": cut, "usage": _usage(end)}
        response = {**self._head, "status": status, "output": output, **fields}
        wishes = self._wishes.response
        if wishes.stores:
            items = ", ".join([*filter(None, [wishes.items[1:-1]]), *map(json.dumps, output)])
            self._store.put(self._caller, response["id"], response=json.dumps(response), items=f"[{items}]")
        return response


def _part(block: Block) -> dict[str, Any]:
    if block.kind == "thought":
        return {"type": "reasoning_text", "text": block.text}
    return {"type": "output_text", "text": block.text, "annotations": [], "logprobs": []}


def _logprobs(block: Block) -> dict[str, Any]:
    return {"logprobs": []} if block.kind == "said" else {}


def _usage(end: End) -> dict[str, Any]:
    usage = end.usage
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_prompt_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        **approximations(usage),
    }

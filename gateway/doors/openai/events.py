"""An answer of OpenAI's API as it grows: the events of a stream."""

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

from echelon.pb.inference_pb2 import Finished, GenerateChunk, GenerateComplete
from gateway.core import Replies
from gateway.doors.json_text import as_list, to_json
from gateway.doors.openai.answers import Answer, Choice
from gateway.doors.openai.logprobs import write_columns

_DONE = "[DONE]"


async def answer_events(answer: Answer, replies: Replies) -> AsyncIterator[str]:
    """The data of each event. Raises Refusal, before the first one or later."""
    events = _Events(answer)
    is_open = False
    async for number, reply in replies:
        if not is_open:
            is_open = True
            for choice in answer.choices.values():
                if (opening := await events.opening(choice)) is not None:
                    yield opening
        if isinstance(reply, GenerateComplete):
            answer.complete(reply)
            for finished in reply.finished:
                for event in events.end(answer.choices[number, finished.index], finished):
                    yield event
        else:
            for event in events.pieces(answer.choices[number, reply.index], reply):
                yield event
    if answer.wishes.include_usage:
        yield events.usage()
    yield _DONE


class _Events:
    """JSON of events. One without anything new is not sent: clients would count it as a token."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._head = json.dumps({**answer.head, "object": answer.shape.event_kind})[:-1]

    async def opening(self, choice: Choice) -> str | None:
        fields = self._answer.shape.opening(choice.echo)
        prompt = await self._answer.prompt_token_ids(choice.number)
        if fields is None and not prompt:
            return None
        return self._event(choice, fields or self._answer.shape.end(), prompt=prompt)

    def pieces(self, choice: Choice, chunk: GenerateChunk) -> Iterator[str]:
        self._answer.count(chunk)
        if not self._answer.wishes.only_echo:
            self._answer.collect(choice, chunk)
            yield from self._said(choice, chunk.text)

    def end(self, choice: Choice, finished: Finished) -> Iterator[str]:
        yield from self._said(choice, "", is_last=True)
        fields = {**self._answer.shape.end(), **self._answer.finish(choice, finished)}
        yield self._event(choice, fields | self._unsent(choice))

    def _said(self, choice: Choice, text: str, *, is_last: bool = False) -> Iterator[str]:
        """What a text brings; the first event also has what was not sent yet."""
        for fields in self._answer.shape.pieces(text, choice.parser, is_last=is_last):
            yield self._event(choice, fields | self._unsent(choice))

    def _unsent(self, choice: Choice) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        if choice.columns:
            fields["logprobs"], choice.columns = write_columns(choice.columns), {}
        if choice.token_ids:
            fields["token_ids"], choice.token_ids = as_list(map(str, choice.token_ids)), []
        if choice.drafted:
            fields["drafted"], choice.drafted = choice.drafted, []
        return fields

    def usage(self) -> str:
        return f'{self._head}, "choices": [], "usage": {json.dumps(self._answer.usage())}}}'

    def _event(self, choice: Choice, fields: dict[str, Any], *, prompt: dict[str, Any] | None = None) -> str:
        fields = {"index": choice.index, "logprobs": None, "finish_reason": None, **fields}
        if not self._answer.shape.has_one_prompt:
            fields |= prompt or {}
        text = f'{self._head}, "choices": [{to_json(fields)}]'
        if self._answer.wishes.continuous_usage:
            text += f', "usage": {json.dumps(self._answer.usage())}'
        elif self._answer.wishes.include_usage:
            text += ', "usage": null'
        if prompt and self._answer.shape.has_one_prompt:
            text += "," + to_json(prompt)[1:-1]
        return text + "}"

"""What both answers of OpenAI's API, whole and streamed, say of a request."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from echelon.pb.inference_pb2 import (
    FINISH_REASON_ABORT,
    FINISH_REASON_LENGTH,
    FINISH_REASON_STOP,
    Finished,
    GenerateChunk,
    GenerateComplete,
    Usage,
)
from echelon.pb.reading_pb2 import Reading
from gateway.doors.approximations import approximations
from gateway.doors.json_text import Written, write_list
from gateway.doors.openai.logprobs import Columns, extend_columns, num_chars
from gateway.doors.openai.shapes import Shape
from gateway.doors.replies.blocks import parser_of
from gateway.doors.replies.reply_parser import ReplyParser

_FINISH_REASONS: dict[int, str] = {
    FINISH_REASON_STOP: "stop",
    FINISH_REASON_LENGTH: "length",
    FINISH_REASON_ABORT: "abort",
}


@dataclass(slots=True)
class Choice:
    """One sample of one prompt."""

    index: int  # among all choices
    number: int  # of its prompt
    echo: str  # the prompt with which its text begins
    num_chars: int  # of the tokens whose log-probabilities were written
    parser: ReplyParser  # of a conversation
    # What has not been sent yet:
    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    drafted: list[bool] = field(default_factory=list)
    columns: Columns = field(default_factory=dict)


class Answer:
    """The choices of an answer to what `reading` asks, and its usage.

    With `created`, seconds since 1970, the answer says nothing that depends on when and beside what its request ran.
    """

    def __init__(
        self, shape: Shape, reading: Reading, *, answer_id: str, model: str, created: int | None = None
    ) -> None:
        self.shape = shape
        self.wishes = reading.presentation
        self.head = {"id": shape.id_prefix + answer_id, "created": created or int(time.time()), "model": model}
        self._is_repeatable = created is not None
        self.choices: dict[tuple[int, int], Choice] = {}  # by the number of the prompt and of the sample
        self._submits = reading.submits
        self._usage = Usage(prompt_tokens=sum(len(submit.prompt_token_ids) for submit in reading.submits))
        for number, submit in enumerate(reading.submits):
            echo = self.wishes.echoes[number].text if self.wishes.echoes else ""
            for sample in range(submit.sampling.n):
                index = len(self.choices)
                parser = parser_of(self.wishes, **self._call_ids(answer_id, index))
                self.choices[number, sample] = Choice(index, number, echo, len(echo), parser)

    def _call_ids(self, answer_id: str, index: int) -> dict[str, Callable[[int], str]]:
        """Of the calls in a choice, if they must not be random."""
        return {"call_id": lambda number: f"call_{answer_id}-{index}-{number}"} if self._is_repeatable else {}

    def wants_logprobs(self, choice: Choice) -> bool:
        return self._submits[choice.number].sampling.HasField("logprobs")

    def count(self, chunk: GenerateChunk) -> None:
        if not self.wishes.only_echo:
            self._usage.completion_tokens += len(chunk.token_ids)

    def complete(self, complete: GenerateComplete) -> None:
        self._usage.cached_prompt_tokens += complete.usage.cached_prompt_tokens
        known = self._usage.approximations
        known.extend(name for name in complete.usage.approximations if name not in known)

    def collect(self, choice: Choice, chunk: GenerateChunk) -> None:
        """Adds a chunk, but for its text, to what has not been sent."""
        if self.wishes.token_ids:
            choice.token_ids.extend(chunk.token_ids)
        if self.wishes.drafted:
            choice.drafted.extend(chunk.drafted)
        if chunk.logprobs:
            start, choice.num_chars = choice.num_chars, choice.num_chars + num_chars(chunk.logprobs)
            extend_columns(choice.columns, self.shape.columns(chunk.logprobs, start))

    def finish(self, choice: Choice, finished: Finished) -> dict[str, Any]:
        """As in vLLM, stop_reason is the stop string or stop token that the client had named."""
        end = _FINISH_REASONS.get(finished.reason)
        if choice.parser.num_calls and end == "stop":
            end = "tool_calls"
        reason: str | int | None = finished.stop_str or None
        if finished.stop_token_id in self._submits[choice.number].sampling.stop_token_ids:
            reason = finished.stop_token_id if finished.HasField("stop_token_id") else reason
        return {"finish_reason": end, "stop_reason": reason}

    def usage(self) -> dict[str, Any]:
        usage = self._usage
        counts: dict[str, Any] = {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            **approximations(usage),
        }
        if not self._is_repeatable:
            counts["prompt_tokens_details"] = {"cached_tokens": usage.cached_prompt_tokens}
        return counts

    async def prompt_token_ids(self, number: int) -> dict[str, Written]:
        """As a field, if they are wanted."""
        if not self.wishes.token_ids:
            return {}
        return {"prompt_token_ids": await write_list(self._submits[number].prompt_token_ids, str)}

"""Output that waits to be delivered. Tokens become chunks only when they are taken, while the engines work."""

from typing import NamedTuple

from checkpoint.token_table import TokenTable
from echelon.pb import sampling_pb2, worker_pb2
from scheduler.requests.outputs import Chunk, Output
from scheduler.requests.request import Seq


class Fresh(NamedTuple):
    """Committed tokens that are not a chunk yet."""

    seq: Seq
    offset: int  # number of output tokens before them
    token_ids: list[int]
    answer: worker_pb2.RowResult | None  # with their log-probabilities, and perhaps those of tokens after the end


class Delivery:
    """Keeps outputs in the order in which they were added."""

    def __init__(self, table: TokenTable) -> None:
        self._table = table
        self._waiting: list[Output | Fresh] = []

    def put(self, output: Output | Fresh) -> None:
        self._waiting.append(output)

    def take(self) -> list[Output]:
        """All that was added since the last call, without empty chunks."""
        outputs: list[Output] = []
        for output in self._waiting:
            if not isinstance(output, Fresh):
                outputs.append(output)
                continue
            chunk = self._chunk(output)
            if chunk.token_ids or chunk.text:
                outputs.append(chunk)
        self._waiting.clear()
        return outputs

    def _chunk(self, fresh: Fresh) -> Chunk:
        logprobs = [] if fresh.answer is None else list(fresh.answer.logprobs)[: len(fresh.token_ids)]
        for entry in logprobs:
            self._add_text(entry)
        num_tokens = len(fresh.token_ids)
        num_drafted = 0 if fresh.answer is None else min(fresh.answer.num_accepted_tokens, num_tokens)
        return Chunk(
            request_id=fresh.seq.request.request_id,
            index=fresh.seq.index,
            offset=fresh.offset,
            token_ids=fresh.token_ids,
            text=fresh.seq.output.take_text(),
            logprobs=logprobs,
            drafted=[True] * num_drafted + [False] * (num_tokens - num_drafted),
        )

    def take_prompt_logprobs(
        self, entries: list[sampling_pb2.PositionLogprobs | None], answer: worker_pb2.RowResult
    ) -> None:
        """Write the log-probabilities of a row's answer into those of its request. Changes `entries`."""
        for position, entry in enumerate(answer.prompt_logprobs, start=answer.prompt_logprobs_start):
            if 1 <= position <= len(entries):
                self._add_text(entry)
                entries[position - 1] = entry

    def _add_text(self, entry: sampling_pb2.PositionLogprobs) -> None:
        for candidate in (entry.chosen, *entry.top):
            candidate.text = self._table.text_of(candidate.token_id)

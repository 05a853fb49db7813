"""What decides a seq's next token besides the logits: its settings and its history."""

import math
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from echelon.pb.sampling_pb2 import SeqSampling
from workers.sampling.grammar import GrammarState

IntArray = NDArray[np.int64]

# Dividing by less would overflow fp32 for large logits; the most likely token has all of the probability anyway.
_GREEDY_BELOW_TEMPERATURE = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCounts:
    """The distinct tokens of a history. Arrays [num_distinct]."""

    token_ids: IntArray
    output_counts: IntArray
    seen: NDArray[np.bool_]  # in the prompt or the output


class _History:
    """Counts of a seq's tokens, updated step by step."""

    def __init__(self, prompt_token_ids: Sequence[int]) -> None:
        distinct = np.unique(np.asarray(prompt_token_ids, dtype=np.int64))
        self._index = {token_id: index for index, token_id in enumerate(distinct.tolist())}
        self._token_ids = distinct
        self._output_counts = np.zeros(len(distinct), dtype=np.int64)
        self._num_prompt_distinct = len(distinct)
        self._output: list[int] = []

    def copy(self) -> "_History":
        twin = copy(self)
        twin._index = self._index.copy()
        twin._token_ids = self._token_ids.copy()
        twin._output_counts = self._output_counts.copy()
        twin._output = self._output.copy()
        return twin

    def extend(self, token_ids: Sequence[int]) -> None:
        index = self._index
        new = [index.setdefault(token_id, len(index)) for token_id in token_ids]
        if len(index) > len(self._token_ids):
            self._grow(len(index))
        for token_id, slot in zip(token_ids, new, strict=True):
            self._token_ids[slot] = token_id
            self._output_counts[slot] += 1
        self._output.extend(token_ids)

    def _grow(self, needed: int) -> None:
        added = np.zeros(max(64, needed, len(self._token_ids)), dtype=np.int64)
        self._token_ids = np.concatenate((self._token_ids, added))
        self._output_counts = np.concatenate((self._output_counts, added))

    def truncate(self, num_output: int) -> None:
        for token_id in self._output[num_output:]:
            self._output_counts[self._index[token_id]] -= 1
        del self._output[num_output:]

    def counts_behind(self, token_ids: Sequence[int]) -> TokenCounts:
        """Counts of the history followed by `token_ids`."""
        num_output = len(self._output)
        self.extend(token_ids)
        num_distinct = len(self._index)
        output_counts = self._output_counts[:num_distinct].copy()
        seen = output_counts > 0
        seen[: self._num_prompt_distinct] = True
        self.truncate(num_output)
        return TokenCounts(token_ids=self._token_ids[:num_distinct], output_counts=output_counts, seen=seen)


class SeqSamplingState:
    """The sampling settings of one seq in the form that batches are built from, with the history that they need.

    `extend` and `truncate` follow the committed history (on a draft engine, together with the chain of its drafts).
    They cost almost nothing unless a penalty is on or the seq has a grammar. Not thread-safe.
    """

    __slots__ = (
        "_history",
        "bias",
        "grammar",
        "length",
        "log_min_p",
        "logprobs",
        "num_prompt_tokens",
        "penalties",
        "sample_index",
        "seed",
        "suppressed",
        "suppressed_before",
        "temperature",
        "top_k",
        "top_p",
        "truncates",
    )

    def __init__(
        self,
        sampling: SeqSampling,
        prompt_token_ids: Sequence[int],
        vocab_size: int,
        grammar: GrammarState | None = None,
    ) -> None:
        # torch has no arithmetic on uint64: the same 64 bits as a signed number.
        self.seed: int = sampling.seed - (1 << 64) if sampling.seed >> 63 else sampling.seed
        self.sample_index: int = sampling.sample_index
        greedy = sampling.temperature < _GREEDY_BELOW_TEMPERATURE
        self.temperature: float = 0.0 if greedy else sampling.temperature
        self.top_k: int = sampling.top_k if sampling.top_k < vocab_size else 0
        self.top_p: float = sampling.top_p
        self.log_min_p: float = math.log(sampling.min_p) if sampling.min_p > 0 else -math.inf
        # The most likely token always stays, so greedy seqs need no truncation.
        self.truncates: bool = not greedy and (self.top_k > 0 or self.top_p < 1 or sampling.min_p > 0)
        self.logprobs: int | None = sampling.logprobs if sampling.HasField("logprobs") else None

        self.num_prompt_tokens: int = len(prompt_token_ids)
        self.length: int = self.num_prompt_tokens
        self.penalties = (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty)
        self._history = _History(prompt_token_ids) if self.penalties != (1.0, 0.0, 0.0) else None
        self.grammar = grammar
        bias = sorted(sampling.logit_bias.items())
        self.bias = (
            np.array([token_id for token_id, _ in bias], dtype=np.int64),
            np.array([value for _, value in bias], dtype=np.float32),
        )
        self.suppressed: IntArray = np.array(sampling.suppressed_token_ids, dtype=np.int64)
        self.suppressed_before: int = self.num_prompt_tokens + sampling.min_tokens  # absolute position

    def edits_logits_at(self, position: int) -> bool:
        """Whether single logits may change before the choice of the token at this absolute position."""
        return (
            self._history is not None
            or self.grammar is not None
            or len(self.bias[0]) > 0
            or len(self.suppressed_at(position)) > 0
        )

    def branch(self, length: int) -> "SeqSamplingState":
        """The same settings after the first `length` tokens. Later changes to either do not affect the other."""
        twin = copy(self)
        if self._history is not None:
            twin._history = self._history.copy()
        if self.grammar is not None:
            twin.grammar = self.grammar.branch()
        twin.truncate(length)
        return twin

    def extend(self, token_ids: Sequence[int]) -> None:
        """Output tokens join the history."""
        self.length += len(token_ids)
        if self._history is not None:
            self._history.extend(token_ids)
        if self.grammar is not None:
            self.grammar.extend(token_ids)

    def truncate(self, length: int) -> None:
        """Cut the history to `length` tokens, prompt included; never into the prompt."""
        assert self.num_prompt_tokens <= length <= self.length, f"cannot cut {self.length} tokens to {length}"
        self.length = length
        if self._history is not None:
            self._history.truncate(length - self.num_prompt_tokens)
        if self.grammar is not None:
            self.grammar.truncate(length - self.num_prompt_tokens)

    def counts_behind(self, hypothetical: Sequence[int]) -> TokenCounts | None:
        """Counts of the history followed by drafted tokens; None if no penalty is on."""
        return None if self._history is None else self._history.counts_behind(hypothetical)

    def suppressed_at(self, position: int) -> IntArray:
        """Token ids that must not be chosen at this absolute position: end tokens before min_tokens."""
        return self.suppressed if position < self.suppressed_before else self.suppressed[:0]

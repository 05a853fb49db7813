"""Many rows are sampled in tiles, with the same result as in a single tile."""

from collections.abc import Callable
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoint.memory import SAMPLING_TILE_ROWS, sampling_bytes
from tests.helpers.rounds import seeded
from tests.helpers.sampling import mixed_states
from tests.helpers.thread_group import ThreadGroup, run_ranks
from workers.collectives import SoloGroup
from workers.engine.engine import ModelRunner
from workers.sampling.rows import RowEntry
from workers.sampling.sampler import SampledRows, Sampler
from workers.sampling.state import SeqSamplingState

VOCAB_SIZE = 131
HIDDEN_SIZE = 16
STATES = mixed_states(VOCAB_SIZE)  # penalties, truncation, bias, masks and logprobs, in an order that repeats
WEIGHT = torch.randn(VOCAB_SIZE, HIDDEN_SIZE, generator=torch.Generator().manual_seed(1))


class Head:
    """An output head that records how many rows it gets. It computes them one by one, so that rounding does not depend
    on the number of rows and results can be compared bit for bit."""

    native = None

    def __init__(self, rank: int, num_ranks: int) -> None:
        shard_size = -(-VOCAB_SIZE // num_ranks)
        self.vocab_range = rank * shard_size, min((rank + 1) * shard_size, VOCAB_SIZE)
        self.config = SimpleNamespace(vocab_size=VOCAB_SIZE)
        self.num_rows: list[int] = []

    def compute_logits(self, hidden: Tensor) -> Tensor:
        self.num_rows.append(len(hidden))
        start, end = self.vocab_range
        return torch.stack([WEIGHT[start:end] @ row for row in hidden])


def runner(group: SoloGroup | ThreadGroup, tile_rows: int) -> tuple[ModelRunner, Head]:
    head: Any = Head(group.rank, group.size)
    made: Any = ModelRunner(
        model=head,
        kv_caches=[],
        kv_addresses=None,  # type: ignore[arg-type]  # nothing is copied
        sampler=Sampler(group, VOCAB_SIZE),
        num_ranks=group.size,
        device=torch.device("cpu"),
        tile_rows=tile_rows,
    )
    return made, head


def choose(group: SoloGroup | ThreadGroup, tile_rows: int, num_rows: int = len(STATES)) -> tuple[SampledRows, Head]:
    made, head = runner(group, tile_rows)
    hidden = torch.randn(num_rows, HIDDEN_SIZE, generator=torch.Generator().manual_seed(2))
    hidden[num_rows // 2] = torch.nan
    entries = [RowEntry(state, state.length + 1, (7,)) for state in STATES[:num_rows]]
    return made.choose(hidden, entries, num_alternatives=2, with_confidence=True), head


def as_lists(sampled: SampledRows) -> list[Any]:
    assert sampled.alternatives is not None
    assert sampled.confidences is not None
    assert sampled.logprobs is not None
    sound = ~sampled.non_finite  # alternatives and confidences of the other rows mean nothing
    logprobs = [None if entry is None else entry.SerializeToString() for entry in sampled.logprobs]
    numbers = sampled.alternatives[sound].tolist(), sampled.confidences[sound].tolist()
    return [sampled.token_ids.tolist(), sampled.non_finite.tolist(), logprobs, *numbers]


@pytest.mark.parametrize("tile_rows", [1, 4, 7, 25])
def test_tiles_give_what_one_large_tile_gives(tile_rows: int) -> None:
    whole, _ = choose(SoloGroup(), len(STATES))
    tiled, head = choose(SoloGroup(), tile_rows)
    assert as_lists(tiled) == as_lists(whole)
    assert any(whole.non_finite)
    assert set(head.num_rows) == {tile_rows}, "a remainder is padded"
    assert len(head.num_rows) == -(-len(STATES) // tile_rows)


def test_ranks_that_share_the_vocabulary_agree_tile_by_tile() -> None:
    whole = run_ranks(2, lambda group: choose(group, len(STATES)))
    tiled = run_ranks(2, lambda group: choose(group, 7))
    for (ours, _), (theirs, _) in zip(tiled, whole, strict=True):
        assert as_lists(ours) == as_lists(theirs) == as_lists(whole[0][0])


@pytest.mark.parametrize("tile_rows", [1, 4, 7, 25])
def test_prompt_logprobs_take_the_same_tiles(tile_rows: int) -> None:
    hidden = torch.randn(26, HIDDEN_SIZE, generator=torch.Generator().manual_seed(3))
    hidden[25] = torch.nan  # in the last tile
    next_token_ids = torch.arange(26) * 5

    def serialized(tile_rows: int) -> tuple[list[bytes], list[int]]:
        made, head = runner(SoloGroup(), tile_rows)
        return [entry.SerializeToString() for entry in made.prompt_logprobs(hidden, next_token_ids, 2)], head.num_rows

    tiled, sizes = serialized(tile_rows)
    assert tiled == serialized(26)[0]
    assert sizes == [tile_rows] * -(-26 // tile_rows), "a remainder is padded"


@pytest.mark.parametrize("num_rows", [13, 26])
def test_a_batch_within_one_tile_is_not_padded(num_rows: int) -> None:
    _, head = choose(SoloGroup(), 26, num_rows)
    assert head.num_rows == [num_rows]


def peak_bytes(call: Callable[[], object]) -> int:
    """The most bytes that tensors take at once during the call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    assert profile.profiler is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(held)


def test_a_round_of_any_size_stays_within_the_reserved_memory() -> None:
    """Every row asks for truncation, penalties and log-probabilities, which takes the most memory."""
    vocab_size, num_rows = 4096, 2304  # 256 seqs with 8 drafts each
    weight = torch.randn(vocab_size, HIDDEN_SIZE)
    head: Any = SimpleNamespace(
        native=None,
        vocab_range=(0, vocab_size),
        config=SimpleNamespace(vocab_size=vocab_size),
        compute_logits=lambda hidden: hidden @ weight.T,
    )
    made = ModelRunner(
        model=head,
        kv_caches=[],
        kv_addresses=None,  # type: ignore[arg-type]  # nothing is copied
        sampler=Sampler(SoloGroup(), vocab_size),
        num_ranks=1,
        device=torch.device("cpu"),
    )
    state = SeqSamplingState(seeded(top_k=20, top_p=0.9, repetition_penalty=1.2, logprobs=1), [1, 2], vocab_size)
    entries = [RowEntry(state, state.length, ()) for _ in range(num_rows)]
    hidden = torch.randn(num_rows, HIDDEN_SIZE)
    reserved = sampling_bytes(vocab_size=vocab_size, num_ranks=1, num_rows=SAMPLING_TILE_ROWS)
    assert reserved / 2 < peak_bytes(lambda: made.choose(hidden, entries)) <= reserved

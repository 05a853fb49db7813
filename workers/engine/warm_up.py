"""Computes a little of everything that an engine may be asked for, so that no request waits for a compiler.

Triton compiles a kernel anew for each kind of launch: its dtypes, its compile-time sizes, and which of its numbers and
addresses are multiples of 16. That takes a second or so, unless an earlier process has left the result in Triton's
cache. So one launch of each kind happens before the engine is ready. cuBLAS and NCCL set themselves up as well.
tests/triton/test_warm_up.py shows that rounds launch no other kinds.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from checkpoint.memory import num_sampled_rows
from checkpoint.sampling_ranges import MAX_LOGPROBS
from echelon.pb.sampling_pb2 import SeqSampling
from echelon.pb.worker_pb2 import MoveOrder, MoveResult
from kernels.dispatch import compiles_kernels
from kernels.sampling.top_keys import NUM_MERGED
from kernels.sampling.verify_chain import verify_chain
from workers.captured.static_rows import NUM_ALTERNATIVES
from workers.engine.engine import ModelRunner, Mover
from workers.engine.lower_draft import MAX_PROPOSED
from workers.engine.seq_state import Limits
from workers.models.batch import new_seqs
from workers.sampling.grammar import GrammarState, TokenBits
from workers.sampling.rows import RowEntry
from workers.sampling.state import SeqSamplingState

OnStep = Callable[[int, int], None]  # done, total
Step = Callable[[], object]

# New tokens of a seq. The rows of a query tile, which are these times the query heads of a KV head, take every size.
_NUM_NEW = (1, 2, 3, 5, 9, 17, 33, 65)
# Full rounds of such seqs: so many tiles that attention and products are divided otherwise.
_NUM_NEW_OF_MANY = (1, 17, 65)
_MANY_FEW_ROWS = 17  # products with weights in few bits have tiles of 16 rows and of more


def warm_up(runner: ModelRunner, limits: Limits, *, verifies: bool, on_step: OnStep = lambda done, total: None) -> None:
    """Does nothing where kernels are not compiled at their launch. Before there are seqs, since it overwrites KV.
    Collective. `verifies`: the model is a target."""
    if not compiles_kernels(runner.device):
        return
    steps: list[Step] = [*_forwards(runner, limits), *_choices(runner, limits, verifies=verifies)]
    steps.append(partial(_verify, runner))
    if not verifies and limits.num_blocks > 1:
        steps.append(partial(runner.copy_blocks, {1: 0}))
    with torch.inference_mode():
        for done, step in enumerate(steps):
            on_step(done, len(steps))
            step()


def warm_up_moves(mover: Mover, device: torch.device) -> None:
    """The same for copies of a block to host memory and back. Raises RuntimeError if they fail."""
    if not compiles_kernels(device):
        return
    for kind in (MoveOrder.STORE, MoveOrder.LOAD):
        moved: Future[MoveResult] = Future()
        mover.submit(MoveOrder(kind=kind, block_ids=[0], host_slots=[0]), moved.set_result)
        if moved.result().failed:
            raise RuntimeError(f"KV blocks cannot be copied to host memory and back: {moved.result().error}")


def _forwards(runner: ModelRunner, limits: Limits) -> Iterator[Step]:
    """Ordinary ones: what is captured has run when it was captured."""
    room = min(limits.max_num_batched_tokens, limits.num_blocks * limits.block_size)
    longest = min(room, limits.max_model_len)

    def forward(num_seqs: int, length: int) -> None:
        batch = new_seqs(num_seqs, length, limits.block_size).to(runner.device)
        runner.model.forward(batch, runner.kv_caches)
        if runner.is_approximate and length <= 1 + MAX_PROPOSED:
            runner.model.draft_forward(batch, runner.kv_caches)

    for length in _up_to(longest, _NUM_NEW):
        yield partial(forward, 1, length)
    for length in _up_to(longest, (*_NUM_NEW_OF_MANY, longest)):
        blocks_of_seq = -(-length // limits.block_size)
        most = min(limits.max_num_batched_tokens // length, limits.num_blocks // blocks_of_seq)
        yield partial(forward, max(1, min(limits.num_slots, most)), length)


def _choices(runner: ModelRunner, limits: Limits, *, verifies: bool) -> Iterator[Step]:
    """Choose tokens with all settings that launch other kernels, for few rows and for many."""
    most = num_sampled_rows(
        verifies=verifies, max_num_seqs=limits.num_slots, max_num_batched_tokens=limits.max_num_batched_tokens
    )

    def choose(num_rows: int, state: SeqSamplingState, num_alternatives: int) -> None:
        model = runner.model
        hidden = torch.zeros(num_rows, model.config.hidden_size, dtype=model.norm.dtype, device=runner.device)
        runner.choose(
            hidden,
            [RowEntry(state, state.length, ())] * num_rows,
            num_alternatives=num_alternatives,
            with_confidence=num_alternatives > 0,
        )

    states = _states(limits.vocab_size)
    for num_rows in _up_to(most, (1, _MANY_FEW_ROWS, most)):
        for state in states:
            for num_alternatives in (0,) if verifies else (0, NUM_ALTERNATIVES):
                yield partial(choose, num_rows, state, num_alternatives)


def _states(vocab_size: int) -> list[SeqSamplingState]:
    def state(grammar: GrammarState | None = None, **settings: object) -> SeqSamplingState:
        sampling = SeqSampling(top_p=1.0, repetition_penalty=1.0, temperature=1.0)
        sampling.MergeFrom(SeqSampling(**settings))  # type: ignore[arg-type]
        return SeqSamplingState(sampling, [0], vocab_size, grammar)

    return [
        state(),
        *(state(top_k=num) for num in NUM_MERGED),  # so many tokens of each shard are compared
        state(top_k=2, top_p=0.9),
        *(state(logprobs=num) for num in (1, MAX_LOGPROBS)),
        state(frequency_penalty=1.0, logit_bias={0: 1.0}, suppressed_token_ids=[0], min_tokens=1),
        state(_AnyToken(vocab_size)),
    ]


class _AnyToken(GrammarState):
    """Costs no compilation of a grammar."""

    def __init__(self, vocab_size: int) -> None:
        self._bits = np.full(-(-vocab_size // 32), -1, np.int32)

    def bits_behind(
        self, drafts: Sequence[int], suppressed: Sequence[int] | NDArray[np.int64] = ()
    ) -> TokenBits | None:
        return self._bits


def _verify(runner: ModelRunner) -> None:
    token_ids = torch.zeros(1, dtype=torch.int64, device=runner.device)
    verify_chain(token_ids, token_ids, torch.arange(2, device=runner.device))


def _up_to(most: int, numbers: Sequence[int]) -> list[int]:
    return sorted({min(number, most) for number in numbers})

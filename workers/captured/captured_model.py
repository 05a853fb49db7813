"""The forwards of an engine and the steps of its draft chains, captured at a few sizes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from checkpoint.captured_sizes import StepSize, fitting
from kernels.attention.paged_kv import SeqLengths
from workers.captured.captured_step import Step, capture_on
from workers.captured.static_batch import StaticBatch
from workers.captured.static_rows import MOST_CHOICES, NUM_ALTERNATIVES, StaticRows, is_plain
from workers.models.batch import Batch, new_seqs
from workers.models.decoder import CausalLM, KVCache
from workers.models.logits import shard_logits
from workers.sampling.rows import RowEntry
from workers.sampling.sampler import SampledRows, Sampler

OnCaptured = Callable[[int, int], None]  # done, total
_MAX_ERROR = 2**-4  # of a probe, relative to the largest hidden state: what a wrong launch exceeds, and bf16 does not


@dataclass(frozen=True, slots=True, order=True)
class _ChainStep:
    num_rows: int
    is_wide: bool  # with alternatives and confidences


class CapturedModel:
    """Computes what ModelRunner asks for by replaying steps, where one has room. Call it in torch.inference_mode.

    The plan of a step is a batch on the host. It is copied into static tensors, then one launch runs the step, then the
    results are in static tensors. Steps run on the caller's stream, one after another.
    """

    def __init__(
        self,
        model: CausalLM,
        kv_caches: list[KVCache],
        sampler: Sampler,
        sizes: Sequence[StepSize],
        *,
        max_blocks: int,
        drafts: bool,
        device: torch.device,
    ) -> None:
        """sizes: of forwards, at least one. max_blocks: of a seq. drafts: capture steps of chains too."""
        self._model = model
        self._kv_caches = kv_caches
        self._sampler = sampler
        self._sizes = sizes
        self._drafts = drafts
        self._device = device
        most = max(sizes)
        num_tokens = max(size.num_tokens for size in sizes)
        self._inputs = StaticBatch(most, num_tokens=num_tokens, max_blocks=max_blocks, device=device)
        self._hidden = torch.zeros(num_tokens, model.config.hidden_size, dtype=model.norm.dtype, device=device)
        self._rows = StaticRows(most.num_seqs, device)
        self._forwards: dict[StepSize, Step] = {}
        self._chains: dict[_ChainStep, Step] = {}

    def capture(self, on_captured: OnCaptured) -> None:
        """Capture all steps, the largest first, since the others then fit into its memory, and compare each forward
        with one that is not captured. Collective. Raises RuntimeError if CUDA refuses or the results differ."""
        capture = capture_on(self._device)
        num_rows = sorted({size.num_seqs for size in self._sizes}, reverse=True) if self._drafts else []
        chains = [_ChainStep(number, is_wide) for number in num_rows for is_wide in (True, False)]
        total = len(self._sizes) + len(chains)
        nothing = _seqs_at([], torch.zeros(0, 0, dtype=torch.int32))  # a capture runs the step a few times
        with torch.inference_mode():
            for done, size in enumerate(sorted(self._sizes, key=lambda size: -size.num_tokens)):
                on_captured(done, total)
                self._inputs.fill(nothing, size)
                self._forwards[size] = capture(lambda size=size: self._forward_step(size))  # type: ignore[misc]
                self._probe(size)
            for done, chain in enumerate(chains, start=len(self._sizes)):
                on_captured(done, total)
                self._inputs.fill(nothing, StepSize(chain.num_rows, 1))
                self._rows.restart()
                self._chains[chain] = capture(lambda chain=chain: self._chain_step(chain))  # type: ignore[misc]

    def forward(self, batch: Batch) -> Tensor | None:
        """Hidden states [num_tokens, hidden_size] of a batch on the host, valid until the next call of any method. None
        if no step has room for it."""
        assert isinstance(batch.lengths, SeqLengths), "the host has planned the batch"
        num_tokens, num_seqs = batch.input_ids.shape[0], batch.seq_lens.shape[0]
        size = fitting(self._forwards, num_seqs=num_seqs, most_new=int(batch.lengths.num_new.max()))
        if size is None:
            return None
        self._inputs.fill(batch, size)
        self._forwards[size]()
        return self._hidden[:num_tokens]

    def draft(
        self, first: SampledRows, entries: Sequence[RowEntry], block_table: Tensor, *, num_steps: int
    ) -> list[SampledRows] | None:
        """Continue chains after their first choices, up to `num_steps` choices in all, with a forward before each of
        the others. block_table: int32 [num_rows, max_blocks], on the host. Waits for the device once.

        Returns the choices on the host, the first ones included, with what these have. A step with logits that are not
        finite is the last. None if no step can do this.
        """
        num_rows, num_steps = len(entries), min(num_steps, MOST_CHOICES)
        size = fitting([StepSize(chain.num_rows, 1) for chain in self._chains], num_seqs=num_rows, most_new=1)
        too_wide = first.alternatives is not None and first.alternatives.shape[1] > NUM_ALTERNATIVES
        if size is None or too_wide or not is_plain(entries):
            return None
        is_wide = first.alternatives is not None or first.confidences is not None
        self._inputs.fill(_seqs_at([entry.position for entry in entries], block_table), size)
        self._rows.fill(entries, size.num_seqs, first)
        replay = self._chains[_ChainStep(size.num_seqs, is_wide)]
        for _ in range(num_steps - 1):
            replay()
        return self._rows.choices(num_steps, num_rows, like=first)

    def _forward_step(self, size: StepSize) -> None:
        hidden = self._model.forward_by_operators(self._inputs.batch(size), self._kv_caches)
        self._hidden[: size.num_tokens].copy_(hidden)

    def _chain_step(self, chain: _ChainStep) -> None:
        batch = self._inputs.batch(StepSize(chain.num_rows, 1))
        _append(batch, self._rows.advance(chain.num_rows), block_size=self._kv_caches[0][0].shape[1])
        hidden = self._model.forward_by_operators(batch, self._kv_caches)
        choices = self._sampler.sample(
            shard_logits(self._model, hidden, self._model.tp_size),
            self._model.vocab_range[0],
            self._rows.rows(chain.num_rows),
            num_alternatives=NUM_ALTERNATIVES if chain.is_wide else 0,
            with_confidence=chain.is_wide,
        )
        self._rows.put(choices)

    def _probe(self, size: StepSize) -> None:
        """Raises RuntimeError if a captured forward is not what the model computes. One seq of several is padding."""
        num_blocks, block_size = self._kv_caches[0][0].shape[:2]
        num_seqs = max(1, min(size.num_seqs - 1, num_blocks // -(-size.max_new // block_size)))
        batch = new_seqs(num_seqs, size.max_new, block_size)
        expected = self._model.forward_by_operators(batch.to(self._device), self._kv_caches)
        found = self.forward(batch)
        assert found is not None, "a size has room for itself"
        error = (found.float() - expected.float()).abs().max() / expected.float().abs().max()
        if not error <= _MAX_ERROR:  # nor NaN
            raise RuntimeError(f"a captured step of {size} is off by {float(error):.3g}")


def _seqs_at(lengths: Sequence[int], block_table: Tensor) -> Batch:
    """Seqs of these lengths, on the host, each with a token that `_append` fills in. block_table: int32 [num_seqs,
    max_blocks]."""
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    bounds = torch.arange(len(lengths) + 1, dtype=torch.int32)
    nothing = torch.zeros(len(lengths), dtype=torch.int64)
    return Batch(
        input_ids=nothing,
        positions=nothing,
        slot_mapping=nothing,
        block_table=block_table,
        seq_lens=seq_lens,
        cu_seqlens_q=bounds,
        lengths=SeqLengths.read(seq_lens, bounds),
    )


def _append(batch: Batch, token_ids: Tensor, *, block_size: int) -> None:
    """Let each seq of the batch grow by a token, which becomes its only new one. Seqs without tokens stay as they are.
    Part of a captured step."""
    is_seq = batch.seq_lens > 0
    positions = batch.seq_lens.to(torch.int64)
    blocks = batch.block_table.gather(1, (positions // block_size).unsqueeze(1)).squeeze(1)
    slots = blocks * block_size + positions % block_size
    batch.input_ids.copy_(token_ids)
    batch.positions.copy_(positions)
    batch.slot_mapping.copy_(torch.where(is_seq, slots, -1))
    batch.seq_lens.add_(is_seq.to(torch.int32))

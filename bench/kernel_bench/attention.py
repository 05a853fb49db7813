"""Attention over a paged cache, compared with torch's on contiguous keys.

The paged cache is read with the blocks of a seq side by side ("neighbours", what the allocator prefers) and in random
order ("scattered"). The others get each seq's keys and values in one contiguous tensor, without padding or paging: SDPA
with its fastest backend and, on a GPU, compiled flex_attention if all seqs have the same length.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from bench.kernel_bench.machine import Machine, Step
from bench.report import Spread, table
from kernels.attention.paged_attention import paged_attention, plan_attention

logger = logging.getLogger(__name__)

BLOCK_SIZE = 16
DTYPE = torch.bfloat16
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    name: str
    num_q_heads: int
    num_kv_heads: int
    head_dim: int = 128

    def __str__(self) -> str:
        return f"{self.name}: {self.num_q_heads} query heads, {self.num_kv_heads} KV heads, head_dim {self.head_dim}"


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    contexts: tuple[int, ...]  # tokens of each seq, the new ones included
    num_new: int = 1

    @classmethod
    def even(cls, batch: int, context: int, num_new: int = 1) -> "AttentionShape":
        return cls(contexts=(context,) * batch, num_new=num_new)

    @property
    def context_name(self) -> str:
        least, most = min(self.contexts), max(self.contexts)
        return str(most) if least == most else f"{least}-{most}"


class AttentionCase:
    """Random queries, keys and values of a shape, for every contender."""

    def __init__(self, shape: AttentionShape, heads: Heads, device: torch.device) -> None:
        self._shape, self._heads, self._device = shape, heads, device
        self._scale = heads.head_dim**-0.5
        contexts, batch = shape.contexts, len(shape.contexts)
        blocks = [-(-context // BLOCK_SIZE) for context in contexts]
        self._num_blocks = sum(blocks)
        random = partial(torch.randn, device=device, dtype=DTYPE)
        self._q = random(batch * shape.num_new, heads.num_q_heads, heads.head_dim)
        cache = (self._num_blocks, BLOCK_SIZE, heads.num_kv_heads, heads.head_dim)
        self._k_cache, self._v_cache = random(cache), random(cache)
        self._seq_lens = torch.tensor(contexts, dtype=torch.int32, device=device)
        new = torch.full((batch,), shape.num_new, dtype=torch.int32, device=device)
        self._cu_seqlens_q = F.pad(new.cumsum(0, dtype=torch.int32), (1, 0))
        self._sdpa_inputs = [self._contiguous(context) for context in contexts]
        if len(set(contexts)) == 1:
            self._sdpa_inputs = [tuple(torch.cat(parts) for parts in zip(*self._sdpa_inputs, strict=True))]
        self._visible = [self._causal(k.shape[2]) for _, k, _ in self._sdpa_inputs]
        self._orders = {"neighbours": torch.arange(self._num_blocks), "scattered": torch.randperm(self._num_blocks)}
        self._blocks = blocks

    @property
    def kv_bytes(self) -> int:
        heads = self._heads
        return 2 * sum(self._shape.contexts) * heads.num_kv_heads * heads.head_dim * DTYPE.itemsize

    def contenders(self) -> dict[str, Step]:
        steps = {name: self.paged(name) for name in self._orders}
        steps["batch_invariant"] = self.paged("neighbours", batch_invariant=True)
        return steps

    def paged(self, pages: str, *, batch_invariant: bool = False) -> Step:
        width = max(self._blocks)
        block_table = torch.zeros(len(self._blocks), width, dtype=torch.int32)
        for row, blocks in zip(block_table, self._orders[pages].int().split(self._blocks), strict=True):
            row[: len(blocks)] = blocks
        block_table = block_table.to(self._device)
        lengths = (block_table, self._seq_lens, self._cu_seqlens_q)
        plan = plan_attention(*lengths, num_tokens=self._q.shape[0], num_blocks=self._num_blocks, block_size=BLOCK_SIZE)
        return partial(
            paged_attention,
            self._q,
            self._k_cache,
            self._v_cache,
            *lengths,
            softmax_scale=self._scale,
            batch_invariant=batch_invariant,
            plan=plan,  # once for all layers of a step
        )

    def sdpa_by_backend(self) -> dict[str, Step]:
        """The backends that take these inputs here."""
        steps: dict[str, Step] = {}
        for name, backend in BACKENDS.items():
            step = partial(self._sdpa, backend)
            try:
                step()
            except RuntimeError:  # what torch raises for a backend that does not take the inputs
                continue
            steps[name] = step
        return steps

    def flex(self) -> Step | None:
        """None where it does not apply, or torch cannot compile it."""
        if self._device.type != "cuda" or len(self._sdpa_inputs) > 1 or self._shape.num_new > 1:
            return None
        torch.compiler.reset()  # it gives up on a function that it has compiled for eight shapes
        compiled = torch.compile(flex_attention, dynamic=False)
        step = partial(compiled, *self._sdpa_inputs[0], scale=self._scale, enable_gqa=True)
        try:
            step()
        except RuntimeError:
            logger.exception("flex_attention does not take %s", self._shape)
            return None
        return step

    def _contiguous(self, context: int) -> tuple[Tensor, ...]:
        """q, k, v of one seq, [1, heads, tokens, head_dim] each."""
        heads = self._heads
        sizes = ((heads.num_q_heads, self._shape.num_new), *((heads.num_kv_heads, context),) * 2)
        return tuple(
            torch.randn(1, count, tokens, heads.head_dim, device=self._device, dtype=DTYPE) for count, tokens in sizes
        )

    def _causal(self, context: int) -> Tensor | None:
        """Which keys a new token sees, bool [num_new, context]; None: all."""
        num_new = self._shape.num_new
        if num_new == 1:
            return None
        return torch.ones(num_new, context, dtype=torch.bool, device=self._device).tril(context - num_new)

    def _sdpa(self, backend: SDPBackend) -> None:
        """One call if all seqs have the same length, else one call per seq."""
        grouped = self._heads.num_q_heads > self._heads.num_kv_heads
        with sdpa_kernel(backend):
            for (q, k, v), visible in zip(self._sdpa_inputs, self._visible, strict=True):
                F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=self._scale, enable_gqa=grouped)


def attention_table(
    shapes: Sequence[AttentionShape], heads: Heads, machine: Machine, *, copy_bytes_per_us: float
) -> str:
    rows = []
    for shape in shapes:
        case = AttentionCase(shape, heads, machine.device)
        ours, sdpa, flex = case.contenders(), case.sdpa_by_backend(), case.flex()
        spreads = machine.time_in_turn([*ours.values(), *sdpa.values(), *([flex] if flex else [])])
        times = dict(zip([*ours, *sdpa, *(["flex"] if flex else [])], spreads, strict=True))
        best = min(sdpa, key=lambda name: times[name].median)
        share = case.kv_bytes / times["scattered"].median / copy_bytes_per_us
        cached = "" if case.kv_bytes > 4 * machine.cache_bytes else " (fits the cache in part)"
        rows.append(
            [
                str(len(shape.contexts)),
                shape.context_name,
                str(shape.num_new),
                *(f"{times[name]:.0f}" for name in ours),
                f"{share:.0%}{cached}",
                f"{times[best]:.0f} {best}",
                f"{times['flex']:.0f}" if flex else "-",
                f"{times[best].median / times['scattered'].median:.2f}x",
            ]
        )
    return table(
        [
            "batch",
            "context",
            "new",
            "neighbours us",
            "scattered us",
            "batch_invariant us",
            "scattered, of copy bandwidth",
            "SDPA us",
            "flex us",
            "SDPA / scattered",
        ],
        rows,
    )


def verify_table(shapes: Sequence[AttentionShape], heads: Heads, machine: Machine, *, num_rows: int) -> str:
    """The time for num_rows new tokens per seq divided by the time for one: the price of verifying drafts."""
    rows = []
    for shape in shapes:
        one, several = (
            AttentionCase(AttentionShape(contexts=shape.contexts, num_new=num_new), heads, machine.device)
            for num_new in (1, num_rows)
        )
        times: list[Spread] = machine.time_in_turn([one.paged("scattered"), several.paged("scattered")])
        ratio = times[1].median / times[0].median
        rows.append(
            [str(len(shape.contexts)), shape.context_name, *(f"{spread:.0f}" for spread in times), f"{ratio:.2f}x"]
        )
    return table(["batch", "context", "1 row us", f"{num_rows} rows us", f"{num_rows} rows / 1 row"], rows)

"""Linear layers split over the ranks of a group (Megatron-LM, arXiv 1909.08053). Weights are [out, in]."""

from dataclasses import dataclass

from torch import Tensor

from kernels.layers.linear import Weight
from workers.layers.context import BuildContext


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnPart:
    """One checkpoint matrix of a fused column-parallel layer: this rank computes features start .. start + size."""

    name: str  # without ".weight" or ".bias"
    out_features: int  # of the whole matrix
    start: int
    size: int


class ColumnParallelLinear:
    """y = x W^T + b, split by outputs: one product for all parts, whose outputs lie side by side."""

    def __init__(self, parts: list[ColumnPart], in_features: int, *, bias: bool, ctx: BuildContext) -> None:
        self._linear = ctx.linear
        num_rows = sum(part.size for part in parts)
        format = ctx.format_of(f"{parts[0].name}.weight")
        weight = ctx.matrix(num_rows, in_features, format)
        self.weight: Weight = weight
        self.bias = ctx.empty(num_rows) if bias else None
        row = 0
        for part in parts:
            rows = slice(row, row + part.size)
            ctx.read(f"{part.name}.weight", (part.out_features, in_features), weight, rows=rows, start=part.start)
            if self.bias is not None:
                ctx.read(f"{part.name}.bias", (part.out_features,), self.bias, rows=rows, start=part.start)
            row += part.size
        ctx.packable(self, format)

    def __call__(self, x: Tensor) -> Tensor:  # [num_tokens, in_features] -> [num_tokens, sum of part sizes]
        return self._linear(x, self.weight, self.bias)


class MergedColumnParallelLinear(ColumnParallelLinear):
    """Several matrices of the same shape, each split evenly: gate and up projection of an MLP."""

    def __init__(self, names: list[str], in_features: int, out_features: int, *, bias: bool, ctx: BuildContext) -> None:
        size = out_features // ctx.group.size
        start = ctx.group.rank * size
        parts = [ColumnPart(name=name, out_features=out_features, start=start, size=size) for name in names]
        super().__init__(parts, in_features, bias=bias, ctx=ctx)


class QKVParallelLinear(ColumnParallelLinear):
    """Query, key and value projection, split by heads. With fewer KV heads than ranks, ranks share KV heads: each rank
    holds the one head that its query heads attend with."""

    def __init__(
        self,
        prefix: str,
        hidden_size: int,
        *,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        bias: bool,
        ctx: BuildContext,
    ) -> None:
        rank, tp_size = ctx.group.rank, ctx.group.size
        self.num_q_heads = num_q_heads // tp_size  # on this rank
        self.num_kv_heads = max(1, num_kv_heads // tp_size)  # on this rank
        first_kv_head = rank * num_kv_heads // tp_size

        def part(name: str, num_heads: int, first_head: int, num_own_heads: int) -> ColumnPart:
            return ColumnPart(
                name=f"{prefix}.{name}",
                out_features=num_heads * head_dim,
                start=first_head * head_dim,
                size=num_own_heads * head_dim,
            )

        parts = [
            part("q_proj", num_q_heads, rank * self.num_q_heads, self.num_q_heads),
            part("k_proj", num_kv_heads, first_kv_head, self.num_kv_heads),
            part("v_proj", num_kv_heads, first_kv_head, self.num_kv_heads),
        ]
        super().__init__(parts, hidden_size, bias=bias, ctx=ctx)


class RowParallelLinear:
    """y = x W^T + b, split by inputs: the partial products are summed over the ranks."""

    def __init__(self, name: str, in_features: int, out_features: int, *, bias: bool, ctx: BuildContext) -> None:
        self._linear = ctx.linear
        self._all_reduce = ctx.group.all_reduce
        size = in_features // ctx.group.size
        format = ctx.format_of(f"{name}.weight")
        weight = ctx.matrix(out_features, size, format)
        self.weight: Weight = weight
        ctx.read(f"{name}.weight", (out_features, in_features), weight, dim=1, start=ctx.group.rank * size)
        self.bias = ctx.replicated(f"{name}.bias", out_features) if bias else None
        ctx.packable(self, format)

    def __call__(self, x: Tensor) -> Tensor:  # [num_tokens, in_features / tp_size] -> [num_tokens, out_features]
        y = self._all_reduce(self._linear(x, self.weight, None))
        return y if self.bias is None else y + self.bias  # after the sum, so that it counts once

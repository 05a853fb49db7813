"""What the operators cost: attention beside torch's SDPA on contiguous keys, and the small operators of one layer.

Attention reads a paged cache, here with the blocks of a seq side by side ("neighbours", what the allocator prefers) and
in random order ("scattered"); SDPA is given each seq's keys and values in one contiguous tensor of its own, padding and
paging left out. All are timed in turn, so that a busy machine slows them alike; medians, with the least and greatest.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.report import Spread, add_report_options, publish, table
from kernels.linear import linear_batch_invariant
from kernels.paged_attention import paged_attention
from kernels.reshape_and_cache import gather_rotary, reshape_and_cache
from kernels.rms_norm import fused_add_rms_norm, rms_norm
from kernels.silu_and_mul import silu_and_mul

BLOCK_SIZE = 16
Step = Callable[[], object]


def time_in_turn(steps: Sequence[Step], *, runs: int, min_run_s: float = 0.02) -> list[Spread]:
    """Microseconds a call of each step: every run times them all, one after the other, for at least min_run_s each."""
    calls = []
    for step in steps:
        step()
        started_s = time.perf_counter()
        step()
        calls.append(max(1, round(min_run_s / (time.perf_counter() - started_s))))
    times_us: list[list[float]] = [[] for _ in steps]
    for _ in range(runs):
        for step, num_calls, step_times_us in zip(steps, calls, times_us, strict=True):
            started_s = time.perf_counter()
            for _ in range(num_calls):
                step()
            step_times_us.append((time.perf_counter() - started_s) / num_calls * 1e6)
    return [Spread.of(times) for times in times_us]


class AttentionCase:
    """`batch` seqs of `context` tokens, the last `num_new` of them new."""

    def __init__(self, batch: int, context: int, num_new: int, *, heads: tuple[int, int], head_dim: int) -> None:
        num_q_heads, num_kv_heads = heads
        blocks_per_seq = -(-context // BLOCK_SIZE)
        num_blocks = batch * blocks_per_seq
        self._scale = head_dim**-0.5
        self._grouped = num_q_heads > num_kv_heads
        self._q = torch.randn(batch * num_new, num_q_heads, head_dim).bfloat16()
        self._k_cache, self._v_cache = torch.randn(2, num_blocks, BLOCK_SIZE, num_kv_heads, head_dim).bfloat16()
        self._tables = {
            "neighbours": torch.arange(num_blocks, dtype=torch.int32).view(batch, -1),
            "scattered": torch.randperm(num_blocks).int().view(batch, -1),
        }
        self._seq_lens = torch.full((batch,), context, dtype=torch.int32)
        self._cu_seqlens_q = torch.arange(0, batch * num_new + 1, num_new, dtype=torch.int32)
        # SDPA wants [batch, heads, tokens, head_dim]; the keys are real copies, one tensor for all seqs.
        self._sdpa_q = self._q.view(batch, num_new, num_q_heads, head_dim).transpose(1, 2).contiguous()
        self._sdpa_k, self._sdpa_v = (
            cache.view(batch, -1, num_kv_heads, head_dim)[:, :context].transpose(1, 2).contiguous()
            for cache in (self._k_cache, self._v_cache)
        )
        positions = torch.arange(context)
        self._visible = positions <= positions[-num_new:].unsqueeze(1) if num_new > 1 else None

    def paged(self, pages: str, *, batch_invariant: bool = False) -> Tensor:
        return paged_attention(
            self._q,
            self._k_cache,
            self._v_cache,
            self._tables[pages],
            self._seq_lens,
            self._cu_seqlens_q,
            softmax_scale=self._scale,
            batch_invariant=batch_invariant,
        )

    def sdpa(self) -> Tensor:
        return F.scaled_dot_product_attention(
            self._sdpa_q,
            self._sdpa_k,
            self._sdpa_v,
            attn_mask=self._visible,
            scale=self._scale,
            enable_gqa=self._grouped,
        )


def attention_table(shapes: Sequence[tuple[int, int, int]], *, heads: tuple[int, int], head_dim: int, runs: int) -> str:
    rows = []
    for batch, context, num_new in shapes:
        case = AttentionCase(batch, context, num_new, heads=heads, head_dim=head_dim)
        neighbours, scattered, invariant, sdpa = time_in_turn(
            [
                partial(case.paged, "neighbours"),
                partial(case.paged, "scattered"),
                partial(case.paged, "neighbours", batch_invariant=True),
                case.sdpa,
            ],
            runs=runs,
        )
        times = [f"{spread:.0f}" for spread in (neighbours, scattered, invariant, sdpa)]
        rows.append([str(batch), str(context), str(num_new), *times, f"{sdpa.median / neighbours.median:.2f}x"])
    return table(
        [
            "batch",
            "context",
            "new",
            "neighbours us",
            "scattered us",
            "batch_invariant us",
            "SDPA us",
            "SDPA / neighbours",
        ],
        rows,
    )


def layer_table(num_rows: Sequence[int], *, heads: tuple[int, int], head_dim: int, runs: int) -> str:
    """The other operators of one layer, beside a matrix product of the same layer."""
    num_q_heads, num_kv_heads = heads
    hidden, intermediate = num_q_heads * head_dim, 4096
    norm_weight = torch.ones(hidden).bfloat16()
    gate_up_weight = torch.randn(2 * intermediate, hidden).bfloat16()
    cos_sin_cache = torch.randn(64, head_dim)
    k_cache, v_cache = torch.zeros(2, 64, BLOCK_SIZE, num_kv_heads, head_dim).bfloat16()
    rows = []
    for count in num_rows:
        x, residual = torch.randn(2, count, hidden).bfloat16()
        gate_up = torch.randn(count, 2 * intermediate).bfloat16()
        q, k, v = torch.split(
            torch.randn(count, num_q_heads + 2 * num_kv_heads, head_dim).bfloat16(),
            [num_q_heads, num_kv_heads, num_kv_heads],
            dim=1,
        )
        slots = torch.arange(count)
        steps: list[Step] = [
            partial(rms_norm, x, norm_weight, 1e-5),
            partial(fused_add_rms_norm, x, residual, norm_weight, 1e-5),
            partial(silu_and_mul, gate_up),
            partial(reshape_and_cache, q, k, v, gather_rotary(cos_sin_cache, slots % 64), slots, k_cache, v_cache),
            partial(F.linear, x, gate_up_weight),
            partial(linear_batch_invariant, x, gate_up_weight),
        ]
        rows.append([str(count), *(f"{spread:.0f}" for spread in time_in_turn(steps, runs=runs))])
    header = [
        "rows",
        "rms_norm us",
        "fused_add us",
        "silu_and_mul us",
        "reshape_and_cache us",
        "F.linear us",
        "invariant us",
    ]
    return table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--num-q-heads", type=int, default=12)
    parser.add_argument("--num-kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=128)
    add_report_options(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    heads = (args.num_q_heads, args.num_kv_heads)
    decode = [(batch, context, 1) for context in (1024, 2048, 4096, 8192) for batch in (1, 2, 4, 8)]
    verify = [(8, 1024, 5), (1, 1024, 8), (1, 4096, 8)]
    prefill = [(1, 512, 512), (1, 2048, 512)]
    with torch.inference_mode():
        attention = attention_table([*decode, *verify, *prefill], heads=heads, head_dim=args.head_dim, runs=args.runs)
        layer = layer_table([1, 8, 64, 512], heads=heads, head_dim=args.head_dim, runs=args.runs)
    shape = f"bf16, {heads[0]} query heads, {heads[1]} KV heads, head_dim {args.head_dim}, {args.threads} threads"
    method = f"{shape}; median (least-greatest) of {args.runs} runs"
    publish(
        "kernels",
        f"{method}\n\n{attention}\n\nThe other operators of a layer\n\n{layer}",
        command="python -m bench.kernels",
        save=args.save,
    )


if __name__ == "__main__":
    main()

"""The other operators of a layer, sampling, and MXFP4 products."""

from collections.abc import Sequence
from functools import partial
from itertools import cycle

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.kernel_bench.attention import BLOCK_SIZE, DTYPE, Heads
from bench.kernel_bench.machine import CACHES_TO_EXCEED, Machine, Step
from bench.report import table
from kernels.kv.reshape_and_cache import gather_rotary, reshape_and_cache
from kernels.layers.linear import linear, linear_batch_invariant, pack_weight
from kernels.layers.mxfp4 import quantize_mxfp4
from kernels.layers.mxfp4_linear import mxfp4_linear
from kernels.layers.rms_norm import fused_add_rms_norm, rms_norm
from kernels.layers.silu_and_mul import silu_and_mul
from kernels.sampling.sample import NoiseKeys, sample
from kernels.sampling.truncation import Truncation
from kernels.sampling.truncation_threshold import truncation_threshold

TOP_K, TOP_P = 50, 0.95


def layer_table(
    num_rows: Sequence[int], heads: Heads, machine: Machine, *, intermediate: int, copy_bytes_per_us: float
) -> str:
    """Operators that move data, with the share of copy bandwidth that they reach, beside torch's where it has one."""
    rows = []
    for count in num_rows:
        steps = _layer_steps(count, heads, machine.device, intermediate=intermediate)
        spreads = machine.time_in_turn([step for step, _ in steps.values()])
        for (name, (_, num_bytes)), spread in zip(steps.items(), spreads, strict=True):
            share = f"{num_bytes / spread.median / copy_bytes_per_us:.0%}" if num_bytes else "-"
            rows.append([str(count), name, f"{spread:.0f}", share])
    return table(["rows", "operator", "us", "of copy bandwidth"], rows)


def linear_table(num_rows: Sequence[int], machine: Machine, *, in_features: int, intermediate: int) -> str:
    """torch's product on a gate and up projection beside ours, for a packed weight and with `batch_invariant`."""
    weight = torch.randn(2 * intermediate, in_features, device=machine.device, dtype=DTYPE)
    packed, invariant = pack_weight(weight), pack_weight(weight, batch_invariant=True)
    rows = []
    for count in num_rows:
        x = torch.randn(count, in_features, device=machine.device, dtype=DTYPE)
        spreads = machine.time_in_turn(
            [partial(F.linear, x, weight), partial(linear, x, packed), partial(linear_batch_invariant, x, invariant)]
        )
        rows.append([str(count), *(f"{spread:.0f}" for spread in spreads)])
    return table(["rows", "F.linear us", "linear us", "linear_batch_invariant us"], rows)


def sample_table(num_rows: int, vocab_size: int, machine: Machine) -> str:
    steps = sample_steps(num_rows, vocab_size, machine.device)
    spreads = machine.time_in_turn(list(steps.values()))
    return table(["settings", "us"], [[name, f"{spread:.0f}"] for name, spread in zip(steps, spreads, strict=True)])


def mxfp4_table(num_rows: Sequence[int], machine: Machine, *, in_features: int, out_features: int) -> str:
    """Weights rotate through copies that exceed the cache, as the layers of a model do."""
    dense_bytes = out_features * in_features * DTYPE.itemsize
    packed_bytes = out_features * in_features * 17 // 32  # half a byte an element, one for the scale of 32
    weight = torch.randn(out_features, in_features, device=machine.device, dtype=DTYPE)
    packed = [quantize_mxfp4(weight)]
    num_copies = _copies(packed_bytes, machine)
    packed += [tuple(part.clone() for part in packed[0]) for _ in range(num_copies - 1)]
    dense = [weight, *(weight.clone() for _ in range(_copies(dense_bytes, machine) - 1))]
    rows = []
    for count in num_rows:
        x = torch.randn(count, in_features, device=machine.device, dtype=DTYPE)
        packed_time, dense_time = machine.time_in_turn(
            [
                _rotating([partial(mxfp4_linear, x, *weights) for weights in packed]),
                _rotating([partial(F.linear, x, weights) for weights in dense]),
            ]
        )
        ratio = dense_time.median / packed_time.median
        rows.append([str(count), f"{packed_time:.0f}", f"{dense_time:.0f}", f"{ratio:.2f}x"])
    return table(["rows", "mxfp4_linear us", "F.linear bf16 us", "F.linear / mxfp4"], rows)


def sample_steps(num_rows: int, vocab_size: int, device: torch.device) -> dict[str, Step]:
    logits = torch.randn(num_rows, vocab_size, device=device) * 4
    temperature = torch.full((num_rows,), 0.8, device=device)
    row = torch.arange(num_rows, device=device)
    keys = NoiseKeys(seeds=row * 7919, sample_indices=torch.zeros_like(row), positions=row + 100)
    truncation = Truncation(
        log_min_p=torch.full((num_rows,), -torch.inf, device=device),
        top_k=torch.full_like(row, TOP_K),
        top_p=torch.full((num_rows,), TOP_P, dtype=torch.float64, device=device),
        max_top_k=TOP_K,
        has_top_p=True,
    )

    def truncated() -> tuple[Tensor, Tensor]:
        thresholds = truncation_threshold(logits, temperature, truncation)
        return sample(logits, temperature, keys, thresholds=thresholds)

    return {
        "greedy": partial(sample, logits, torch.zeros_like(temperature), keys),
        "temperature": partial(sample, logits, temperature, keys),
        f"temperature, top-k {TOP_K}, top-p {TOP_P}": truncated,
        "torch: softmax and multinomial": lambda: torch.multinomial(
            torch.softmax(logits / temperature.unsqueeze(1), dim=1), 1
        ),
        "torch: argmax": partial(torch.argmax, logits, dim=1),
    }


def _layer_steps(
    count: int, heads: Heads, device: torch.device, *, intermediate: int
) -> dict[str, tuple[Step, int | None]]:
    """Each with the bytes that it has to move; None for those beside it."""
    hidden = heads.num_q_heads * heads.head_dim
    x, residual = torch.randn(2, count, hidden, device=device, dtype=DTYPE)
    norm_weight = torch.ones(hidden, device=device, dtype=DTYPE)
    gate_up = torch.randn(count, 2 * intermediate, device=device, dtype=DTYPE)
    sizes = [heads.num_q_heads, heads.num_kv_heads, heads.num_kv_heads]
    fused = torch.randn(count, sum(sizes), heads.head_dim, device=device, dtype=DTYPE)
    q, k, v = torch.split(fused, sizes, dim=1)
    num_blocks = -(-count // BLOCK_SIZE)
    cache = (2, num_blocks, BLOCK_SIZE, heads.num_kv_heads, heads.head_dim)
    k_cache, v_cache = torch.zeros(cache, device=device, dtype=DTYPE)
    slots = torch.arange(count, device=device)
    rotary = gather_rotary(torch.randn(64, heads.head_dim, device=device), slots % 64)
    row_bytes, qkv_bytes = x.numel() * x.element_size(), fused.numel() * fused.element_size()
    return {
        "rms_norm": (partial(rms_norm, x, norm_weight, 1e-5), 2 * row_bytes),
        "F.rms_norm": (partial(F.rms_norm, x, (hidden,), norm_weight, 1e-5), 2 * row_bytes),
        "fused_add_rms_norm": (partial(fused_add_rms_norm, x, residual, norm_weight, 1e-5), 4 * row_bytes),
        "silu_and_mul": (partial(silu_and_mul, gate_up), gate_up.numel() * gate_up.element_size() * 3 // 2),
        "torch silu, mul": (lambda: F.silu(gate_up[:, :intermediate]) * gate_up[:, intermediate:], None),
        "reshape_and_cache": (
            partial(reshape_and_cache, q, k, v, rotary, slots, k_cache, v_cache),
            2 * qkv_bytes + rotary.numel() * rotary.element_size(),
        ),
    }


def _copies(weight_bytes: int, machine: Machine) -> int:
    return 1 + CACHES_TO_EXCEED * machine.cache_bytes // weight_bytes


def _rotating(steps: Sequence[Step]) -> Step:
    """One after the other, a call each."""
    turn = cycle(steps)
    return lambda: next(turn)()

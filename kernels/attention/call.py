"""The tensors and settings of one attention call, and the checks of its arguments."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.kv.fp8 import KVScales


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCall:
    """Arguments of paged_attention, and where its results go."""

    q: Tensor  # [num_tokens, num_q_heads, head_dim]
    k_cache: Tensor  # [num_blocks, block_size, num_kv_heads, head_dim]
    v_cache: Tensor
    block_table: Tensor  # int32 [num_seqs, max_blocks]
    seq_lens: Tensor  # int32 [num_seqs]
    cu_seqlens_q: Tensor  # int32 [num_seqs + 1]
    out: Tensor  # like q, contiguous
    lse: Tensor | None  # fp32 [num_tokens, num_q_heads]
    ancestors: Tensor | None  # int64 [num_tokens]
    softmax_scale: float
    sliding_window: int | None
    kv_scales: KVScales | None = None  # the caches are FP8

    @property
    def num_kv_heads(self) -> int:
        return self.k_cache.shape[2]

    def numbers_of_caches(self) -> tuple[Tensor, Tensor]:
        """The caches as a kernel reads them."""
        if self.kv_scales is None:
            return self.k_cache, self.v_cache
        return self.k_cache.view(torch.float8_e4m3fn), self.v_cache.view(torch.float8_e4m3fn)

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.q.shape[1] // self.k_cache.shape[2]


def check_arguments(call: AttentionCall) -> None:
    """Check shapes, layouts and dtypes. SeqLengths checks the values in the tensors, as far as the host knows them.

    Raises ValueError naming the argument that does not fit.
    """
    q, k_cache = call.q, call.k_cache
    if q.ndim != 3 or q.stride(-1) != 1:
        raise ValueError(
            f"q: expected [num_tokens, num_q_heads, head_dim] with contiguous features, got {list(q.shape)} "
            f"with strides {list(q.stride())}"
        )
    for name, cache in (("k_cache", k_cache), ("v_cache", call.v_cache)):
        if cache.ndim != 4 or cache.shape != k_cache.shape or cache.shape[3] != q.shape[2] or not cache.is_contiguous():
            raise ValueError(
                f"{name}: expected contiguous [num_blocks, block_size, num_kv_heads, {q.shape[2]}], got "
                f"{list(cache.shape)} with strides {list(cache.stride())}"
            )
        expected, why = (q.dtype, "like q") if call.kv_scales is None else (torch.uint8, "with kv_scales")
        if cache.dtype != expected:
            raise ValueError(f"{name}: expected {expected} {why}, got {cache.dtype}")
    if q.shape[1] % k_cache.shape[2]:
        raise ValueError(f"q: expected a multiple of {k_cache.shape[2]} KV heads, got {q.shape[1]} query heads")
    num_seqs = call.seq_lens.numel()
    for name, x, shape in (
        ("seq_lens", call.seq_lens, (num_seqs,)),
        ("cu_seqlens_q", call.cu_seqlens_q, (num_seqs + 1,)),
        ("block_table", call.block_table, (num_seqs, *call.block_table.shape[-1:])),
    ):
        if x.dtype != torch.int32 or x.shape != shape or not _has_dense_rows(x):
            got = f"{x.dtype} {list(x.shape)} with strides {list(x.stride())}"
            raise ValueError(f"{name}: expected int32 {list(shape)}, its rows contiguous, got {got}")
    if call.sliding_window is not None and call.sliding_window < 1:
        raise ValueError(f"sliding_window: expected None or at least 1, got {call.sliding_window}")
    words = call.ancestors
    if words is not None and (words.dtype != torch.int64 or words.shape != q.shape[:1] or not words.is_contiguous()):
        got = f"{words.dtype} {list(words.shape)} with strides {list(words.stride())}"
        raise ValueError(f"ancestors: expected contiguous int64 [{q.shape[0]}], got {got}")


def _has_dense_rows(x: Tensor) -> bool:
    return x.stride(-1) == 1 or x.shape[-1] <= 1

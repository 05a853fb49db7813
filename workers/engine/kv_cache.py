"""How many KV blocks a device holds, and their memory."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.attention.paged_kv import SeqLengths
from workers.models.batch import Batch
from workers.models.decoder import CausalLM
from workers.models.layer_parallel_decoder import LayerParallelLM

KVCaches = list[tuple[Tensor, Tensor]]  # of each layer: k, v [num_blocks, block_size, num_kv_heads, head_dim]


class KVCacheError(ValueError):
    """The memory for KV holds less than it must. Names numbers and remedy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KVLayout:
    """The shape of one rank's KV cache."""

    num_layers: int
    block_size: int
    num_kv_heads: int  # of this rank
    head_dim: int
    dtype: torch.dtype

    @property
    def block_bytes(self) -> int:
        """Bytes of one block: K and V of `block_size` tokens in all layers."""
        return self.num_layers * 2 * self.block_size * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    def allocate(self, num_blocks: int, device: torch.device) -> KVCaches:
        """Zeroed caches: what attention masks out must still be finite, since 0 * NaN is NaN. The keys of all layers
        are consecutive in memory, and so are the values."""
        keys = self._layers(self.num_layers, num_blocks, device)
        values = self._layers(self.num_layers, num_blocks, device)
        return list(zip(keys.unbind(), values.unbind(), strict=True))

    def allocate_shared(self, num_blocks: int, device: torch.device) -> KVCaches:
        """One cache that all layers overwrite: enough to measure how much memory a forward takes."""
        keys, values = self._layers(2, num_blocks, device).unbind()
        return [(keys, values)] * self.num_layers

    def _layers(self, num_layers: int, num_blocks: int, device: torch.device) -> Tensor:
        shape = (num_layers, num_blocks, self.block_size, self.num_kv_heads, self.head_dim)
        return torch.zeros(shape, dtype=self.dtype, device=device)


def check_num_blocks(num_blocks: int, layout: KVLayout, *, num_tokens: int, device: torch.device) -> None:
    """Raises KVCacheError if one sequence of so many tokens needs more blocks."""
    needed = -(-num_tokens // layout.block_size)
    if num_blocks >= needed:
        return
    key = "kv_cache.gpu_memory_utilization" if device.type == "cuda" else "kv_cache.device_bytes"
    raise KVCacheError(
        f"KV cache: memory for {num_blocks} blocks of {layout.block_size} tokens "
        f"({num_blocks * layout.block_bytes:,} bytes a rank), but one sequence of {num_tokens} tokens "
        f"needs {needed} ({needed * layout.block_bytes:,} bytes): raise {key} or lower scheduler.max_model_len"
    )


def activation_bytes(
    model: CausalLM | LayerParallelLM,
    layout: KVLayout,
    *,
    num_tokens: int,
    max_model_len: int,
    device: torch.device,
) -> int:
    """Memory of the largest forward on a GPU, besides weights and KV. Runs one of `num_tokens` to measure it."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    num_blocks = -(-min(num_tokens, max_model_len) // layout.block_size)
    kv_caches = layout.allocate_shared(num_blocks, device)
    with torch.inference_mode():
        model.forward(_dummy_batch(num_tokens, max_model_len, layout.block_size, device), kv_caches)
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del kv_caches
    torch.cuda.empty_cache()
    return peak


def one_block_batch(num_tokens: int, device: torch.device) -> Batch:
    """One seq of so many tokens, in the first block of a cache."""
    return _dummy_batch(num_tokens, num_tokens, num_tokens, device)


def _dummy_batch(num_tokens: int, max_model_len: int, block_size: int, device: torch.device) -> Batch:
    """Seqs of max_model_len tokens, all in the same blocks, that make up `num_tokens`."""
    lengths = torch.tensor([max_model_len] * (num_tokens // max_model_len) + [num_tokens % max_model_len])
    lengths = lengths[lengths > 0].to(torch.int32)
    positions = torch.cat([torch.arange(int(length)) for length in lengths])
    cu_seqlens_q = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    blocks = torch.arange(-(-int(lengths.max()) // block_size), dtype=torch.int32)
    return Batch(
        input_ids=torch.zeros(num_tokens, dtype=torch.int64, device=device),
        positions=positions.to(device),
        slot_mapping=positions.to(device),
        block_table=blocks.repeat(len(lengths), 1).to(device),
        seq_lens=lengths.to(device),
        cu_seqlens_q=cu_seqlens_q.to(device),
        lengths=SeqLengths.read(lengths, cu_seqlens_q),
    )

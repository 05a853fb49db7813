"""Attention of several layers on one device as one batch: each layer's tokens are seqs of their own, whose blocks lie
behind those of the layer before."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.rms_norm import rms_norm
from workers.batch import Batch
from workers.layers.context import BuildContext
from workers.models.config import ModelConfig
from workers.models.decoder import Attention, KVCache, Step, make_step


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionLayer:
    """The attention sublayer: norm and attention."""

    norm: Tensor
    eps: float
    attention: Attention
    sliding_window: int | None

    @classmethod
    def build(cls, layer: int, *, config: ModelConfig, ctx: BuildContext) -> "AttentionLayer":
        prefix = f"model.layers.{layer}"
        return cls(
            norm=ctx.replicated(f"{prefix}.input_layernorm.weight", config.hidden_size),
            eps=config.rms_norm_eps,
            attention=Attention(f"{prefix}.self_attn", layer, config=config, ctx=ctx),
            sliding_window=config.sliding_windows[layer],
        )

    def __call__(self, stream: Tensor, step: Step, kv_cache: KVCache) -> Tensor:  # [num_tokens, hidden_size], twice
        return self.attention(rms_norm(stream, self.norm, self.eps), step, kv_cache)


class Steps:
    """One forward's batch as steps of one layer and of several."""

    def __init__(self, batch: Batch, cos_sin: Tensor, kv_cache: KVCache) -> None:
        self._batch = batch
        self._cos_sin = cos_sin
        self._of_several: dict[int, Step] = {}
        self.of_one = make_step(batch, cos_sin, kv_cache)

    def of_several(self, num_layers: int, kv_cache: KVCache) -> Step:
        """For the caches of so many layers joined into `kv_cache`."""
        if num_layers not in self._of_several:
            num_blocks, block_size = kv_cache[0].shape[:2]
            batch = _repeat(self._batch, num_layers, num_blocks=num_blocks // num_layers, block_size=block_size)
            self._of_several[num_layers] = make_step(batch, self._cos_sin, kv_cache)
        return self._of_several[num_layers]


def attend_at_once(
    layers: Sequence[AttentionLayer], stream: Tensor, steps: Steps, caches: Sequence[KVCache]
) -> Sequence[Tensor]:
    """Each layer's attention on the same stream [num_tokens, hidden_size]: as many of that shape, the same bits on a
    CPU as one by one. Layers whose caches do not lie behind each other, or that see differently far, go one by one."""
    joined = _join(caches)
    if joined is None or len({layer.sliding_window for layer in layers}) > 1:
        return [layer(stream, steps.of_one, cache) for layer, cache in zip(layers, caches, strict=True)]
    projected = [layer.attention.qkv_proj(rms_norm(stream, layer.norm, layer.eps)) for layer in layers]
    heads = zip(*(layer.attention.heads(qkv) for layer, qkv in zip(layers, projected, strict=True)), strict=True)
    q, k, v = (torch.cat(of_layers) for of_layers in heads)  # [num_layers * num_tokens, heads, head_dim]
    step = steps.of_several(len(layers), joined)
    attended = layers[0].attention.attend(q, k, v, step=step, kv_cache=joined).flatten(1)
    outputs = attended.view(len(layers), stream.shape[0], -1)
    return [layer.attention.o_proj(output) for layer, output in zip(layers, outputs, strict=True)]


def _join(caches: Sequence[KVCache]) -> KVCache | None:
    """The blocks of all caches as those of one, without a copy; None unless they lie behind each other in memory."""
    joined = []
    for tensors in zip(*caches, strict=True):
        first = tensors[0]
        storage = first.untyped_storage().data_ptr()
        for index, tensor in enumerate(tensors):
            follows = tensor.data_ptr() == first.data_ptr() + index * first.nbytes
            if not follows or tensor.untyped_storage().data_ptr() != storage:
                return None
        joined.append(first.as_strided((len(tensors) * first.shape[0], *first.shape[1:]), first.stride()))
    return joined[0], joined[1]


def _repeat(batch: Batch, num_layers: int, *, num_blocks: int, block_size: int) -> Batch:
    """The batch once for each layer, in blocks of its own: layer i has i * num_blocks and so on."""
    num_tokens = batch.input_ids.shape[0]
    layer = torch.arange(num_layers, dtype=torch.int32, device=batch.input_ids.device)
    slots = batch.slot_mapping + layer.view(-1, 1) * (num_blocks * block_size)  # [num_layers, num_tokens]
    starts = batch.cu_seqlens_q[:-1] + layer.view(-1, 1) * num_tokens  # [num_layers, num_seqs]
    return Batch(
        input_ids=batch.input_ids.repeat(num_layers),
        positions=batch.positions.repeat(num_layers),
        slot_mapping=torch.where(batch.slot_mapping < 0, -1, slots).flatten(),
        block_table=(batch.block_table + layer.view(-1, 1, 1) * num_blocks).flatten(0, 1),
        seq_lens=batch.seq_lens.repeat(num_layers),
        cu_seqlens_q=torch.nn.functional.pad(starts.flatten(), (0, 1), value=num_layers * num_tokens),
    )

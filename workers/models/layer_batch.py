"""Attention of several layers on one device as one batch: each layer's tokens are seqs of their own, whose blocks
follow those of the layer before."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels.attention.paged_kv import SeqLengths
from kernels.layers.layer_parallel_qkv import layer_parallel_qkv
from kernels.layers.rms_norm import rms_norm
from workers.layers.linear import ColumnParallelLinear, RowParallelLinear
from workers.models.attention_layer import AttentionLayer
from workers.models.batch import Batch
from workers.models.decoder import KVCache, Step, make_step


@dataclass(frozen=True, slots=True, kw_only=True)
class StackedWeights:
    """Weights of a group of layers side by side, so that one launch covers all of them."""

    norm: Tensor  # [num_layers, hidden_size]
    qkv: Tensor  # [num_layers, features, hidden_size]
    qkv_bias: Tensor | None  # [num_layers, features]
    output: Tensor  # [num_layers, hidden_size, features]
    output_bias: Tensor | None  # [num_layers, hidden_size]
    eps: float

    @classmethod
    def of(cls, layers: Sequence[AttentionLayer]) -> "StackedWeights":
        """The layers' own matrices become views of the result, so that each is held once."""
        projections = [layer.attention.qkv_proj for layer in layers]
        outputs = [layer.attention.o_proj for layer in layers]
        return cls(
            norm=torch.stack([layer.norm for layer in layers]),
            qkv=_stack_weights(projections),
            qkv_bias=_stack_biases([projection.bias for projection in projections]),
            output=_stack_weights(outputs),
            output_bias=_stack_biases([output.bias for output in outputs]),
            eps=layers[0].eps,
        )

    def project(self, stream: Tensor) -> Tensor:  # [num_tokens, hidden_size] -> [num_layers, num_tokens, features]
        return layer_parallel_qkv(stream, self.norm, self.qkv, self.qkv_bias, self.eps)

    def combine(self, attended: Tensor) -> Sequence[Tensor]:
        """[num_layers, num_tokens, features] -> one [num_tokens, hidden_size] per layer"""
        y = torch.bmm(attended, self.output.transpose(1, 2))
        return (y if self.output_bias is None else y + self.output_bias.unsqueeze(1)).unbind()


class _OneByOne:
    """The same with the layers' own products: on a CPU they are as fast, and have the bits of a single layer."""

    def __init__(self, layers: Sequence[AttentionLayer]) -> None:
        self._layers = layers

    def project(self, stream: Tensor) -> Tensor:
        return torch.stack(
            [layer.attention.qkv_proj(rms_norm(stream, layer.norm, layer.eps)) for layer in self._layers]
        )

    def combine(self, attended: Tensor) -> Sequence[Tensor]:
        return [layer.attention.o_proj(x) for layer, x in zip(self._layers, attended, strict=True)]


class Steps:
    """One forward's batch as steps of one layer and of several."""

    def __init__(self, batch: Batch, cos_sin: Tensor, kv_cache: KVCache) -> None:
        self._batch = batch
        self._cos_sin = cos_sin
        self._of_several: dict[int, Step] = {}
        self.of_one = make_step(batch, cos_sin, kv_cache)

    def of_several(self, num_layers: int, kv_cache: KVCache) -> Step:
        """The step for the caches of this many layers, joined into `kv_cache`."""
        if num_layers not in self._of_several:
            num_blocks, block_size = kv_cache[0].shape[:2]
            batch = _repeat(self._batch, num_layers, num_blocks=num_blocks // num_layers, block_size=block_size)
            self._of_several[num_layers] = make_step(batch, self._cos_sin, kv_cache)
        return self._of_several[num_layers]


def attend_at_once(
    layers: Sequence[AttentionLayer],
    stream: Tensor,
    steps: Steps,
    caches: Sequence[KVCache],
    stacked: StackedWeights | None,
) -> Sequence[Tensor]:
    """Each layer's attention on the same stream [num_tokens, hidden_size]: one result of that shape per layer. Without
    stacked weights, the bits on a CPU are those of the layers one by one. The layers do run one by one if their caches
    are not consecutive in memory or if their windows differ."""
    joined = _join(caches)
    if joined is None or len({layer.sliding_window for layer in layers}) > 1:
        return [layer(stream, steps.of_one, cache) for layer, cache in zip(layers, caches, strict=True)]
    products = stacked or _OneByOne(layers)
    q, k, v = _heads(layers, products.project(stream))
    step = steps.of_several(len(layers), joined)
    attended = layers[0].attention.attend(q, k, v, step=step, kv_cache=joined)
    return products.combine(attended.view(len(layers), stream.shape[0], -1))


def _heads(layers: Sequence[AttentionLayer], qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [num_layers * num_tokens, heads, head_dim] of [num_layers, num_tokens, features]."""
    if layers[0].attention.q_norm is None:
        return layers[0].attention.heads(qkv.flatten(0, 1))
    parts = [layer.attention.heads(x) for layer, x in zip(layers, qkv, strict=True)]
    q, k, v = (torch.cat(of_layers) for of_layers in zip(*parts, strict=True))
    return q, k, v


def _stack_weights(linears: Sequence[ColumnParallelLinear | RowParallelLinear]) -> Tensor:
    weights = [linear.weight for linear in linears if isinstance(linear.weight, Tensor)]
    assert len(weights) == len(linears), "weights are stacked before they are packed"
    stack = torch.stack(weights)
    for linear, weight in zip(linears, stack, strict=True):
        linear.weight = weight
    return stack


def _stack_biases(biases: Sequence[Tensor | None]) -> Tensor | None:
    present = [bias for bias in biases if bias is not None]
    return torch.stack(present) if present else None


def _join(caches: Sequence[KVCache]) -> KVCache | None:
    """The blocks of all caches as those of one, without a copy; None unless they are consecutive in memory."""
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
    """The batch once for each layer, with blocks of its own: those of layer i start at i * num_blocks."""
    num_tokens = batch.input_ids.shape[0]
    assert isinstance(batch.lengths, SeqLengths), "steps of a layer-parallel draft are not captured"
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
        lengths=_repeat_lengths(batch.lengths, num_layers, num_tokens),
    )


def _repeat_lengths(lengths: SeqLengths, num_layers: int, num_tokens: int) -> SeqLengths:
    starts = lengths.cu_seqlens_q[:-1] + np.arange(num_layers)[:, None] * num_tokens  # [num_layers, num_seqs]
    return SeqLengths(
        seq_lens=np.tile(lengths.seq_lens, num_layers),
        cu_seqlens_q=np.append(starts, num_layers * num_tokens).astype(np.int32),
    )

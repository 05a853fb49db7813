"""The attention sublayer of a layer on its own, so that any rank can compute it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from checkpoint.config import ModelConfig
from kernels.kv.reshape_and_cache import reshape_and_cache
from kernels.layers.rms_norm import rms_norm
from workers.layers.context import BuildContext
from workers.models.decoder import Attention, KVCache, Step


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

    def with_kv(self, stream: Tensor, step: Step, kv_cache: KVCache) -> Tensor:
        """The same, followed by the keys and values that it wrote, as they were before RoPE: flat."""
        q, k, v = self.attention.heads(self.attention.qkv_proj(rms_norm(stream, self.norm, self.eps)))
        output = self.attention.o_proj(self.attention.attend(q, k, v, step=step, kv_cache=kv_cache).flatten(1))
        return torch.cat((output.flatten(), k.flatten(), v.flatten()))


def write_kv(kv: Tensor, step: Step, kv_cache: KVCache) -> None:
    """Write the keys and values of another rank's `with_kv` as that rank did, bit for bit."""
    num_kv_heads, head_dim = kv_cache[0].shape[2:]
    k, v = kv.view(2, step.batch.input_ids.shape[0], num_kv_heads, head_dim)
    no_query = k.new_zeros(k.shape[0], 1, head_dim)
    reshape_and_cache(no_query, k, v, step.rotary, step.batch.slot_mapping, *kv_cache)

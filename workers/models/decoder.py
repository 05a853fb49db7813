"""One decoder for all dense families; ModelConfig holds their differences."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from checkpoint.config import ModelConfig
from kernels.attention.paged_attention import AttentionPlan, paged_attention, plan_attention
from kernels.kv.fp8 import KVScales
from kernels.kv.reshape_and_cache import gather_rotary, reshape_and_cache
from kernels.layers.rms_norm import fused_add_rms_norm, rms_norm
from kernels.layers.silu_and_mul import silu_and_mul
from kernels.native.decoder import NativeDecoder, PackedTokens
from workers.layers.context import BuildContext
from workers.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from workers.layers.rope import cos_sin_cache
from workers.layers.vocab import ParallelLMHead, VocabParallelEmbedding
from workers.models.batch import Batch

KVCache = tuple[Tensor, Tensor]  # keys and values of a layer: [num_blocks, block_size, kv_heads_per_rank, head_dim]


@dataclass(frozen=True, slots=True)
class Step:
    """What all layers of a forward share."""

    batch: Batch
    rotary: Tensor  # of the batch's positions, see gather_rotary
    attention_plan: AttentionPlan


def make_step(batch: Batch, cos_sin: Tensor, kv_cache: KVCache) -> Step:
    """The step of a batch whose layers all have caches shaped like `kv_cache`; cos_sin: see cos_sin_cache."""
    num_blocks, block_size = kv_cache[0].shape[:2]
    plan = plan_attention(
        batch.block_table,
        batch.seq_lens,
        batch.cu_seqlens_q,
        num_tokens=batch.input_ids.shape[0],
        num_blocks=num_blocks,
        block_size=block_size,
        lengths=batch.lengths,
    )
    return Step(batch, gather_rotary(cos_sin, batch.positions), plan)


class Attention:
    """Causal attention over the paged KV cache, to which it adds the batch's tokens."""

    def __init__(self, prefix: str, layer: int, *, config: ModelConfig, ctx: BuildContext) -> None:
        self._head_dim = config.head_dim
        self.sliding_window = config.sliding_windows[layer]
        self._batch_invariant = ctx.batch_invariant
        self._eps = config.rms_norm_eps
        self.qkv_proj = QKVParallelLinear(
            prefix,
            config.hidden_size,
            num_q_heads=config.num_q_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            bias=config.qkv_bias,
            ctx=ctx,
        )
        self._heads = [self.qkv_proj.num_q_heads, self.qkv_proj.num_kv_heads, self.qkv_proj.num_kv_heads]
        q_size = config.num_q_heads * config.head_dim
        self.o_proj = RowParallelLinear(f"{prefix}.o_proj", q_size, config.hidden_size, bias=config.o_bias, ctx=ctx)
        self.q_norm = ctx.replicated(f"{prefix}.q_norm.weight", config.head_dim) if config.qk_norm else None
        self.k_norm = ctx.replicated(f"{prefix}.k_norm.weight", config.head_dim) if config.qk_norm else None
        self.kv_scales: KVScales | None = None  # the cache is in FP8

    def __call__(self, x: Tensor, step: Step, kv_cache: KVCache) -> Tensor:  # [num_tokens, hidden_size], twice
        q, k, v = self.heads(self.qkv_proj(x))
        return self.o_proj(self.attend(q, k, v, step=step, kv_cache=kv_cache).flatten(1))

    def heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split the projection's [num_tokens, features] into queries, keys and values [num_tokens, heads, head_dim]."""
        qkv = qkv.view(qkv.shape[0], -1, self._head_dim)
        q, k, v = torch.split(qkv, self._heads, dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q = rms_norm(q, self.q_norm, self._eps)
            k = rms_norm(k, self.k_norm, self._eps)
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, step: Step, kv_cache: KVCache) -> Tensor:
        """Rotate q and k, write k and v into the cache, and attend. Returns a tensor like q, which is overwritten."""
        batch = step.batch
        k_cache, v_cache = kv_cache
        reshape_and_cache(q, k, v, step.rotary, batch.slot_mapping, k_cache, v_cache, self.kv_scales)
        return paged_attention(
            q,
            k_cache,
            v_cache,
            batch.block_table,
            batch.seq_lens,
            batch.cu_seqlens_q,
            softmax_scale=self._head_dim**-0.5,
            sliding_window=self.sliding_window,
            batch_invariant=self._batch_invariant,
            plan=step.attention_plan,
            kv_scales=self.kv_scales,
        )


class MLP:
    """down(silu(gate(x)) * up(x))"""

    def __init__(self, prefix: str, *, config: ModelConfig, ctx: BuildContext) -> None:
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        names = [f"{prefix}.gate_proj", f"{prefix}.up_proj"]
        self.gate_up_proj = MergedColumnParallelLinear(names, hidden, inner, bias=bias, ctx=ctx)
        self.down_proj = RowParallelLinear(f"{prefix}.down_proj", inner, hidden, bias=bias, ctx=ctx)

    def __call__(self, x: Tensor) -> Tensor:  # [num_tokens, hidden_size], twice
        return self.down_proj(silu_and_mul(self.gate_up_proj(x)))


class DecoderLayer:
    """Attention and MLP, each on the normalised sum of all earlier outputs."""

    def __init__(self, layer: int, *, config: ModelConfig, ctx: BuildContext) -> None:
        prefix = f"model.layers.{layer}"
        self._eps = config.rms_norm_eps
        self.input_norm = ctx.replicated(f"{prefix}.input_layernorm.weight", config.hidden_size)
        self.attention = Attention(f"{prefix}.self_attn", layer, config=config, ctx=ctx)
        self.mlp_norm = ctx.replicated(f"{prefix}.post_attention_layernorm.weight", config.hidden_size)
        self.mlp = MLP(f"{prefix}.mlp", config=config, ctx=ctx)

    def __call__(self, hidden: Tensor, residual: Tensor | None, step: Step, kv_cache: KVCache) -> tuple[Tensor, Tensor]:
        """`hidden` is the last sublayer's output, `residual` the stream without it; both [num_tokens, hidden_size].
        `residual` None: `hidden` is the stream itself."""
        if residual is None:
            hidden, residual = rms_norm(hidden, self.input_norm, self._eps), hidden
        else:
            hidden, residual = fused_add_rms_norm(hidden, residual, self.input_norm, self._eps)
        hidden = self.attention(hidden, step, kv_cache)
        hidden, residual = fused_add_rms_norm(hidden, residual, self.mlp_norm, self._eps)
        return self.mlp(hidden), residual


class CausalLM:
    """This rank's part of a model. Call it under torch.inference_mode; parameters do not change after loading."""

    def __init__(self, config: ModelConfig, *, max_model_len: int, ctx: BuildContext) -> None:
        self.config = config
        self._eps = config.rms_norm_eps
        self.tp_size = ctx.group.size
        self.cos_sin = cos_sin_cache(
            config.rope, head_dim=config.head_dim, num_positions=max_model_len, device=ctx.device
        )
        self.embedding = VocabParallelEmbedding("model.embed_tokens", config.vocab_size, config.hidden_size, ctx=ctx)
        self.layers = [DecoderLayer(layer, config=config, ctx=ctx) for layer in range(config.num_layers)]
        self.norm = ctx.replicated("model.norm.weight", config.hidden_size)
        tied_to = self.embedding.weight if config.tie_word_embeddings else None
        self.head = ParallelLMHead("lm_head", config.vocab_size, config.hidden_size, tied_to=tied_to, ctx=ctx)
        self.weight_bytes = ctx.num_bytes  # on this rank
        self.native: NativeDecoder | None = None  # computes all forwards if set, see workers.models.native_decoder

    @property
    def num_kv_layers(self) -> int:
        """Layers whose keys and values this rank holds."""
        return len(self.layers)

    @property
    def kv_heads_per_rank(self) -> int:
        return self.layers[0].attention.qkv_proj.num_kv_heads

    @property
    def vocab_range(self) -> tuple[int, int]:
        """Token ids [start, end) of this rank's logits."""
        return self.head.vocab_range

    def forward(self, batch: Batch, kv_caches: list[KVCache]) -> Tensor:
        """Final hidden states of all tokens of the batch: [num_tokens, hidden_size] in the model's dtype, the same on
        every rank. Writes the batch's keys and values into `kv_caches`, one entry a layer, in the model's dtype, or in
        FP8 if its layers have scales."""
        if self.native is None:
            return self.forward_by_operators(batch, kv_caches)
        tokens = PackedTokens(
            batch.input_ids,
            batch.positions,
            batch.slot_mapping,
            batch.block_table,
            batch.seq_lens,
            batch.cu_seqlens_q,
        )
        return self.native.forward(tokens, kv_caches)

    def forward_by_operators(self, batch: Batch, kv_caches: list[KVCache]) -> Tensor:
        """`forward` as it reads: one operator after another, with the same bits."""
        return self.forward_by_layers(make_step(batch, self.cos_sin, kv_caches[0]), kv_caches)

    def forward_by_layers(self, step: Step, kv_caches: Iterable[KVCache]) -> Tensor:
        """`forward` of the step's batch. It takes the cache of a layer once the layers before it are computed, so all
        may be the same memory."""
        hidden = self.embedding(step.batch.input_ids)
        residual: Tensor | None = None
        for layer, kv_cache in zip(self.layers, kv_caches, strict=True):
            hidden, residual = layer(hidden, residual, step, kv_cache)
        assert residual is not None, "a model has at least one layer"
        return fused_add_rms_norm(hidden, residual, self.norm, self._eps)[0]

    def draft_forward(self, batch: Batch, kv_caches: list[KVCache]) -> Tensor:
        """For a draft's own tokens, where an approximation is enough: see LayerParallelLM. Here it is `forward`."""
        return self.forward(batch, kv_caches)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Logits of this rank's tokens for chosen rows of `forward`'s result: [rows, hidden_size] -> fp32
        [rows, end - start] with (start, end) = vocab_range. Ranks hold ceil(vocab_size / tp_size) columns each; the
        last ranks may hold fewer. There is no padding."""
        return self.head(hidden)

"""A draft whose attention runs for several consecutive layers at once (EasySpec, arXiv 2502.02493).

In a group of layers a .. b every attention sees the stream s that enters the group, while the MLPs follow in order on
the true stream:

    A_i = attention_i(norm_i(s))  for all i of the group, at once: a rank each, or as one batch
    for i = a .. b:   s = s + A_i;   s = s + mlp_i(norm'_i(s))

With groups of one layer this is the ordinary model, so the exact and the approximate forward share their code. If
each layer of a group has its own rank, one all_gather carries all A_i. All other work runs alike on every rank, so all
ranks have the same stream, bit for bit.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from checkpoint.config import ModelConfig
from checkpoint.layer_parallel import LayerGroups
from kernels.layers.rms_norm import fused_add_rms_norm, rms_norm
from workers.collectives import SoloGroup
from workers.layers.context import BuildContext
from workers.layers.rope import cos_sin_cache
from workers.layers.vocab import ParallelLMHead, VocabParallelEmbedding, vocab_range
from workers.models.attention_layer import AttentionLayer, write_kv
from workers.models.batch import Batch
from workers.models.decoder import MLP, KVCache
from workers.models.layer_batch import StackedWeights, Steps, attend_at_once
from workers.models.layer_groups import LayerParallelPlan, MLPs, Weights, one_by_one


@dataclass(frozen=True, slots=True, kw_only=True)
class MLPLayer:
    norm: Tensor
    mlp: MLP


class LayerParallelLM:
    """This rank's part of a draft; the model is that of CausalLM. Call it under torch.inference_mode.

    The head is split over the ranks by vocabulary, because it is the largest matrix of a small draft. The embedding is
    whole if weights are replicated: a tied head is then a part of it, and looking up needs no communication. If weights
    are sharded, it is split like the head.
    """

    native: None = None  # no forward of it is one call

    def __init__(self, config: ModelConfig, plan: LayerParallelPlan, *, max_model_len: int, ctx: BuildContext) -> None:
        self.config = config
        self.plan = plan
        self._eps = config.rms_norm_eps
        self._group = ctx.group
        self._owners = plan.owners()
        self._is_sharded = plan.num_ranks > 1 and plan.weights is Weights.SHARDED
        self._cos_sin = cos_sin_cache(
            config.rope, head_dim=config.head_dim, num_positions=max_model_len, device=ctx.device
        )
        whole = ctx.over(SoloGroup())
        vocab_size, hidden_size = config.vocab_size, config.hidden_size
        embedding_ctx = ctx if self._is_sharded else whole
        self.embedding = VocabParallelEmbedding("model.embed_tokens", vocab_size, hidden_size, ctx=embedding_ctx)
        self.attention_layers = self._build_attention(whole)  # those that this rank holds, by layer
        self.mlp_layers = self._build_mlps(ctx if plan.mlps is MLPs.TENSOR_PARALLEL else whole)
        self.norm = ctx.replicated("model.norm.weight", hidden_size)
        tied_to = self._own_vocab_rows(ctx) if config.tie_word_embeddings else None
        self.head = ParallelLMHead("lm_head", vocab_size, hidden_size, tied_to=tied_to, ctx=ctx)
        self._cache_index = {layer: index for index, layer in enumerate(self.attention_layers)}
        self._stacked: dict[tuple[int, ...], StackedWeights] = {}  # by group
        self._exact_groups = one_by_one(config.num_layers)
        self.weight_bytes = ctx.num_bytes  # on this rank

    @property
    def num_kv_layers(self) -> int:
        """Layers whose keys and values this rank holds."""
        return len(self.attention_layers)

    @property
    def kv_heads_per_rank(self) -> int:
        return self.config.num_kv_heads

    @property
    def vocab_range(self) -> tuple[int, int]:
        """Token ids [start, end) of this rank's logits."""
        return self.head.vocab_range

    def stack_weights(self) -> None:
        """Let one launch cover the weights of all layers of a group. For a single rank, after loading; the weights must
        not be packed."""
        assert self.plan.num_ranks == 1, "a rank of several computes one layer of a group"
        for group in self.plan.groups:
            if len(group) > 1:
                self._stacked[group] = StackedWeights.of([self.attention_layers[layer] for layer in group])

    def forward(self, batch: Batch, kv_caches: list[KVCache]) -> Tensor:
        """The exact model: see CausalLM.forward. `kv_caches` has an entry for each layer that this rank holds."""
        return self._run(self._exact_groups, batch, kv_caches)

    def draft_forward(self, batch: Batch, kv_caches: list[KVCache]) -> Tensor:
        """The approximate model. The keys and values that it writes are approximate too, until an exact forward of the
        same tokens replaces them."""
        return self._run(self.plan.groups, batch, kv_caches)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """As CausalLM.compute_logits, with num_ranks in place of tp_size."""
        return self.head(hidden)

    def _build_attention(self, ctx: BuildContext) -> dict[int, AttentionLayer]:
        return {
            layer: AttentionLayer.build(layer, config=self.config, ctx=ctx)
            for layer, owner in enumerate(self._owners)
            if not self._is_sharded or owner == self._group.rank
        }

    def _build_mlps(self, ctx: BuildContext) -> list[MLPLayer]:
        layers = []
        for layer in range(self.config.num_layers):
            prefix = f"model.layers.{layer}"
            norm = ctx.replicated(f"{prefix}.post_attention_layernorm.weight", self.config.hidden_size)
            layers.append(MLPLayer(norm=norm, mlp=MLP(f"{prefix}.mlp", config=self.config, ctx=ctx)))
        return layers

    def _own_vocab_rows(self, ctx: BuildContext) -> Tensor:
        if self._is_sharded:
            return self.embedding.weight
        start, end = vocab_range(self.config.vocab_size, ctx.group.rank, ctx.group.size)
        return self.embedding.weight[start:end]

    def _run(self, groups: LayerGroups, batch: Batch, kv_caches: list[KVCache]) -> Tensor:
        stream = self.embedding(batch.input_ids)  # [num_tokens, hidden_size]
        steps = Steps(batch, self._cos_sin, kv_caches[0])
        for group in groups:
            for layer, attended in zip(group, self._attend(group, stream, steps, kv_caches), strict=True):
                mlp_layer = self.mlp_layers[layer]
                x, stream = fused_add_rms_norm(attended, stream, mlp_layer.norm, self._eps)
                stream.add_(mlp_layer.mlp(x))
        return rms_norm(stream, self.norm, self._eps)

    def _attend(
        self, group: tuple[int, ...], stream: Tensor, steps: Steps, kv_caches: list[KVCache]
    ) -> Sequence[Tensor]:
        """The outputs of the group's attentions, [num_tokens, hidden_size] each, on every rank."""
        if self.plan.num_ranks == 1 or (len(group) == 1 and not self._is_sharded):
            return self._attend_here(group, stream, steps, kv_caches)
        owners = [self._owners[layer] for layer in group]
        if not self._is_sharded:
            return self._attend_and_share(group, owners, stream, steps, kv_caches)
        mine = self._own_layer(group)
        output = torch.empty_like(stream) if mine is None else self._attend_here((mine,), stream, steps, kv_caches)[0]
        if len(group) == 1:
            return [self._group.broadcast(output, owners[0])]
        gathered = self._group.all_gather(output)  # [num_ranks, num_tokens, hidden_size]
        return [gathered[owner] for owner in owners]

    def _attend_and_share(
        self, group: tuple[int, ...], owners: list[int], stream: Tensor, steps: Steps, kv_caches: list[KVCache]
    ) -> Sequence[Tensor]:
        """As _attend, when every rank holds all layers: keys and values travel with the outputs. So the caches of all
        ranks hold the same, and each can continue from there, exactly or not."""
        mine = self._own_layer(group)
        kv_size = 2 * stream.shape[0] * self.config.num_kv_heads * self.config.head_dim
        if mine is None:
            own = stream.new_empty(stream.numel() + kv_size)
        else:
            own = self.attention_layers[mine].with_kv(stream, steps.of_one, kv_caches[mine])
        gathered = self._group.all_gather(own)
        for layer, owner in zip(group, owners, strict=True):
            if layer != mine:
                write_kv(gathered[owner, stream.numel() :], steps.of_one, kv_caches[layer])
        return [gathered[owner, : stream.numel()].view(stream.shape) for owner in owners]

    def _own_layer(self, group: tuple[int, ...]) -> int | None:
        return next((layer for layer in group if self._owners[layer] == self._group.rank), None)

    def _attend_here(
        self, layers: tuple[int, ...], stream: Tensor, steps: Steps, kv_caches: list[KVCache]
    ) -> Sequence[Tensor]:
        parts = [self.attention_layers[layer] for layer in layers]
        caches = [kv_caches[self._cache_index[layer]] for layer in layers]
        if len(parts) > 1:
            return attend_at_once(parts, stream, steps, caches, self._stacked.get(layers))
        return [parts[0](stream, steps.of_one, caches[0])]

"""Layer-parallel drafts: deep tiny models, the readable reference, and what ranks run. Does not import transformers, so
that ranks start quickly."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed import ProcessGroup

from checkpoint.layer_parallel import LayerGroups
from kernels.layers.rms_norm import rms_norm
from tests.helpers.paged import BLOCK_SIZE, PagedRunner
from workers.collectives import Group, SoloGroup, TorchGroup
from workers.engine.kv_cache import KVLayout
from workers.layers.rope import cos_sin_cache
from workers.models.batch import Batch
from workers.models.decoder import CausalLM, KVCache, make_step
from workers.models.layer_groups import LayerParallelPlan, MLPs, Weights
from workers.models.layer_parallel_decoder import LayerParallelLM
from workers.models.loading import load_layer_parallel_model, load_model

MAX_MODEL_LEN = 48
NUM_LAYERS = 7
CPU = torch.device("cpu")

# By lp_size: the first and the last layer alone, the others in groups; with 3, the last group is shorter.
GROUPS: dict[int, LayerGroups] = {
    1: ((0,), (1,), (2,), (3,), (4,), (5,), (6,)),
    2: ((0,), (1, 2), (3, 4), (5,), (6,)),
    3: ((0,), (1, 2, 3), (4, 5), (6,)),
    4: ((0,), (1, 2, 3, 4), (5,), (6,)),
}
PROMPTS = [[3, 14, 15, 92, 65, 35, 89], [2], [71, 82, 81, 82], [1, 61, 80, 33, 98, 87, 49, 89, 48]]

_BASE = {
    "vocab_size": 103,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100.0,
    "hidden_act": "silu",
}
CONFIGS = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "llama-tied": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": True},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": True},
    "qwen2-window": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 3,  # layers of one group differ
    },
}


def write_deep_model(folder: Path, name: str, **changes: object) -> Path:
    """Writes one of CONFIGS with random weights, large enough for every layer to matter in the sum."""
    config = {**_BASE, **CONFIGS[name], **changes}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)

    def random(tensor: str, shape: tuple[int, ...]) -> Tensor:
        center = 1.0 if "norm" in tensor else 0.0
        return center + 0.2 * torch.randn(shape, generator=generator)

    save_file(
        {tensor: random(tensor, shape) for tensor, shape in _shapes(config).items()}, folder / "model.safetensors"
    )
    return folder


def _shapes(config: dict[str, object]) -> dict[str, tuple[int, ...]]:
    sizes = {key: int(value) for key, value in config.items() if isinstance(value, int)}
    hidden, inner, head_dim = sizes["hidden_size"], sizes["intermediate_size"], sizes["head_dim"]
    q, kv = sizes["num_attention_heads"] * head_dim, sizes["num_key_value_heads"] * head_dim
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (q, hidden),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.o_proj.weight": (hidden, q),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    family = config["model_type"]
    if family == "qwen3":
        layer |= {"self_attn.q_norm.weight": (head_dim,), "self_attn.k_norm.weight": (head_dim,)}
    if family == "qwen2" or config.get("attention_bias"):
        layer |= {f"self_attn.{part}_proj.bias": (size,) for part, size in (("q", q), ("k", kv), ("v", kv))}
    if family == "qwen3" and config.get("attention_bias"):
        layer |= {"self_attn.o_proj.bias": (hidden,)}
    shapes = {"model.embed_tokens.weight": (sizes["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (sizes["vocab_size"], hidden)
    for index in range(sizes["num_hidden_layers"]):
        shapes |= {f"model.layers.{index}.{tensor}": shape for tensor, shape in layer.items()}
    return shapes


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    folder: Path
    lp_size: int
    num_ranks: int
    weights: Weights = Weights.REPLICATED
    mlps: MLPs = MLPs.REPLICATED
    dtype: torch.dtype = torch.float32
    batch_invariant: bool = False
    groups: LayerGroups | None = None  # None: those of GROUPS

    def load(self, group: Group) -> LayerParallelLM:
        plan = LayerParallelPlan(
            groups=self.groups or GROUPS[self.lp_size],
            lp_size=self.lp_size,
            num_ranks=self.num_ranks,
            weights=self.weights,
            mlps=self.mlps,
        )
        return load_layer_parallel_model(
            self.folder,
            plan,
            dtype=self.dtype,
            device=CPU,
            group=group,
            max_model_len=MAX_MODEL_LEN,
            batch_invariant=self.batch_invariant,
        )

    def load_exact(self) -> CausalLM:
        """Loads the ordinary model on one rank."""
        return load_model(
            self.folder,
            dtype=self.dtype,
            device=CPU,
            group=SoloGroup(),
            max_model_len=MAX_MODEL_LEN,
            batch_invariant=self.batch_invariant,
        )


DraftForward = Callable[[Batch, list[KVCache]], Tensor]


class DraftRunner(PagedRunner):
    """A few seqs in a draft, with the caches that a worker would allocate, full of NaN."""

    def __init__(self, model: CausalLM | LayerParallelLM, *, num_seqs: int, dtype: torch.dtype) -> None:
        super().__init__(model, num_seqs=num_seqs, max_len=MAX_MODEL_LEN, dtype=dtype)  # type: ignore[arg-type]
        layout = KVLayout(
            num_layers=model.num_kv_layers,
            block_size=BLOCK_SIZE,
            num_kv_heads=model.kv_heads_per_rank,
            head_dim=model.config.head_dim,
            dtype=dtype,
        )
        self.kv_caches = layout.allocate(self.kv_caches[0][0].shape[0], CPU)
        for tensors in self.kv_caches:
            for tensor in tensors:
                tensor.fill_(torch.nan)

    def draft(self, chunks: dict[int, list[int]], draft_forward: DraftForward) -> Tensor:
        with torch.inference_mode():
            return draft_forward(self.batch(chunks), self.kv_caches)

    def kv_of(self, seq: int) -> list[Tensor]:
        """Keys, then values, of each layer on this rank: [len, num_kv_heads, head_dim]."""
        blocks = torch.tensor(self.block_tables[seq])
        return [tensor[blocks].flatten(0, 1)[: self.lens[seq]] for tensors in self.kv_caches for tensor in tensors]


def reference_draft_forward(model: CausalLM, groups: LayerGroups) -> DraftForward:
    """The definition, written with the ordinary model's parts: each attention of a group gets the group's input."""
    config = model.config
    eps = config.rms_norm_eps
    cos_sin = cos_sin_cache(config.rope, head_dim=config.head_dim, num_positions=MAX_MODEL_LEN, device=CPU)

    def forward(batch: Batch, kv_caches: list[KVCache]) -> Tensor:
        stream = model.embedding(batch.input_ids)
        step = make_step(batch, cos_sin, kv_caches[0])
        for group in groups:
            outputs = [
                model.layers[i].attention(rms_norm(stream, model.layers[i].input_norm, eps), step, kv_caches[i])
                for i in group
            ]
            for i, output in zip(group, outputs, strict=True):
                stream = stream + output
                stream = stream + model.layers[i].mlp(rms_norm(stream, model.layers[i].mlp_norm, eps))
        return rms_norm(stream, model.norm, eps)

    return forward


# Rounds of a draft with four seqs, each with its own progress: how many exact and then approximate tokens each seq
# gets, and how many of these are calibrated in the next round; the rest is dropped.
ROUNDS = [({0: 3, 1: 3, 2: 1, 3: 2}, {0: 3, 1: 1, 2: 0, 3: 2}), ({0: 1, 2: 3, 3: 3}, {0: 0, 2: 2, 3: 3})]


def draft_rounds(runner: DraftRunner, draft_forward: DraftForward) -> list[Tensor]:
    """Runs prompts, then ROUNDS of approximate steps with a calibration after each. Returns hidden states of all
    forwards."""
    runner_tokens = [list(prompt) for prompt in PROMPTS]
    hidden = [runner.forward(dict(enumerate(runner_tokens)))]
    for num_drafts, num_kept in ROUNDS:
        before = list(runner.lens)
        for step in range(max(num_drafts.values())):
            chunk = {seq: [7 * seq + 5 * step + 1] for seq, count in num_drafts.items() if step < count}
            for seq, token_ids in chunk.items():
                runner_tokens[seq] += token_ids
            hidden.append(runner.draft(chunk, draft_forward))
        for seq in num_drafts:
            kept = before[seq] + num_kept[seq]
            runner_tokens[seq] = [*runner_tokens[seq][:kept], 11 + seq]
            runner.lens[seq] = before[seq]
        hidden.append(runner.forward({seq: runner_tokens[seq][before[seq] :] for seq in num_drafts}))
    return hidden


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The results of draft_rounds on one rank, and of the exact model on the same tokens."""

    hidden: list[Tensor]
    logits: Tensor  # of the last hidden states: this rank's tokens
    kv: list[list[Tensor]]  # of each seq, at the end
    approximate_kv: list[list[Tensor]]  # of each seq after another round of approximate steps
    fresh_kv: list[list[Tensor]]  # of a prefill of the same tokens in one piece
    weight_bytes: int
    num_kv_layers: int


def run_case(group: Group, case: Case) -> Outcome:
    model = case.load(group)
    runner = DraftRunner(model, num_seqs=len(PROMPTS), dtype=case.dtype)
    hidden = draft_rounds(runner, model.draft_forward)
    with torch.inference_mode():
        logits = model.compute_logits(hidden[-1])
    kv = [runner.kv_of(seq) for seq in range(len(PROMPTS))]
    for step in range(2):
        runner.draft({seq: [17 + step] for seq in range(len(PROMPTS))}, model.draft_forward)
    approximate_kv = [runner.kv_of(seq) for seq in range(len(PROMPTS))]
    fresh = DraftRunner(model, num_seqs=len(PROMPTS), dtype=case.dtype)
    for seq, token_ids in enumerate(final_tokens()):
        fresh.forward({seq: token_ids})
    return Outcome(
        hidden=hidden,
        logits=logits,
        kv=kv,
        approximate_kv=approximate_kv,
        fresh_kv=[fresh.kv_of(seq) for seq in range(len(PROMPTS))],
        weight_bytes=model.weight_bytes,
        num_kv_layers=model.num_kv_layers,
    )


def final_tokens() -> list[list[int]]:
    """The tokens of each seq that draft_rounds has computed in the end."""
    tokens = [list(prompt) for prompt in PROMPTS]
    for num_drafts, num_kept in ROUNDS:
        for seq in num_drafts:
            tokens[seq] += [*(7 * seq + 5 * step + 1 for step in range(num_kept[seq])), 11 + seq]
    return tokens


def reference(case: Case) -> list[Tensor]:
    """Hidden states of draft_rounds by the definition, in this process."""
    model = case.load_exact()
    runner = DraftRunner(model, num_seqs=len(PROMPTS), dtype=case.dtype)
    return draft_rounds(runner, reference_draft_forward(model, case.groups or GROUPS[case.lp_size]))


def run_on_rank(process_group: ProcessGroup, cases: Sequence[Case]) -> list[Outcome]:
    """Runs, on one of several processes, the cases for that number of ranks."""
    return [run_case(TorchGroup(process_group, ordered_sum=case.batch_invariant), case) for case in cases]

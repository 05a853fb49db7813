"""Tiny checkpoints of every model family with random parameters, and what transformers computes with them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, MistralConfig, PreTrainedModel, Qwen2Config, Qwen3Config
from transformers.models.llama import LlamaForCausalLM
from transformers.models.mistral import MistralForCausalLM
from transformers.models.qwen2 import Qwen2ForCausalLM
from transformers.models.qwen3 import Qwen3ForCausalLM

MAX_MODEL_LEN = 64
SEQ_LENS = (12, 1, 9, 5)  # of the seqs that parity tests pack into one batch

# Sizes that reveal mix-ups: head_dim is not hidden / heads, and the vocabulary does not divide by 2 or 4.
_SIZES: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 24,
    "max_position_embeddings": MAX_MODEL_LEN,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}


def _llama(**settings: Any) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**{**_SIZES, **settings}))


def _mistral(**settings: Any) -> PreTrainedModel:
    return MistralForCausalLM(MistralConfig(**{**_SIZES, **settings}))


def _qwen2(**settings: Any) -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(**{**_SIZES, **settings}))


def _qwen3(**settings: Any) -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**{**_SIZES, **settings}))


# Settings replace those of the family.
FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {
    "llama": partial(_llama, num_key_value_heads=2, rope_parameters=_LLAMA3),
    "llama-biases-tied": partial(
        _llama,
        num_key_value_heads=4,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1000.0},
    ),
    "mistral-window": partial(_mistral, num_key_value_heads=1, sliding_window=7),
    "mistral": partial(_mistral, num_key_value_heads=2, sliding_window=None),
    "qwen2-window": partial(
        _qwen2,
        num_key_value_heads=2,
        rope_parameters=_YARN,
        use_sliding_window=True,
        sliding_window=6,
        max_window_layers=1,
    ),
    "qwen3-tied": partial(_qwen3, num_key_value_heads=2, tie_word_embeddings=True, attention_bias=True),
    "qwen3": partial(_qwen3, num_key_value_heads=1),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyModel:
    folder: Path
    token_ids: list[list[int]]  # of each seq
    logits: list[Tensor]  # fp32 [len, vocab_size], of each seq, by transformers


def randomize(model: PreTrainedModel, seed: int) -> None:
    """Gives every parameter a standard deviation of 0.2. Initially biases are 0 and norms 1, so a model that ignores
    them would pass."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            center = 1.0 if "norm" in name else 0.0
            parameter.copy_(center + 0.2 * torch.randn(parameter.shape, generator=generator))


def make_tiny_model(family: str, folder: Path, seed: int = 0, **settings: Any) -> TinyModel:
    model = FAMILIES[family](**settings).eval()
    randomize(model, seed)
    model.save_pretrained(folder)
    generator = torch.Generator().manual_seed(seed + 1)
    vocab_size = model.config.vocab_size
    token_ids = [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in SEQ_LENS]
    return TinyModel(folder=folder, token_ids=token_ids, logits=[reference_logits(model, ids) for ids in token_ids])


def reference_logits(model: PreTrainedModel, token_ids: list[int]) -> Tensor:  # fp32 [len, vocab_size]
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([token_ids])).logits[0]
    return logits.float()

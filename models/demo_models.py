"""The two models of the demo pair, and how they become folders."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from demo_text import END_OF_TEXT_ID, MAX_POSITIONS, VOCAB_SIZE, save_tokenizer
from tokenizers import Tokenizer
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

log = logging.getLogger("train_demo")


def llama(*, hidden_size: int, intermediate_size: int, num_heads: int) -> LlamaForCausalLM:
    """Eight layers (layer-parallel drafting needs some); sizes that tensor parallelism 1, 2 and 4 split evenly."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=8,
        num_attention_heads=num_heads,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=END_OF_TEXT_ID,
        pad_token_id=END_OF_TEXT_ID,
    )
    return LlamaForCausalLM(config)


def new_target() -> LlamaForCausalLM:
    return llama(hidden_size=256, intermediate_size=768, num_heads=8)


def new_draft() -> LlamaForCausalLM:
    return llama(hidden_size=128, intermediate_size=384, num_heads=4)


def logits_of(model: LlamaForCausalLM, ids: Tensor) -> Tensor:  # [B, T] -> [B * T, VOCAB_SIZE], fp32
    return model(input_ids=ids, use_cache=False).logits.flatten(0, 1).float()


def export(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes a bf16 copy; the model itself stays in fp32."""
    half = LlamaForCausalLM(model.config).to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    half.generation_config = GenerationConfig(
        bos_token_id=END_OF_TEXT_ID, eos_token_id=END_OF_TEXT_ID, pad_token_id=END_OF_TEXT_ID, do_sample=False
    )
    half.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    log.info("wrote %s", folder)

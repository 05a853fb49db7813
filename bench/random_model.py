"""Random-weight models of any size in Hugging Face layout, with the demo pair's tokenizer."""

import shutil
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

DEMO = Path(__file__).parents[1] / "models" / "demo-target"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def write_random_llama(
    folder: Path, *, num_layers: int, hidden_size: int, intermediate_size: int, seed: int = 0
) -> int:
    """Writes a bf16 Llama with heads of 128 channels and returns the number of its parameters."""
    num_heads = hidden_size // 128
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        max_position_embeddings=4096,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(DEMO / name, folder / name)
    return sum(parameter.numel() for parameter in model.parameters())

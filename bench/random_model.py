"""Random-weight models of any size in Hugging Face layout, with the demo pair's tokenizer.

    python -m bench.random_model /tmp/useless --layers 8 --hidden 640 --intermediate 1792

writes a draft whose tokens are never accepted. It has the shape of bench.inflate's `draft-32m`, but full-sized
attention: 43M parameters.
"""

import argparse
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=640, help="a multiple of 128")
    parser.add_argument("--intermediate", type=int, default=1792)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.hidden < 128 or args.hidden % 128:
        parser.error(f"--hidden: {args.hidden}, must be a multiple of 128, the size of a head")
    num_parameters = write_random_llama(
        args.folder,
        num_layers=args.layers,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        seed=args.seed,
    )
    print(f"{args.folder}: {num_parameters / 1e6:.1f}M parameters")


if __name__ == "__main__":
    main()

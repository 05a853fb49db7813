"""Makes a larger model that computes the same as a small one, so that real sizes can be measured without a download.

    python -m bench.inflate models/demo-target /tmp/target --preset target-455m
    python -m bench.inflate models/demo-draft /tmp/draft --layers 8 --hidden 640 --intermediate 1792

The new model has the tokenizer, the logits and therefore the acceptance of the old one. Its steps read as many weights
and store as many keys and values as its size implies. Matrices that read the hidden states are widened with random
numbers, those that write them with zeros. So the new columns stay 0, and what random weights compute is dropped:

- RMSNorm divides by the mean over more columns: its weights shrink by sqrt(old / new), its epsilon by old / new. The
  weights are kept in fp32, where that is exact enough for 1e-4 in the logits; a model run in bf16 rounds them again.
- New heads attend with random queries to random keys, and the output projection has zeros for them.
- New layers, after the old ones, write nothing.
"""

import argparse
import json
import math
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS = "model.safetensors"
COPIED_FILES = ("generation_config.json", "tokenizer.json", "tokenizer_config.json")
WEIGHT_STD = 0.02


class InflateError(ValueError):
    """The model cannot be inflated to that size. The message names the size that prevents it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """What a step of a model costs."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int

    @classmethod
    def of(cls, config: dict[str, Any]) -> "Size":
        return cls(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size"],
            heads=config["num_attention_heads"],
            kv_heads=config["num_key_value_heads"],
        )


# Of the demo pair. The first three keep its attention; the others have query heads as wide as the hidden size and a
# quarter of that as KV heads, as models of such sizes have. wide-kv has as many bytes of KV a token as a model of 70B.
PRESETS = {
    "target-455m": Size(layers=20, hidden=1536, intermediate=4608, heads=8, kv_heads=4),
    "draft-32m": Size(layers=8, hidden=640, intermediate=1792, heads=4, kv_heads=4),
    "draft-95m": Size(layers=8, hidden=1152, intermediate=3072, heads=4, kv_heads=4),
    "target-550m-attention": Size(layers=20, hidden=1536, intermediate=4608, heads=48, kv_heads=12),
    "draft-38m-attention": Size(layers=8, hidden=640, intermediate=1792, heads=20, kv_heads=5),
    "draft-115m-attention": Size(layers=8, hidden=1152, intermediate=3072, heads=36, kv_heads=9),
    "target-620m-wide-kv": Size(layers=20, hidden=1536, intermediate=4608, heads=64, kv_heads=64),
    "target-8b": Size(layers=32, hidden=4096, intermediate=14336, heads=128, kv_heads=32),
    "draft-1b": Size(layers=16, hidden=2048, intermediate=8192, heads=64, kv_heads=16),
    "draft-370m-attention": Size(layers=8, hidden=2048, intermediate=5632, heads=64, kv_heads=16),
}


@dataclass(frozen=True, slots=True)
class HeadMap:
    """Which old head each new one repeats, None for a random one. A query head's position determines its KV head."""

    heads: list[int | None]
    kv_heads: list[int | None]

    @classmethod
    def between(cls, old: Size, new: Size) -> "HeadMap":
        """Old query heads keep their KV head; it is repeated where fewer query heads share one than before."""
        old_group, group = old.heads // old.kv_heads, new.heads // new.kv_heads
        copies = -(-old_group // group)
        if old.kv_heads * copies > new.kv_heads:
            raise InflateError(
                f"--kv-heads {new.kv_heads}: with {group} query heads on each, the model's {old.heads} query heads "
                f"need {old.kv_heads * copies}; give that many, or more --heads"
            )
        heads: list[int | None] = [None] * new.heads
        kv_heads: list[int | None] = [None] * new.kv_heads
        for head in range(old.heads):
            kv_head, place = divmod(head, old_group)
            new_kv_head = kv_head * copies + place // group
            kv_heads[new_kv_head] = kv_head
            heads[new_kv_head * group + place % group] = head
        return cls(heads, kv_heads)


class Inflater:
    """Makes the tensors of the new model."""

    def __init__(self, tensors: dict[str, Tensor], config: dict[str, Any], size: Size, seed: int) -> None:
        self._tensors = tensors
        self._old = Size.of(config)
        self._new = size
        self._head_dim: int = config["head_dim"]
        self._heads = HeadMap.between(self._old, size)
        self._dtype = tensors["model.embed_tokens.weight"].dtype
        self._generator = torch.Generator().manual_seed(seed)

    def all_tensors(self) -> dict[str, Tensor]:
        made = {
            "model.embed_tokens.weight": self._padded("model.embed_tokens.weight", columns=self._new.hidden),
            "model.norm.weight": self._norm("model.norm.weight"),
        }
        if "lm_head.weight" in self._tensors:
            made["lm_head.weight"] = self._padded("lm_head.weight", columns=self._new.hidden)
        for layer in range(self._new.layers):
            prefix = f"model.layers.{layer}"
            made |= self._attention(f"{prefix}.self_attn") | self._mlp(f"{prefix}.mlp")
            for name in ("input_layernorm", "post_attention_layernorm"):
                made[f"{prefix}.{name}.weight"] = self._norm(f"{prefix}.{name}.weight")
        return made

    def _attention(self, prefix: str) -> dict[str, Tensor]:
        made = {}
        maps = {"q_proj": self._heads.heads, "k_proj": self._heads.kv_heads, "v_proj": self._heads.kv_heads}
        for name, sources in maps.items():
            weight = self._random(len(sources) * self._head_dim, self._new.hidden)
            for new, old in self._rows_of_heads(sources):
                self._put(weight[new], f"{prefix}.{name}.weight", rows=old)
            made[f"{prefix}.{name}.weight"] = weight
        output = torch.zeros(self._new.hidden, self._new.heads * self._head_dim, dtype=self._dtype)
        for new, old in self._rows_of_heads(self._heads.heads):
            self._put(output[:, new], f"{prefix}.o_proj.weight", columns=old)
        made[f"{prefix}.o_proj.weight"] = output
        return made

    def _mlp(self, prefix: str) -> dict[str, Tensor]:
        made = {}
        for name in ("gate_proj", "up_proj"):
            made[f"{prefix}.{name}.weight"] = self._random(self._new.intermediate, self._new.hidden)
            self._put(made[f"{prefix}.{name}.weight"], f"{prefix}.{name}.weight")
        made[f"{prefix}.down_proj.weight"] = torch.zeros(self._new.hidden, self._new.intermediate, dtype=self._dtype)
        self._put(made[f"{prefix}.down_proj.weight"], f"{prefix}.down_proj.weight")
        return made

    def _norm(self, name: str) -> Tensor:
        weight = torch.ones(self._new.hidden)
        if name in self._tensors:
            weight[: self._old.hidden] = self._tensors[name].float() * math.sqrt(self._old.hidden / self._new.hidden)
        return weight

    def _padded(self, name: str, *, columns: int) -> Tensor:
        old = self._tensors[name]
        weight = torch.zeros(old.shape[0], columns, dtype=self._dtype)
        weight[:, : old.shape[1]] = old
        return weight

    def _random(self, rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=self._generator).mul_(WEIGHT_STD).to(self._dtype)

    def _put(self, target: Tensor, name: str, *, rows: slice = slice(None), columns: slice = slice(None)) -> None:
        """Copies part of an old tensor into the corner of `target`; nothing for a layer that the old model lacks."""
        if name in self._tensors:
            part = self._tensors[name][rows, columns]
            target[: part.shape[0], : part.shape[1]] = part

    def _rows_of_heads(self, sources: list[int | None]) -> list[tuple[slice, slice]]:
        """Rows of each repeated head in the new and in the old projection."""
        size = self._head_dim
        return [
            (slice(new * size, new * size + size), slice(old * size, old * size + size))
            for new, old in enumerate(sources)
            if old is not None
        ]


def inflate(source: Path, out: Path, size: Size, *, seed: int = 0, max_len: int | None = None) -> int:
    """Writes the model of `source` (Llama, Hugging Face layout) at another size to `out`; returns its parameters.

    `max_len`: longest context, in tokens; what lies beyond that of the source is for measuring time, not for reading.
    Raises InflateError, before anything is written.
    """
    config = _read_config(source)
    _check(Size.of(config), size)
    inflater = Inflater(load_file(source / WEIGHTS), config, size, seed)
    out.mkdir(parents=True, exist_ok=True)
    tensors = inflater.all_tensors()
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
    grown = {
        "num_hidden_layers": size.layers,
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "rms_norm_eps": config["rms_norm_eps"] * Size.of(config).hidden / size.hidden,
        "max_position_embeddings": max_len or config["max_position_embeddings"],
    }
    (out / "config.json").write_text(json.dumps({**config, **grown}, indent=2) + "\n", encoding="utf-8")
    for name in COPIED_FILES:
        if (source / name).exists():
            shutil.copy(source / name, out / name)
    return sum(tensor.numel() for tensor in tensors.values())


def _read_config(source: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((source / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InflateError(f"{source} has no config.json: give a folder in Hugging Face layout") from None
    if config.get("architectures") != ["LlamaForCausalLM"]:
        raise InflateError(f"{source}: architectures is {config.get('architectures')}, must be LlamaForCausalLM")
    if config.get("attention_bias") or config.get("mlp_bias"):
        raise InflateError(f"{source}: attention_bias or mlp_bias is set; models with biases are not inflated")
    if not (source / WEIGHTS).exists():
        raise InflateError(f"{source} has no {WEIGHTS}: sharded checkpoints are not inflated")
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    return config


def _check(old: Size, new: Size) -> None:
    for field in fields(Size):
        given, least = getattr(new, field.name), getattr(old, field.name)
        if given < least:
            option = "--" + field.name.replace("_", "-")
            raise InflateError(f"{option} {given}: the model already has {least}, and a size cannot shrink")
    if new.heads % new.kv_heads:
        raise InflateError(f"--heads {new.heads}: must be a multiple of --kv-heads {new.kv_heads}")
    if new.hidden % new.heads:  # transformers requires it, although the head size is a separate setting
        raise InflateError(f"--hidden {new.hidden}: must be a multiple of --heads {new.heads}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of a Llama model, such as models/demo-target")
    parser.add_argument("out", type=Path)
    parser.add_argument("--preset", choices=PRESETS, help="a size for the demo pair; the options below change it")
    for field in fields(Size):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, help="default: that of the source")
    parser.add_argument("--max-len", type=int, help="longest context, to measure time beyond what the source can read")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights")
    return parser


def parse_arguments() -> argparse.Namespace:
    return _parser().parse_args()


def main() -> None:
    args = parse_arguments()
    try:
        default = PRESETS[args.preset] if args.preset else Size.of(_read_config(args.source))
        given = {name: getattr(args, name) for name in asdict(default) if getattr(args, name) is not None}
        size = Size(**{**asdict(default), **given})
        num_parameters = inflate(args.source, args.out, size, seed=args.seed, max_len=args.max_len)
    except InflateError as error:
        _parser().error(str(error))
    print(f"{args.out}: {num_parameters / 1e6:.1f}M parameters")


if __name__ == "__main__":
    main()

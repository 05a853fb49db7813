"""Checkpoints in few bits: a tiny model whose matrices are stored in a format, and the same model dequantised.

Those of compressed-tensors are written and read back by its own library, GPTQ, AWQ and FP8 in blocks by the layouts
that their libraries publish.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP_SIZE = 32
BLOCK = 48  # does not divide the sizes
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]

Stored = tuple[dict[str, Tensor], Tensor]  # the tensors by the ends of their names, and the matrix that they mean


def write_stored(folder: Path, source: Path, settings: Mapping[str, Any], store: Callable[[Tensor], Stored]) -> None:
    """Write the model in `source` to folder/stored, with the matrices of its layers stored by `store`, and to
    folder/dense, with what they mean, in fp32."""
    stored, dense = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if tensor.ndim == 2 and ".layers." in name:
            parts, meant = store(tensor.float())
            stored |= {name.removesuffix("weight") + end: part.contiguous() for end, part in parts.items()}
            dense[name] = meant.float().contiguous()
        else:
            stored[name] = dense[name] = tensor
    config = json.loads((source / "config.json").read_text())
    for name, tensors, added in (("stored", stored, {"quantization_config": settings}), ("dense", dense, {})):
        shutil.copytree(source, folder / name)
        (folder / name / "config.json").write_text(json.dumps(config | added))
        save_file(tensors, folder / name / "model.safetensors")


def _rounded(weight: Tensor, num_bits: int, *, group_size: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Codes from 0 [out, in], scales and zero points [out, groups]."""
    groups = weight.unflatten(1, (-1, group_size or weight.shape[1]))
    most = 2**num_bits - 1
    if symmetric:
        scales = groups.abs().amax(2) / (most / 2)
        zeros = torch.full_like(scales, 2 ** (num_bits - 1))
    else:
        low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
        scales = (high - low) / most
        zeros = (-low / scales).round()
    scales = scales.half().float()
    codes = ((groups / scales.unsqueeze(2)).round() + zeros.unsqueeze(2)).clamp(0, most)
    return codes.flatten(1).int(), scales, zeros.int()


def _meant(codes: Tensor, scales: Tensor, zeros: Tensor, groups: Tensor) -> Tensor:
    return (codes - zeros[:, groups]).float() * scales[:, groups]


def _words(numbers: Tensor, num_bits: int, order: list[int] | None = None) -> Tensor:
    """Pack along the last dimension, the first number in the lowest bits."""
    per_word = 32 // num_bits
    places = numbers.unflatten(-1, (-1, per_word))[..., order or list(range(per_word))].long()
    words = (places << torch.arange(0, 32, num_bits)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def gptq(*, num_bits: int = 4, in_order: bool = True, version: str = "gptq") -> Callable[[Tensor], Stored]:
    def store(weight: Tensor) -> Stored:
        in_features = weight.shape[1]
        groups = torch.arange(in_features) // GROUP_SIZE
        order = torch.arange(in_features) if in_order else torch.randperm(in_features)
        codes, scales, zeros = _rounded(weight[:, order], num_bits, group_size=GROUP_SIZE, symmetric=False)
        inverse = order.argsort()
        codes, groups = codes[:, inverse], groups[inverse]
        saved_zeros = (zeros - (1 if version == "gptq" else 0)) & (2**num_bits - 1)
        parts = {
            "qweight": _words(codes, num_bits).T,
            "qzeros": _words(saved_zeros.T, num_bits),
            "scales": scales.T.half(),
            "g_idx": groups.int(),
        }
        return parts, _meant(codes, scales, zeros, groups)

    return store


def awq(weight: Tensor) -> Stored:
    codes, scales, zeros = _rounded(weight, 4, group_size=GROUP_SIZE, symmetric=False)
    parts = {
        "qweight": _words(codes.T, 4, AWQ_ORDER),
        "qzeros": _words(zeros.T, 4, AWQ_ORDER),
        "scales": scales.T.half(),
    }
    return parts, _meant(codes, scales, zeros, torch.arange(weight.shape[1]) // GROUP_SIZE)


def fp8_blocks(weight: Tensor) -> Stored:
    out_features, in_features = weight.shape
    rows, columns = torch.arange(out_features) // BLOCK, torch.arange(in_features) // BLOCK
    scales = torch.zeros(int(rows[-1]) + 1, int(columns[-1]) + 1)
    for row, column in torch.cartesian_prod(rows.unique(), columns.unique()).tolist():
        scales[row, column] = weight[rows == row][:, columns == column].abs().max() / 448
    spread = scales[rows][:, columns]
    codes = (weight / spread).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale_inv": scales}, codes.float() * spread


def compressed(format: str, **arguments: Any) -> Callable[[Tensor], Stored]:
    """By the library. `arguments`: of its QuantizationArgs."""
    args = QuantizationArgs(**arguments)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.load_from_registry(format)

    def store(weight: Tensor) -> Stored:
        state: dict[str, Tensor] = {"weight": weight}
        if args.strategy == "tensor":
            state["weight_scale"] = weight.abs().max().reshape(1) / (448 if args.type == "float" else 127)
        elif args.type == "float":
            state["weight_scale"] = weight.abs().amax(1, keepdim=True) / 448
        else:
            group_size = args.group_size or 0
            _, scales, zeros = _rounded(weight, args.num_bits, group_size=group_size, symmetric=args.symmetric)
            state["weight_scale"] = scales
            if not args.symmetric:
                state["weight_zero_point"] = (zeros - 2 ** (args.num_bits - 1)).to(torch.int8)
        parts = compressor.compress(state, scheme)
        return parts, compressor.decompress(parts, scheme)["weight"]

    return store


def compressed_config(format: str, **weights: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
    }

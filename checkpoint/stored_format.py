"""Checkpoints whose matrices are stored in few bits: what their config.json says of it.

A matrix [out_features, in_features] is then several tensors: codes, scales, and perhaps zero points and the order of
the inputs. weight = (code - zero point) * scale, where a scale serves a block of rows and columns. Activations are
never rounded here, also where a checkpoint was made for rounded ones: the result is the more exact one.

Layouts: compressed-tensors (pack-quantized, int-quantized, naive-quantized, float-quantized), FP8 in blocks as DeepSeek
published it (`weight_scale_inv`), GPTQ (arXiv 2210.17323) and AWQ (arXiv 2306.00978) as their libraries save them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from checkpoint.errors import LoadError, shown
from checkpoint.fields import Fields

Layout = Literal["packed", "plain", "gptq", "awq"]
_REMEDY = "use unquantised weights, or another format"
_UNSIGNED_BITS = (4, 8)
_REORDERING = (True, "group", "dynamic")  # of compressed-tensors; its other orders are undone before it saves


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFormat:
    """How the matrices of a checkpoint's layers are stored, those that are not left as they are."""

    name: str  # for people
    layout: Layout
    num_bits: int
    scale: str = "weight_scale"  # the end of its tensor's name
    block: tuple[int, int]  # outputs and inputs that share a scale; 0: all
    has_zero_points: bool = False
    zero_offset: int = 0  # that a stored zero point lacks
    is_float: bool = False  # codes are FP8, else integers
    reorders_inputs: bool = False  # groups are not neighbouring inputs

    def scale_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        rows, columns = (
            -(-size // block) if block else 1
            for size, block in zip((out_features, in_features), self.block, strict=True)
        )
        return rows, columns


def parse_stored_format(settings: Any) -> StoredFormat:
    """Of `quantization_config`. Raises LoadError that names what is not supported."""
    if not isinstance(settings, dict):
        raise LoadError(f"config.json: quantization_config must be an object, got {shown(settings)}", _REMEDY)
    fields = Fields("quantization_config of config.json", settings)
    method = fields.get("quant_method")
    if not isinstance(method, str) or method not in _METHODS:
        raise LoadError(
            f"config.json: the checkpoint is quantised ({method}), supported are {', '.join(_METHODS)}", _REMEDY
        )
    return _METHODS[method](fields)


def _compressed_tensors(fields: Fields) -> StoredFormat:
    layouts: dict[str, Layout] = {
        "pack-quantized": "packed",
        "int-quantized": "plain",
        "naive-quantized": "plain",
        "float-quantized": "plain",
    }
    name = fields.get("format")
    if not isinstance(name, str) or name not in layouts:
        raise fields.unsupported("format", f"use one of {', '.join(layouts)}")
    for key in ("kv_cache_scheme", "transform_config"):
        if fields.get(key):
            raise fields.unsupported(key, "use a checkpoint without it")
    if Fields("", fields.part("sparsity_config")).get("format") not in (None, "dense"):
        raise fields.unsupported("sparsity_config", "use a checkpoint that is not sparse")
    groups = fields.part("config_groups")
    if len(groups) != 1:
        raise fields.unsupported("config_groups", "use a checkpoint with a single group")
    group = Fields(f"{fields.file}, config_groups.{next(iter(groups))}", _object(next(iter(groups.values()))))
    return _compressed_tensors_weights(Fields(f"{group.file}.weights", group.part("weights")), name, layouts[name])


def _compressed_tensors_weights(weights: Fields, name: str, layout: Layout) -> StoredFormat:
    num_bits, kind = weights.integer("num_bits"), weights.get("type") or "int"
    if (kind, num_bits) not in (("int", 4), ("int", 8), ("float", 8)) or (layout == "packed" and kind != "int"):
        raise weights.unsupported("num_bits", "use int weights of 4 or 8 bits, or float weights of 8")
    if layout == "plain" and num_bits != 8:
        raise weights.unsupported("num_bits", "use 8, or pack-quantized")
    strategy = weights.get("strategy") or ("group" if weights.get("group_size") else "tensor")
    match strategy:
        case "tensor":
            block = (0, 0)
        case "channel":
            block = (1, 0)
        case "group":
            block = (1, weights.integer("group_size"))
        case "block":
            block = _pair(weights, "block_structure")
        case _:
            raise weights.unsupported("strategy", "use tensor, channel, group or block")
    has_zero_points = not weights.flag("symmetric", default=True)
    if has_zero_points and (layout != "packed" or block[0] != 1):
        raise weights.unsupported("symmetric", "use symmetric weights")
    return StoredFormat(
        name=f"compressed-tensors {name}, {kind}{num_bits}, a scale for each {strategy}",
        layout=layout,
        num_bits=num_bits,
        block=block,
        has_zero_points=has_zero_points,
        is_float=kind == "float",
        reorders_inputs=weights.get("actorder") in _REORDERING,
    )


def _fp8(fields: Fields) -> StoredFormat:
    if fields.get("weight_block_size") is None:
        raise fields.unsupported("weight_block_size", "use FP8 with blocks, or that of compressed-tensors")
    block = _pair(fields, "weight_block_size")
    name = f"FP8 in blocks of {block[0]}x{block[1]}"
    return StoredFormat(name=name, layout="plain", num_bits=8, scale="weight_scale_inv", block=block, is_float=True)


def _gptq(fields: Fields) -> StoredFormat:
    form = fields.get("checkpoint_format") or "gptq"
    if form not in ("gptq", "gptq_v2"):
        raise fields.unsupported("checkpoint_format", "use gptq or gptq_v2")
    num_bits, group_size = _unsigned_bits(fields, "bits"), _group_size(fields)
    return StoredFormat(
        name=f"GPTQ, int{num_bits}, groups of {group_size or 'all inputs'}",
        layout="gptq",
        num_bits=num_bits,
        scale="scales",
        block=(1, group_size),
        has_zero_points=True,
        zero_offset=1 if form == "gptq" else 0,
        reorders_inputs=bool(fields.get("desc_act")),
    )


def _awq(fields: Fields) -> StoredFormat:
    version = fields.get("version") or "gemm"
    if not isinstance(version, str) or version.lower() != "gemm":
        raise fields.unsupported("version", "use gemm")
    if fields.integer("bits") != 4:
        raise fields.unsupported("bits", "use 4")
    group_size = _group_size(fields)
    return StoredFormat(
        name=f"AWQ, int4, groups of {group_size or 'all inputs'}",
        layout="awq",
        num_bits=4,
        scale="scales",
        block=(1, group_size),
        has_zero_points=True,
    )


_METHODS: Mapping[str, Callable[[Fields], StoredFormat]] = {
    "compressed-tensors": _compressed_tensors,
    "fp8": _fp8,
    "gptq": _gptq,
    "awq": _awq,
}


def _unsigned_bits(fields: Fields, key: str) -> int:
    num_bits = fields.integer(key)
    if num_bits not in _UNSIGNED_BITS:
        raise fields.unsupported(key, f"use {' or '.join(map(str, _UNSIGNED_BITS))}")
    return num_bits


def _group_size(fields: Fields) -> int:
    """0: all inputs, which the files write as -1."""
    return 0 if fields.get("group_size") == -1 else fields.integer("group_size")


def _pair(fields: Fields, key: str) -> tuple[int, int]:
    value = fields.get(key)
    if not isinstance(value, list) or len(value) != 2 or not all(type(size) is int and size > 0 for size in value):
        raise fields.wrong(key, "two positive integers")
    return value[0], value[1]


def _object(value: Any) -> Mapping[str, Any]:
    """An object inside of quantization_config. Raises LoadError."""
    if not isinstance(value, dict):
        raise LoadError(f"config.json: quantization_config holds {shown(value)} in the place of an object", _REMEDY)
    return value

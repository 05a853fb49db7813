"""The weights of a decoder, and the structs in which decoder.cpp reads them and its other arguments."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.native import quantized
from kernels.native.linear import NativeWeight, product_address
from kernels.native.quantized import NativeQuantizedWeight


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearWeights:
    """A product: x @ weight^T + bias. The bias is added before the sums are rounded, the later bias after."""

    weight: NativeWeight | NativeQuantizedWeight
    bias: Tensor | None = None
    later_bias: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """Norms are [hidden_size], those of heads [head_dim]."""

    input_norm: Tensor
    qkv: LinearWeights
    q_norm: Tensor | None
    k_norm: Tensor | None
    output: LinearWeights
    mlp_norm: Tensor
    gate_up: LinearWeights
    down: LinearWeights
    sliding_window: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderWeights:
    """All weights of a decoder, on the CPU, contiguous, in one dtype."""

    embedding: Tensor  # [vocab_size, hidden_size]
    layers: Sequence[LayerWeights]  # at least one
    norm: Tensor
    head: LinearWeights  # [vocab_size, hidden_size]
    cos_sin: Tensor  # fp32 [num_positions, head_dim], see workers.layers.rope
    eps: float
    num_q_heads: int
    num_kv_heads: int


# As in decoder.hpp and decoder.cpp.


class LinearStruct(ctypes.Structure):
    _fields_ = (
        ("multiply", ctypes.c_void_p),
        ("packed", ctypes.c_void_p),
        ("num_out", ctypes.c_int64),
        ("num_in", ctypes.c_int64),
        ("bias", ctypes.c_void_p),
        ("later_bias", ctypes.c_void_p),
    )


class LayerStruct(ctypes.Structure):
    _fields_ = (
        ("input_norm", ctypes.c_void_p),
        ("q_norm", ctypes.c_void_p),
        ("k_norm", ctypes.c_void_p),
        ("mlp_norm", ctypes.c_void_p),
        ("qkv", LinearStruct),
        ("output", LinearStruct),
        ("gate_up", LinearStruct),
        ("down", LinearStruct),
        ("window", ctypes.c_int64),
    )


class ModelStruct(ctypes.Structure):
    _fields_ = (
        ("layers", ctypes.POINTER(LayerStruct)),
        ("embedding", ctypes.c_void_p),
        ("cos_sin", ctypes.c_void_p),
        ("norm", ctypes.c_void_p),
        ("head", LinearStruct),
        ("num_layers", ctypes.c_int64),
        ("vocab_size", ctypes.c_int64),
        ("num_positions", ctypes.c_int64),
        ("hidden_size", ctypes.c_int64),
        ("num_q_heads", ctypes.c_int64),
        ("num_kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("eps", ctypes.c_float),
        ("scale", ctypes.c_float),
    )


class BatchStruct(ctypes.Structure):
    _fields_ = (
        ("input_ids", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("block_table", ctypes.c_void_p),
        ("seq_lens", ctypes.c_void_p),
        ("cu_seqlens", ctypes.c_void_p),
        ("num_tokens", ctypes.c_int64),
        ("num_seqs", ctypes.c_int64),
        ("max_blocks", ctypes.c_int64),
    )


class SeqsStruct(ctypes.Structure):
    _fields_ = (("block_table", ctypes.c_void_p), ("num_seqs", ctypes.c_int64), ("max_blocks", ctypes.c_int64))


class CachesStruct(ctypes.Structure):
    _fields_ = (
        ("tensors", ctypes.POINTER(ctypes.c_void_p)),
        ("num_blocks", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
    )


def _linear(weights: LinearWeights, dtype: torch.dtype) -> LinearStruct:
    return LinearStruct(
        *_product(weights.weight, dtype),
        *weights.weight.shape,
        address(weights.bias),
        address(weights.later_bias),
    )


def _product(weight: NativeWeight | NativeQuantizedWeight, dtype: torch.dtype) -> tuple[int, int]:
    """Addresses of the function that multiplies rows of `dtype`, and of the weight that it takes."""
    if isinstance(weight, NativeQuantizedWeight):
        return quantized.product_address(weight, dtype), ctypes.addressof(weight.address)
    return product_address(weight.dtype), weight.packed.data_ptr()


def layer_struct(weights: LayerWeights, dtype: torch.dtype) -> LayerStruct:
    return LayerStruct(
        input_norm=weights.input_norm.data_ptr(),
        q_norm=address(weights.q_norm),
        k_norm=address(weights.k_norm),
        mlp_norm=weights.mlp_norm.data_ptr(),
        qkv=_linear(weights.qkv, dtype),
        output=_linear(weights.output, dtype),
        gate_up=_linear(weights.gate_up, dtype),
        down=_linear(weights.down, dtype),
        window=weights.sliding_window or 0,
    )


def model_struct(weights: DecoderWeights, layers: "ctypes.Array[LayerStruct]") -> ModelStruct:
    vocab_size, hidden_size = weights.embedding.shape
    num_positions, head_dim = weights.cos_sin.shape
    return ModelStruct(
        layers=layers,
        embedding=weights.embedding.data_ptr(),
        cos_sin=weights.cos_sin.data_ptr(),
        norm=weights.norm.data_ptr(),
        head=_linear(weights.head, weights.embedding.dtype),
        num_layers=len(layers),
        vocab_size=vocab_size,
        num_positions=num_positions,
        hidden_size=hidden_size,
        num_q_heads=weights.num_q_heads,
        num_kv_heads=weights.num_kv_heads,
        head_dim=head_dim,
        eps=weights.eps,
        scale=head_dim**-0.5,
    )


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()

"""Which models a CPU computes in one native call per forward."""

from collections.abc import Iterator

from kernels.attention.native import can_attend_heads
from kernels.dispatch import INTERPRETED
from kernels.layers.linear import Weight
from kernels.native.decoder import NativeDecoder
from kernels.native.decoder_structs import DecoderWeights, LayerWeights, LinearWeights
from kernels.native.linear import NativeWeight
from kernels.native.quantized import NativeQuantizedWeight
from workers.models.decoder import CausalLM, DecoderLayer


def native_decoder(model: CausalLM) -> NativeDecoder | None:
    """A loaded model, prepared for such calls; None if not every operator of a forward is a native kernel on this rank:
    on a GPU, where torch computes, and between several ranks."""
    if INTERPRETED or model.tp_size > 1 or model.embedding.weight.is_cuda or not _is_native(model):
        return None
    qkv_proj = model.layers[0].attention.qkv_proj
    return NativeDecoder(
        DecoderWeights(
            embedding=model.embedding.weight,
            layers=[_layer_weights(layer) for layer in model.layers],
            norm=model.norm,
            head=LinearWeights(weight=_native(model.head.weight)),
            cos_sin=model.cos_sin,
            eps=model.config.rms_norm_eps,
            num_q_heads=qkv_proj.num_q_heads,
            num_kv_heads=qkv_proj.num_kv_heads,
        )
    )


def _is_native(model: CausalLM) -> bool:
    qkv_proj = model.layers[0].attention.qkv_proj
    group = qkv_proj.num_q_heads // qkv_proj.num_kv_heads
    dtype = model.embedding.weight.dtype
    are_native = all(isinstance(weight, NativeWeight | NativeQuantizedWeight) for weight in _weights(model))
    return are_native and can_attend_heads(dtype, model.config.head_dim, group=group)


def _weights(model: CausalLM) -> Iterator[Weight]:
    """Of all products."""
    yield model.head.weight
    for layer in model.layers:
        attention, mlp = layer.attention, layer.mlp
        yield from (attention.qkv_proj.weight, attention.o_proj.weight)
        yield from (mlp.gate_up_proj.weight, mlp.down_proj.weight)


def _layer_weights(layer: DecoderLayer) -> LayerWeights:
    attention, mlp = layer.attention, layer.mlp
    return LayerWeights(
        input_norm=layer.input_norm,
        qkv=LinearWeights(weight=_native(attention.qkv_proj.weight), bias=attention.qkv_proj.bias),
        q_norm=attention.q_norm,
        k_norm=attention.k_norm,
        output=LinearWeights(weight=_native(attention.o_proj.weight), later_bias=attention.o_proj.bias),
        mlp_norm=layer.mlp_norm,
        gate_up=LinearWeights(weight=_native(mlp.gate_up_proj.weight), bias=mlp.gate_up_proj.bias),
        down=LinearWeights(weight=_native(mlp.down_proj.weight), later_bias=mlp.down_proj.bias),
        sliding_window=attention.sliding_window,
    )


def _native(weight: Weight) -> NativeWeight | NativeQuantizedWeight:
    assert isinstance(weight, NativeWeight | NativeQuantizedWeight), "_is_native"
    return weight

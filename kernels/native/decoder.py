"""Forwards of a whole decoder on a CPU by decoder.cpp, and the choice of tokens after them: one call, with the bits of
the operators one by one.

Python and torch need 20 to 60 us around each operator. In a small draft that is more than the products take.
"""

import ctypes
import functools
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from kernels.native.decoder_structs import (
    BatchStruct,
    CachesStruct,
    DecoderWeights,
    LayerStruct,
    SeqsStruct,
    address,
    layer_struct,
    model_struct,
)
from kernels.native.library import load_library
from kernels.native.pool import pool
from kernels.native.sampling import Chosen, RowSettings

KVCaches = Sequence[tuple[Tensor, Tensor]]  # per layer: k, v [num_blocks, block_size, num_kv_heads, head_dim]
_KEPT_BYTES = 1 << 22


class PackedTokens(NamedTuple):
    """The tokens of a forward, as in workers.models.batch.Batch."""

    input_ids: Tensor  # int64 [num_tokens]
    positions: Tensor  # int64 [num_tokens]
    slot_mapping: Tensor  # int64 [num_tokens]
    block_table: Tensor  # int32 [num_seqs, max_blocks]
    seq_lens: Tensor  # int32 [num_seqs]
    cu_seqlens_q: Tensor  # int32 [num_seqs + 1]


class Choices(NamedTuple):
    """The best tokens of rows, best first, as kernels.sampling.sample_top defines them. Void where not finite."""

    values: Tensor  # fp32 [num_rows, num_best]
    token_ids: Tensor  # int64 [num_rows, num_best]
    is_finite: Tensor  # bool [num_rows]: all logits are numbers
    confidences: Tensor | None  # fp32 [num_rows]: softmax probability of the best token among all

    def select(self, rows: slice) -> "Choices":
        confidences = None if self.confidences is None else self.confidences[rows]
        return Choices(self.values[rows], self.token_ids[rows], self.is_finite[rows], confidences)


class NativeDecoder:
    """A decoder prepared for calls. Weights and caches must stay where they are. Not thread-safe."""

    def __init__(self, weights: DecoderWeights) -> None:
        self._weights = weights  # keeps them alive
        self._dtype = weights.embedding.dtype
        self._functions = _functions(self._dtype)
        self._layers = (LayerStruct * len(weights.layers))(
            *(layer_struct(layer, self._dtype) for layer in weights.layers)
        )
        self._model = model_struct(weights, self._layers)
        self._kept = torch.empty(_KEPT_BYTES, dtype=torch.uint8)
        self._kv_caches: KVCaches | None = None
        self._caches = CachesStruct()

    def forward(self, tokens: PackedTokens, kv_caches: KVCaches) -> Tensor:
        """Final hidden states [num_tokens, hidden_size]. Writes keys and values of the tokens into the caches.

        Raises ValueError naming the argument that does not fit; nothing is written then.
        """
        num_tokens = tokens.input_ids.shape[0]
        out = torch.empty(num_tokens, self._model.hidden_size, dtype=self._dtype)
        memory = self._memory(self._functions.forward_bytes(ctypes.byref(self._model), num_tokens))
        problem = self._functions.forward(
            pool(),
            ctypes.byref(self._model),
            ctypes.byref(_batch(tokens)),
            ctypes.byref(self._find_caches(kv_caches)),
            memory.data_ptr(),
            out.data_ptr(),
        )
        if problem is not None:
            raise ValueError(problem.decode())
        return out

    def choose(self, hidden: Tensor, settings: RowSettings, *, num: int, with_confidence: bool) -> Choices:
        """The `num` best tokens after rows of hidden states [num_rows, hidden_size]."""
        hidden = hidden.contiguous()
        num_rows = hidden.shape[0]
        choices = _new_choices(num_rows, num=num, with_confidence=with_confidence)
        memory = self._memory(num_rows * self._model.vocab_size * self._dtype.itemsize)
        self._functions.choose(
            pool(),
            ctypes.byref(self._model),
            hidden.data_ptr(),
            num_rows,
            settings.ctypes.data,
            memory.data_ptr(),
            ctypes.byref(_chosen(choices)),
        )
        return choices

    def draft(
        self,
        hidden: Tensor,
        settings: RowSettings,
        block_table: Tensor,
        kv_caches: KVCaches,
        *,
        num_steps: int,
        num: int,
        with_confidence: bool,
    ) -> list[Choices]:
        """Choose a token after each seq, compute it, choose the next, and so on: `num_steps` choices and one forward
        less.

        hidden: [num_seqs, hidden_size], of the last tokens. settings: of the next tokens. block_table: int32 [num_seqs,
        max_blocks]. Returns the choices of each step. A step in which some logits are not finite is the last. Raises
        ValueError naming the argument that does not fit.
        """
        num_seqs, max_blocks = block_table.shape
        all_choices = _new_choices(num_steps * num_seqs, num=num, with_confidence=with_confidence)
        memory = self._memory(self._functions.draft_bytes(ctypes.byref(self._model), num_seqs))
        block_table, hidden, settings = block_table.contiguous(), hidden.clone(), settings.copy()  # two are overwritten
        num_made = ctypes.c_int64()
        problem = self._functions.draft(
            pool(),
            ctypes.byref(self._model),
            ctypes.byref(SeqsStruct(block_table.data_ptr(), num_seqs, max_blocks)),
            ctypes.byref(self._find_caches(kv_caches)),
            memory.data_ptr(),
            hidden.data_ptr(),
            settings.ctypes.data,
            num_steps,
            ctypes.byref(_chosen(all_choices)),
            ctypes.byref(num_made),
        )
        if problem is not None:
            raise ValueError(problem.decode())
        steps = (slice(step * num_seqs, (step + 1) * num_seqs) for step in range(num_made.value))
        return [all_choices.select(rows) for rows in steps]

    def _memory(self, num_bytes: int) -> Tensor:
        """Scratch memory. What a few tokens need is kept from call to call."""
        return self._kept if num_bytes <= _KEPT_BYTES else torch.empty(num_bytes, dtype=torch.uint8)

    def _find_caches(self, kv_caches: KVCaches) -> "CachesStruct":
        """The addresses of the caches: those of an engine are the same in every call."""
        if kv_caches is not self._kv_caches:
            self._kv_caches = kv_caches
            addresses = [cache.data_ptr() for cache in chain.from_iterable(kv_caches)]
            table = (ctypes.c_void_p * len(addresses))(*addresses)
            self._caches = CachesStruct(table, *kv_caches[0][0].shape[:2])
        return self._caches


def _batch(tokens: PackedTokens) -> BatchStruct:
    for name, tensor in zip(tokens._fields, tokens, strict=True):
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, got strides {list(tensor.stride())}")
    num_seqs, max_blocks = tokens.block_table.shape
    addresses = (tensor.data_ptr() for tensor in tokens)
    return BatchStruct(*addresses, tokens.input_ids.shape[0], num_seqs, max_blocks)


def _new_choices(num_rows: int, *, num: int, with_confidence: bool) -> Choices:
    return Choices(
        values=torch.empty(num_rows, num),
        token_ids=torch.empty(num_rows, num, dtype=torch.int64),
        is_finite=torch.empty(num_rows, dtype=torch.bool),
        confidences=torch.empty(num_rows) if with_confidence else None,
    )


def _chosen(choices: Choices) -> Chosen:
    return Chosen(
        values=choices.values.data_ptr(),
        token_ids=choices.token_ids.data_ptr(),
        confidences=address(choices.confidences),
        is_finite=choices.is_finite.data_ptr(),
        num_best=choices.token_ids.shape[1],
    )


class _Functions(NamedTuple):
    """The functions of decoder.cpp for one dtype."""

    forward_bytes: Callable[..., int]
    draft_bytes: Callable[..., int]
    forward: Callable[..., bytes | None]
    choose: Callable[..., None]
    draft: Callable[..., bytes | None]


@functools.cache
def _functions(dtype: torch.dtype) -> _Functions:
    pointer, number = ctypes.c_void_p, ctypes.c_int64

    def function(verb: str, result: type | None, *arguments: type) -> Callable[..., Any]:
        found = getattr(load_library(), f"echelon_decoder_{verb}_{str(dtype).removeprefix('torch.')}")
        found.argtypes = arguments
        found.restype = result
        return cast(Callable[..., Any], found)

    return _Functions(
        forward_bytes=function("forward_bytes", number, pointer, number),
        draft_bytes=function("draft_bytes", number, pointer, number),
        forward=function("forward", ctypes.c_char_p, *[pointer] * 6),
        choose=function("choose", None, pointer, pointer, pointer, number, pointer, pointer, pointer),
        draft=function("draft", ctypes.c_char_p, *[pointer] * 7, number, pointer, pointer),
    )

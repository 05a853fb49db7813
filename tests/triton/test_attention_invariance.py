"""`batch_invariant` attention in Triton: a token's bits are the same whatever is beside it and however its seq was
cut."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from kernels.attention import probe
from kernels.attention.paged_attention import paged_attention
from kernels.dispatch import INTERPRETED
from tests.helpers.attention_pieces import Seqs


@pytest.fixture(autouse=INTERPRETED)
def products_by_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """numpy, which multiplies for the interpreter, rounds a row differently at different places in a tile. A GPU does
    not, nor do einsum's plain loops."""

    def create_dot(a: Any, b: Any, d: Any, *_: object) -> Any:
        product = np.einsum("ij,jk->ik", a.data.astype(np.float32), b.data.astype(np.float32))
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter.interpreter_builder, "create_dot", create_dot)


HEADS = [((4, 2), 64), ((3, 1), 32), ((2, 2), 128)]


@pytest.mark.parametrize(("heads", "head_dim"), HEADS)
def test_every_row_is_the_same_in_every_chunking(
    heads: tuple[int, int], head_dim: int, dtype: torch.dtype, device: torch.device
) -> None:
    seqs = Seqs([150], heads, head_dim, dtype, device=device)
    whole = seqs.in_chunks(0, 150)
    for chunk in (7, 33, 64):
        assert torch.equal(seqs.in_chunks(0, chunk), whole), f"chunks of {chunk}"
    for token in (0, 1, 31, 32, 63, 64, 127, 128, 149):
        assert torch.equal(seqs.attend([(0, token, token + 1)])[0], whole[token : token + 1]), f"token {token} alone"


def test_every_row_is_the_same_alone_and_when_verified(device: torch.device) -> None:
    """Each row alone, as in decoding, and with the 4 rows after it, as in verification."""
    seqs = Seqs([70], (4, 2), 64, torch.float16, device=device)
    whole = seqs.in_chunks(0, 70)
    assert torch.equal(seqs.in_chunks(0, 1), whole)
    for token in (0, 27, 31, 32, 61, 65):
        assert torch.equal(seqs.attend([(0, token, token + 5)])[0], whole[token : token + 5])


def test_a_row_does_not_depend_on_the_rows_beside_it(dtype: torch.dtype, device: torch.device) -> None:
    """Decode, verify and prefill rows of other seqs are in the same call, in any order."""
    lengths = [150, 65, 40, 128]
    seqs = Seqs(lengths, (4, 2), 64, dtype, device=device)
    whole = [seqs.attend([(seq, 0, length)])[0] for seq, length in enumerate(lengths)]
    choose = random.Random(0)
    for _ in range(8):
        pieces = []
        for seq in choose.sample(range(len(lengths)), choose.randint(2, len(lengths))):
            end = choose.randint(1, lengths[seq])
            pieces.append((seq, max(0, end - choose.choice([1, 1, 2, 4, 8, 33])), end))
        for (seq, start, end), result in zip(pieces, seqs.attend(pieces), strict=True):
            assert torch.equal(result, whole[seq][start:end]), (seq, start, end)


@pytest.mark.parametrize("sliding_window", [5, 100])
def test_rows_are_the_same_with_a_sliding_window(sliding_window: int, device: torch.device) -> None:
    seqs = Seqs([200], (4, 2), 64, torch.float32, device=device)
    whole = seqs.in_chunks(0, 200, sliding_window)
    for chunk in (9, 64):
        assert torch.equal(seqs.in_chunks(0, chunk, sliding_window), whole)


def test_the_probe_agrees_with_this_machine(dtype: torch.dtype, device: torch.device) -> None:
    assert probe.probe_paged_attention(2, 1, 64, dtype=dtype, device=device) is None


def test_the_probe_notices_splits(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Results computed as without batch_invariant do not pass."""

    def careless(*tensors: Tensor, softmax_scale: float, batch_invariant: bool) -> Tensor:
        assert batch_invariant
        return paged_attention(*tensors, softmax_scale=softmax_scale)

    monkeypatch.setattr(probe, "paged_attention", careless)
    finding = probe.probe_paged_attention(2, 1, 64, device=device)
    assert finding is not None
    assert "2 query heads, 1 KV heads and head_dim 64" in finding

"""`batch_invariant` attention: a token's bits are the same whatever is beside it and however its seq was cut into
chunks."""

import random

import pytest
import torch
from torch import Tensor

from kernels.attention import tiles as attention_tiles
from kernels.attention.probe import probe_paged_attention
from tests.helpers.attention_pieces import Seqs

pytestmark = pytest.mark.usefixtures("implementation")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "head_dim"), [((4, 4), 64), ((8, 2), 32), ((12, 4), 128)])
def test_every_row_is_the_same_in_every_chunking(heads: tuple[int, int], head_dim: int, dtype: torch.dtype) -> None:
    """For hidden sizes 256 and 1536: 540 tokens one by one, as in decoding, and in prefill chunks of any size."""
    seqs = Seqs([540], heads, head_dim, dtype)
    decoded = seqs.in_chunks(0, 1)
    for chunk in (7, 16, 64, 300, 540):
        assert torch.equal(seqs.in_chunks(0, chunk), decoded), f"chunks of {chunk}"


@pytest.mark.parametrize(("heads", "head_dim"), [((8, 2), 32), ((12, 12), 128)])
def test_rows_are_the_same_with_several_threads(heads: tuple[int, int], head_dim: int, torch_threads: None) -> None:
    torch.set_num_threads(2)
    seqs = Seqs([300], heads, head_dim, torch.bfloat16)
    whole = seqs.attend([(0, 0, 300)])[0]
    for start, end in [(0, 1), (255, 256), (256, 257), (299, 300), (250, 258), (100, 164)]:
        assert torch.equal(seqs.attend([(0, start, end)])[0], whole[start:end]), f"tokens {start} to {end}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "head_dim"), [((4, 4), 64), ((12, 12), 128), ((6, 1), 96)])
def test_a_row_does_not_depend_on_the_rows_beside_it(heads: tuple[int, int], head_dim: int, dtype: torch.dtype) -> None:
    """Decode, verify and prefill rows of other seqs are in the same call, in any order, at other places in memory."""
    lengths = [530, 257, 40, 512, 300]
    seqs = Seqs(lengths, heads, head_dim, dtype)
    whole = [seqs.attend([(seq, 0, length)])[0] for seq, length in enumerate(lengths)]
    choose = random.Random(0)
    for _ in range(12):
        pieces = []
        for seq in choose.sample(range(len(lengths)), choose.randint(2, len(lengths))):
            end = choose.randint(1, lengths[seq])
            pieces.append((seq, max(0, end - choose.choice([1, 1, 2, 4, 8, 9, 33])), end))
        for (seq, start, end), result in zip(pieces, seqs.attend(pieces), strict=True):
            assert torch.equal(result, whole[seq][start:end]), (seq, start, end)


def test_the_place_of_the_pages_does_not_matter() -> None:
    scattered = Seqs([600], (4, 2), 64, torch.float32)
    together = Seqs([600], (4, 2), 64, torch.float32, neighbours=True)
    together.q = scattered.q
    together.k_cache, together.v_cache = (x[scattered.tables[0]] for x in (scattered.k_cache, scattered.v_cache))
    assert torch.equal(together.in_chunks(0, 600), scattered.in_chunks(0, 37))


@pytest.mark.parametrize("sliding_window", [5, 256, 300])
def test_rows_are_the_same_with_a_sliding_window(sliding_window: int) -> None:
    seqs = Seqs([600], (4, 2), 64, torch.bfloat16)
    whole = seqs.in_chunks(0, 600, sliding_window)
    for chunk in (1, 9, 100):
        assert torch.equal(seqs.in_chunks(0, chunk, sliding_window), whole)


def test_the_probe_agrees_with_this_machine() -> None:
    assert probe_paged_attention(12, 4, 128) is None


def test_the_probe_notices_products_that_depend_on_the_batch(
    implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if implementation == "compiled":
        pytest.skip("torch's products are not called")

    def careless(a: Tensor, b: Tensor) -> Tensor:
        return torch.matmul(a, b) * (1.001 if a.shape[0] > 1 else 1.0)

    monkeypatch.setattr(attention_tiles, "_multiply", careless)
    finding = probe_paged_attention(4, 2, 32)
    assert finding is not None
    assert "4 query heads, 2 KV heads and head_dim 32" in finding

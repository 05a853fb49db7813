"""Paged attention against fp64, whatever the lengths, pages, heads and leftovers in the cache."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kernels.paged_attention import paged_attention, paged_attention_reference

# (length, new tokens): around block and tile borders, decode, verify and prefill rows, long chunks behind a prefix.
# A context past 1024 keys and short ones go different ways.
RAGGED = [(1, 1), (16, 16), (17, 5), (33, 0), (0, 0), (256, 1), (257, 2), (511, 8), (700, 100), (1024, 2), (1100, 3)]
SHORT = [(7, 1), (0, 0), (5, 5), (12, 3)]
# fp32: rounding in sums of up to 700 terms of size one. 16-bit: one rounding of the result, and in SDPA one of each
# weight; half an ulp of numbers up to one each.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


@dataclass(kw_only=True)
class Case:
    """Seqs in a cache that holds `poison` wherever no key of theirs is."""

    seqs: list[tuple[int, int]]
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 32
    dtype: torch.dtype = torch.float32
    block_size: int = 16
    neighbours: bool = False
    poison: float = torch.nan

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        num_q_heads, num_kv_heads = self.heads
        num_tokens = sum(new for _, new in self.seqs)
        # q is the first part of a fused projection, as in a model.
        fused = torch.randn(num_tokens, num_q_heads + 2 * num_kv_heads, self.head_dim).to(self.dtype)
        self.q = fused[:, :num_q_heads]
        blocks_of = [-(-length // self.block_size) for length, _ in self.seqs]
        num_blocks = sum(blocks_of) + 3
        order = torch.arange(num_blocks) if self.neighbours else torch.randperm(num_blocks)
        self.block_table = torch.full((len(self.seqs), max(blocks_of, default=0) + 2), -7, dtype=torch.int32)
        cache_shape = (num_blocks, self.block_size, num_kv_heads, self.head_dim)
        self.k_cache = torch.full(cache_shape, self.poison, dtype=self.dtype)
        self.v_cache = self.k_cache.clone()
        self.keys, self.values = [], []
        first = 1
        for row, (length, _) in enumerate(self.seqs):
            blocks = order[first : first + blocks_of[row]]
            first += blocks_of[row]
            self.block_table[row, : blocks_of[row]] = blocks
            self.keys.append(torch.randn(length, num_kv_heads, self.head_dim).to(self.dtype))
            self.values.append(torch.randn(length, num_kv_heads, self.head_dim).to(self.dtype))
            for position in range(length):
                block, offset = int(blocks[position // self.block_size]), position % self.block_size
                self.k_cache[block, offset] = self.keys[row][position]
                self.v_cache[block, offset] = self.values[row][position]

    def arguments(self) -> dict[str, Tensor]:
        new = torch.tensor([0] + [new for _, new in self.seqs])
        return {
            "q": self.q,
            "k_cache": self.k_cache,
            "v_cache": self.v_cache,
            "block_table": self.block_table,
            "seq_lens": torch.tensor([length for length, _ in self.seqs], dtype=torch.int32),
            "cu_seqlens_q": new.cumsum(0).int(),
        }

    @property
    def softmax_scale(self) -> float:
        return 0.7 * self.head_dim**-0.5  # not what SDPA would take by itself

    def run(self, sliding_window: int | None = None, *, batch_invariant: bool = False) -> Tensor:
        return paged_attention(
            **self.arguments(),
            softmax_scale=self.softmax_scale,
            sliding_window=sliding_window,
            batch_invariant=batch_invariant,
        )

    def run_reference(self, sliding_window: int | None = None) -> Tensor:
        return paged_attention_reference(
            **self.arguments(), softmax_scale=self.softmax_scale, sliding_window=sliding_window
        )

    def exact(self, sliding_window: int | None = None) -> Tensor:
        """fp64, token by token, over exactly the keys that the token sees: no mask, no cache."""
        group = self.heads[0] // self.heads[1]
        results, token = [], 0
        for row, (length, new) in enumerate(self.seqs):
            for position in range(length - new, length):
                start = 0 if sliding_window is None else max(0, position + 1 - sliding_window)
                k = self.keys[row][start : position + 1].double().repeat_interleave(group, dim=1)
                v = self.values[row][start : position + 1].double().repeat_interleave(group, dim=1)
                weights = ((self.q[token].double() * k).sum(-1) * self.softmax_scale).exp()  # [keys, num_q_heads]
                results.append((weights.unsqueeze(-1) * v).sum(0) / weights.sum(0).unsqueeze(-1))
                token += 1
        return torch.stack(results) if results else torch.empty(0, self.heads[0], self.head_dim).double()


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected.double(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("sliding_window", [None, 1, 6, 300])
@pytest.mark.parametrize(("heads", "head_dim"), [((1, 1), 32), ((8, 2), 64)])
def test_reference_is_the_formula(heads: tuple[int, int], head_dim: int, sliding_window: int | None) -> None:
    case = Case(seqs=RAGGED, heads=heads, head_dim=head_dim)
    assert_close(case.run_reference(sliding_window), case.exact(sliding_window), torch.float32)


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    ("heads", "head_dim"),
    [((2, 2), 32), ((3, 3), 96), ((4, 1), 64), ((8, 1), 128), ((6, 2), 128), ((16, 1), 64)],
)
def test_is_the_reference_for_all_heads_and_dtypes(
    heads: tuple[int, int], head_dim: int, dtype: torch.dtype, batch_invariant: bool
) -> None:
    case = Case(seqs=RAGGED, heads=heads, head_dim=head_dim, dtype=dtype)
    assert_close(case.run(batch_invariant=batch_invariant), case.run_reference(), dtype)


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("sliding_window", [1, 2, 63, 64, 256, 300, 10_000])
def test_sliding_window(sliding_window: int, batch_invariant: bool) -> None:
    case = Case(seqs=RAGGED)
    actual = case.run(sliding_window, batch_invariant=batch_invariant)
    assert_close(actual, case.run_reference(sliding_window), torch.float32)


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("neighbours", [False, True])
@pytest.mark.parametrize("block_size", [1, 5, 16, 256, 1024])
def test_pages_of_any_size_and_order(block_size: int, neighbours: bool, batch_invariant: bool) -> None:
    case = Case(seqs=RAGGED, block_size=block_size, neighbours=neighbours)
    assert_close(case.run(batch_invariant=batch_invariant), case.run_reference(), torch.float32)


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("neighbours", [False, True])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 32, 33, 255, 256, 257])
def test_borders_of_blocks_and_tiles(length: int, neighbours: bool, batch_invariant: bool) -> None:
    seqs = [(length, new) for new in (1, 2, 15, 16, 17, length) if new <= length]
    case = Case(seqs=seqs, neighbours=neighbours)
    assert_close(case.run(batch_invariant=batch_invariant), case.run_reference(), torch.float32)


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("sliding_window", [None, 6])
@pytest.mark.parametrize("neighbours", [False, True])
def test_what_lies_in_unused_slots_has_no_influence(
    neighbours: bool, sliding_window: int | None, batch_invariant: bool
) -> None:
    clean = Case(seqs=RAGGED, neighbours=neighbours, poison=0.0).run(sliding_window, batch_invariant=batch_invariant)
    for poison in (torch.nan, torch.inf, -torch.inf, 1e30):
        case = Case(seqs=RAGGED, neighbours=neighbours, poison=poison)
        assert torch.equal(case.run(sliding_window, batch_invariant=batch_invariant), clean), poison


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_what_lies_before_the_window_has_no_influence(batch_invariant: bool) -> None:
    clean, dirty = Case(seqs=[(700, 3), (700, 90)]), Case(seqs=[(700, 3), (700, 90)])
    for row in range(2):
        forgotten = dirty.block_table[row, :14].long()  # positions up to 223; the first query at 610 sees from 361
        dirty.k_cache[forgotten] = torch.nan
        dirty.v_cache[forgotten] = 1e30
    assert torch.equal(dirty.run(250, batch_invariant=batch_invariant), clean.run(250, batch_invariant=batch_invariant))


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_a_seq_with_nan_keeps_it_to_itself(batch_invariant: bool) -> None:
    case = Case(seqs=[(40, 1), (40, 3), (300, 40), (40, 2)])
    clean = case.run(batch_invariant=batch_invariant)
    case.v_cache[case.block_table[1, 0].long(), 0] = torch.nan
    case.q[4:44] = torch.nan
    sick = case.run(batch_invariant=batch_invariant)
    assert sick[1:44].isnan().all()
    assert torch.equal(sick[[0, 44, 45]], clean[[0, 44, 45]])


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("seqs", [[], [(0, 0)], [(9, 0), (0, 0)]])
def test_nothing_to_do(seqs: list[tuple[int, int]], batch_invariant: bool) -> None:
    assert Case(seqs=seqs).run(batch_invariant=batch_invariant).shape == (0, 4, 32)


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_scores_of_any_size_stay_finite(batch_invariant: bool) -> None:
    case = Case(seqs=[(300, 1), (300, 40)])
    case.q *= 1e4  # scores of some ten thousand: one key takes all
    assert_close(case.run(batch_invariant=batch_invariant), case.run_reference(), torch.float32)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_inputs_stay_as_they_are_and_strides_of_q_do_not_matter(dtype: torch.dtype) -> None:
    case = Case(seqs=RAGGED, dtype=dtype, poison=0.0)
    before = {name: x.clone() for name, x in case.arguments().items()}
    assert not case.q.is_contiguous()
    strided = [case.run(batch_invariant=batch_invariant) for batch_invariant in (False, True)]
    assert all(torch.equal(x, before[name]) for name, x in case.arguments().items())
    case.q = case.q.contiguous()
    for batch_invariant in (False, True):
        assert torch.equal(case.run(batch_invariant=batch_invariant), strided[batch_invariant])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("q", lambda x: x[0], r"^q: expected \[num_tokens, num_q_heads, head_dim\].*got \[4, 32\]"),
        ("q", lambda x: x.transpose(1, 2), r"^q: .*contiguous features"),
        ("q", lambda x: x[:, :3], r"^q: expected a multiple of 2 KV heads, got 3"),
        ("q", lambda x: x[..., :16], r"^k_cache: expected contiguous .* 16\], got"),
        ("q", lambda x: x[:5], r"^cu_seqlens_q: expected to run from 0 to 5, got 0 to 9"),
        ("k_cache", lambda x: x.transpose(0, 1), r"^k_cache: expected contiguous"),
        ("v_cache", lambda x: x[1:], r"^v_cache: expected contiguous"),
        ("v_cache", lambda x: x.bfloat16(), r"^v_cache: expected torch.float32 like q, got torch.bfloat16"),
        ("seq_lens", lambda x: x.long(), r"^seq_lens: expected int32 \[4\], got torch.int64"),
        ("seq_lens", lambda x: x * 0 + 2, r"^seq_lens: seq 2 has 5 new tokens, but a length of 2"),
        ("cu_seqlens_q", lambda x: x[1:], r"^cu_seqlens_q: expected int32 \[5\], got torch.int32 \[4\]"),
        ("cu_seqlens_q", lambda x: x.flip(0), r"^cu_seqlens_q: expected to run from 0"),
        ("block_table", lambda x: x[:2], r"^block_table: expected int32 \[4, 3\].*got torch.int32 \[2, 3\]"),
        ("block_table", lambda x: x[:, :0], r"^block_table: seq 0 has 7 tokens, but 0 blocks"),
        ("block_table", lambda x: x + 100, r"^block_table: seq 0 names a block outside 0\.\.5"),
        ("block_table", lambda x: x - 100, r"^block_table: seq 0 names a block outside 0\.\.5"),
    ],
)
def test_errors_name_the_argument(name: str, change, message: str) -> None:
    case = Case(seqs=SHORT)
    arguments = case.arguments()
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=message):
        paged_attention(**arguments, softmax_scale=case.softmax_scale)


def test_an_empty_window_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^sliding_window: .*at least 1, got 0"):
        Case(seqs=SHORT).run(0)

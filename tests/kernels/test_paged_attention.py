"""Paged attention compared with fp64, for any lengths, pages, heads and leftovers in the cache."""

import pytest
import torch
from torch import Tensor

from kernels.attention import cpu as attention_cpu
from kernels.attention.paged_attention import paged_attention
from tests.helpers.attention import Case, tree_words

pytestmark = pytest.mark.usefixtures("implementation")
# (length, new tokens): around block and tile borders; decode, verify and prefill rows; long chunks after a prefix. A
# context of more than 1024 keys takes another path than short ones.
RAGGED = [(1, 1), (16, 16), (17, 5), (33, 0), (0, 0), (256, 1), (257, 2), (511, 8), (700, 100), (1024, 2), (1100, 3)]
SHORT = [(7, 1), (0, 0), (5, 5), (12, 3)]
# fp32: rounding in sums of up to 700 terms of size one. 16-bit: one rounding of the result and, in SDPA, one of each
# weight, each by half an ulp of numbers up to one.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected.double(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("sliding_window", [None, 1, 6, 300])
@pytest.mark.parametrize(("heads", "head_dim"), [((1, 1), 32), ((8, 2), 64)])
def test_reference_is_the_formula(heads: tuple[int, int], head_dim: int, sliding_window: int | None) -> None:
    case = Case(seqs=RAGGED, heads=heads, head_dim=head_dim, sliding_window=sliding_window)
    for actual, expected in zip(case.run_reference(), case.exact(), strict=True):
        assert_close(actual, expected, torch.float32)


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    ("heads", "head_dim"),
    [((2, 2), 32), ((3, 3), 96), ((4, 1), 64), ((8, 1), 128), ((6, 2), 128), ((16, 1), 64)],
)
def test_the_result_is_the_reference_for_all_heads_and_dtypes(
    heads: tuple[int, int], head_dim: int, dtype: torch.dtype, batch_invariant: bool
) -> None:
    case = Case(seqs=RAGGED, heads=heads, head_dim=head_dim, dtype=dtype)
    assert_close(case.run(batch_invariant=batch_invariant), case.run_reference()[0], dtype)


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("sliding_window", [1, 2, 63, 64, 256, 300, 10_000])
def test_sliding_window(sliding_window: int, batch_invariant: bool) -> None:
    case = Case(seqs=RAGGED, sliding_window=sliding_window)
    assert_close(case.run(batch_invariant=batch_invariant), case.run_reference()[0], torch.float32)


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("neighbours", [False, True])
@pytest.mark.parametrize("block_size", [1, 5, 16, 256, 1024])
def test_pages_of_any_size_and_order(block_size: int, neighbours: bool, batch_invariant: bool) -> None:
    case = Case(seqs=RAGGED, block_size=block_size, neighbours=neighbours)
    assert_close(case.run(batch_invariant=batch_invariant), case.run_reference()[0], torch.float32)


# Short seqs of the same kind are computed together. There are three kinds here, and two seqs are long.
ALIKE = [(40, 1), (9, 3), (63, 1), (33, 1), (11, 3), (2100, 1), (47, 2), (4000, 1), (50, 2), (15, 3), (8, 1)]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("neighbours", [False, True])
@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (6, 2)])
def test_seqs_side_by_side(heads: tuple[int, int], neighbours: bool, dtype: torch.dtype) -> None:
    case = Case(seqs=ALIKE, heads=heads, neighbours=neighbours, dtype=dtype)
    assert_close(case.run(), case.run_reference()[0], dtype)


def test_short_seqs_of_equal_shape_share_one_torch_call(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if implementation == "compiled":
        pytest.skip("one call serves all seqs")
    calls = []
    original = attention_cpu.F.scaled_dot_product_attention

    def count(*args: Tensor, **settings: object) -> Tensor:
        calls.append(args[0].shape[0])  # seqs
        return original(*args, **settings)

    monkeypatch.setattr(attention_cpu.F, "scaled_dot_product_attention", count)
    Case(seqs=ALIKE, heads=(8, 8), head_dim=64).run()
    assert sorted(calls) == [1, 1, 1, 2, 3, 3], "the long ones on their own, and (8, 1), which has too few keys to join"


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("neighbours", [False, True])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 32, 33, 255, 256, 257])
def test_lengths_at_block_and_tile_boundaries(length: int, neighbours: bool, batch_invariant: bool) -> None:
    seqs = [(length, new) for new in (1, 2, 15, 16, 17, length) if new <= length]
    case = Case(seqs=seqs, neighbours=neighbours)
    assert_close(case.run(batch_invariant=batch_invariant), case.run_reference()[0], torch.float32)


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("sliding_window", [None, 6])
@pytest.mark.parametrize("neighbours", [False, True])
def test_contents_of_unused_slots_have_no_influence(
    neighbours: bool, sliding_window: int | None, batch_invariant: bool
) -> None:
    options = {"seqs": RAGGED, "neighbours": neighbours, "sliding_window": sliding_window}
    clean = Case(**options, poison=0.0).run(batch_invariant=batch_invariant)
    for poison in (torch.nan, torch.inf, -torch.inf, 1e30):
        assert torch.equal(Case(**options, poison=poison).run(batch_invariant=batch_invariant), clean), poison


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_keys_before_the_window_have_no_influence(batch_invariant: bool) -> None:
    clean, dirty = (Case(seqs=[(700, 3), (700, 90)], sliding_window=250) for _ in range(2))
    for row in range(2):
        forgotten = dirty.block_table[row, :14].long()  # positions up to 223; the first query at 610 sees from 361
        dirty.k_cache[forgotten] = torch.nan
        dirty.v_cache[forgotten] = 1e30
    assert torch.equal(dirty.run(batch_invariant=batch_invariant), clean.run(batch_invariant=batch_invariant))


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
    case.q *= 1e4  # scores of about ten thousand: one key takes all the weight
    assert_close(case.run(batch_invariant=batch_invariant), case.run_reference()[0], torch.float32)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_inputs_stay_unchanged_and_strides_of_q_do_not_matter(dtype: torch.dtype) -> None:
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
        ("seq_lens", lambda x: x.long(), r"^seq_lens: expected int32 \[4\], .* got torch.int64"),
        ("seq_lens", lambda x: x * 0 + 2, r"^seq_lens: seq 2 has 5 new tokens, but a length of 2"),
        ("cu_seqlens_q", lambda x: x[1:], r"^cu_seqlens_q: expected int32 \[5\], .* got torch.int32 \[4\]"),
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
        Case(seqs=SHORT, sliding_window=0).run()


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("sliding_window", [None, 300])
def test_log_sums_are_returned_on_request(sliding_window: int | None, batch_invariant: bool) -> None:
    case = Case(seqs=RAGGED, heads=(6, 2), sliding_window=sliding_window)
    out, lse = case.run_with_lse(batch_invariant=batch_invariant)
    expected = case.run_reference()
    assert_close(out, expected[0], torch.float32)
    assert_close(lse, expected[1], torch.float32)


# The parents of the nodes of each seq's tree: a chain, a full tree, 64 nodes, a short and a long branch.
TREES: list[list[int | None]] = [
    [None, 0, 1],
    [None, 0, 0, 1, 1, 2, 2],
    [None, *(i // 3 for i in range(63))],
    [None, 0, 0, 2, 3, 4],
    [None],
]


def tree_case(sliding_window: int | None, *, dtype: torch.dtype = torch.float32) -> Case:
    seqs = [(prefix + len(tree), len(tree)) for prefix, tree in zip((16, 0, 490, 33, 7), TREES, strict=True)]
    words = torch.tensor([word for tree in TREES for word in tree_words(tree)])
    return Case(seqs=seqs, heads=(6, 2), ancestors=words, sliding_window=sliding_window, dtype=dtype)


@pytest.mark.parametrize("sliding_window", [None, 2, 20])
def test_the_reference_of_a_tree_is_the_formula(sliding_window: int | None) -> None:
    case = tree_case(sliding_window)
    for actual, expected in zip(case.run_reference(), case.exact(), strict=True):
        assert_close(actual, expected, torch.float32)


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("sliding_window", [None, 2, 20])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_a_tree_equals_its_reference(dtype: torch.dtype, sliding_window: int | None, batch_invariant: bool) -> None:
    case = tree_case(sliding_window, dtype=dtype)
    assert_close(case.run(batch_invariant=batch_invariant), case.run_reference()[0], dtype)
    assert_close(case.run_with_lse(batch_invariant=batch_invariant)[1], case.run_reference()[1], torch.float32)


def test_a_chain_written_as_a_tree_gives_the_same_result() -> None:
    chain = Case(seqs=[(20, 5), (64, 64)])
    tree = Case(
        seqs=chain.seqs, ancestors=torch.tensor(tree_words([None, 0, 1, 2, 3]) + tree_words([None, *range(63)]))
    )
    assert_close(tree.run(), chain.run(), torch.float32)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (torch.zeros(11), r"^ancestors: expected contiguous int64 \[11\], got torch.float32 \[11\]"),
        (torch.zeros(3, dtype=torch.int64), r"^ancestors: expected contiguous int64 \[11\], got torch.int64 \[3\]"),
    ],
)
def test_mask_words_of_the_wrong_shape_are_refused(words: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Case(seqs=[(20, 11)], ancestors=words).run()


def test_a_tree_of_more_nodes_than_bits_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^ancestors: a seq has 65 new tokens, more than 64"):
        Case(seqs=[(65, 65)], ancestors=torch.ones(65, dtype=torch.int64)).run()

"""Acceptance of drafted chains, compared with a loop that anyone can read."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.sampling.verify_chain import verify_chain

Chain = tuple[list[int], list[int]]  # k + 1 target tokens, k drafts
TOKENS = st.integers(0, 2)
CHAINS = st.lists(TOKENS, max_size=6).flatmap(
    lambda drafts: st.tuples(st.lists(TOKENS, min_size=len(drafts) + 1, max_size=len(drafts) + 1), st.just(drafts))
)


def verify_by_hand(target: list[int], draft: list[int]) -> tuple[int, int]:
    accepted = 0
    while accepted < len(draft) and draft[accepted] == target[accepted]:
        accepted += 1
    return accepted, target[accepted]


def verify(chains: list[Chain]) -> list[tuple[int, int]]:
    target = torch.tensor([token for tokens, _ in chains for token in tokens])
    draft = torch.tensor([token for _, drafts in chains for token in [*drafts, -1]])
    cu_rows = torch.tensor([0] + [len(tokens) for tokens, _ in chains], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    num_accepted, next_token_ids = verify_chain(target, draft, cu_rows)
    assert num_accepted.dtype == next_token_ids.dtype == torch.int64
    return list(zip(num_accepted.tolist(), next_token_ids.tolist(), strict=True))


@given(st.lists(CHAINS, min_size=1, max_size=8))
def test_equals_the_loop(chains: list[Chain]) -> None:
    assert verify(chains) == [verify_by_hand(*chain) for chain in chains]


def test_agreement_after_a_mismatch_does_not_count() -> None:
    assert verify([([5, 6, 7, 8], [5, 9, 7])]) == [(1, 6)]


def test_no_drafts_and_all_accepted() -> None:
    assert verify([([4], []), ([1, 2, 3], [1, 2]), ([4], [])]) == [(0, 4), (2, 3), (0, 4)]


def test_a_void_target_token_stops_the_chain_even_in_the_last_row() -> None:
    assert verify([([3, -1], [3]), ([7], [])]) == [(1, -1), (0, 7)]


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="one shape"):
        verify_chain(torch.zeros(3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), torch.tensor([0, 3]))


def test_strided_rows_are_refused() -> None:
    targets, drafts, cu_rows = torch.tensor([1, 9, 2, 9])[::2], torch.tensor([1, -1]), torch.tensor([0, 2])
    with pytest.raises(ValueError, match="target_token_ids must be contiguous"):
        verify_chain(targets, drafts, cu_rows)

"""The small kernels around the choice of a token: penalties, checks, masses, sums, and the verdict on drafts."""

import pytest
import torch
from torch import Tensor

from kernels.sampling.non_finite import non_finite_reference, screen
from kernels.sampling.penalties import apply_bias, apply_mask, apply_penalties, apply_penalties_reference
from kernels.sampling.probability_mass import mass_and_rank, mass_and_rank_reference, total_mass, total_mass_reference
from kernels.sampling.softmax_sum import softmax_sum, softmax_sum_reference
from kernels.sampling.token_bits import apply_token_bits
from kernels.sampling.verify_chain import verify_chain, verify_chain_reference


def random_logits(num_rows: int, num_tokens: int) -> Tensor:
    return torch.randn(num_rows, num_tokens, generator=torch.Generator().manual_seed(num_tokens)) * 5


@pytest.mark.parametrize(("first_token_id", "num_tokens"), [(0, 300), (100, 60)])
def test_edits_of_single_logits(first_token_id: int, num_tokens: int, device: torch.device) -> None:
    """On the whole vocabulary, and on a shard, which entries of other shards' tokens do not change."""
    generator = torch.Generator().manual_seed(0)
    logits = random_logits(3, 300)
    pairs = torch.randperm(900, generator=generator)[:500]
    rows, token_ids = pairs // 300, pairs % 300
    seen = torch.rand(500, generator=generator) < 0.7
    counts = torch.randint(0, 4, (500,), generator=generator).float()
    settings = torch.tensor([[1.3, 0.5, 0.25], [0.7, -1.0, 0.1], [1e-40, 0.3, 1e-7]])
    bias = torch.randn(500, generator=generator)
    shard = logits[:, first_token_id : first_token_id + num_tokens].to(device).contiguous()
    entries = (rows.to(device), token_ids.to(device))
    apply_penalties(
        shard,
        *entries,
        first_token_id=first_token_id,
        seen=seen.to(device),
        output_counts=counts.to(device),
        settings=settings.to(device),
    )
    apply_bias(shard, *entries, bias.to(device), first_token_id=first_token_id)
    masked = (rows[:40].to(device).repeat(2), token_ids[:40].to(device).repeat(2))
    apply_mask(shard, *masked, first_token_id=first_token_id)
    apply_penalties_reference(logits, rows, token_ids, seen=seen, output_counts=counts, settings=settings)
    logits[rows, token_ids] += bias
    logits[rows[:40], token_ids[:40]] = -torch.inf
    assert torch.equal(shard.cpu(), logits[:, first_token_id : first_token_id + num_tokens])


@pytest.mark.parametrize(("first_token_id", "num_tokens"), [(0, 300), (100, 60), (260, 60)])
def test_tokens_without_their_bit_are_excluded(first_token_id: int, num_tokens: int, device: torch.device) -> None:
    """On the whole vocabulary and on shards, the last of which has more columns than there are bits."""
    generator = torch.Generator().manual_seed(1)
    logits = random_logits(4, num_tokens)
    bits = torch.randint(-(2**31), 2**31, (2, 9), generator=generator, dtype=torch.int64).to(torch.int32)
    shard = logits.to(device)
    apply_token_bits(shard, torch.tensor([3, 1], device=device), bits.to(device), first_token_id=first_token_id)
    for row, words in ((3, bits[0].tolist()), (1, bits[1].tolist())):
        for column in range(num_tokens):
            word, bit = divmod(first_token_id + column, 32)
            if word >= len(words) or not words[word] >> bit & 1:
                logits[row, column] = -torch.inf
    assert torch.equal(shard.cpu(), logits)


def test_no_entries(device: torch.device) -> None:
    logits, none = torch.zeros(2, 3, device=device), torch.empty(0, dtype=torch.int64, device=device)
    apply_mask(logits, none, none)
    assert not logits.any()


@pytest.mark.parametrize("num_tokens", [1, 7, 1500])
def test_rows_that_are_not_finite_are_found(num_tokens: int, device: torch.device) -> None:
    logits = random_logits(5, num_tokens)
    logits[1, num_tokens // 2] = torch.nan
    logits[2, -1] = torch.inf
    logits[3, 0] = -torch.inf
    logits[4] = torch.finfo(torch.float32).max
    found = screen(logits.to(device))[1]
    assert found.cpu().tolist() == non_finite_reference(logits).tolist() == [False, True, True, True, False]


@pytest.mark.parametrize("num_tokens", [1, 1300])
def test_masses_are_the_integers_of_the_reference(num_tokens: int, device: torch.device) -> None:
    logits = random_logits(4, num_tokens)
    logits[1, num_tokens // 2 :] = -torch.inf
    logits[1, 0] = 3.0
    largest = logits.amax(dim=1)
    values = logits[:, num_tokens // 3].contiguous()
    found = mass_and_rank(logits.to(device), largest.to(device), values.to(device))
    assert torch.equal(found.cpu(), mass_and_rank_reference(logits, largest, values))
    mass = total_mass(logits.to(device), largest.to(device), (largest - 3).to(device))
    assert torch.equal(mass.cpu(), total_mass_reference(logits, largest, largest - 3))


@pytest.mark.parametrize("num_tokens", [1, 2100])
def test_softmax_sum(num_tokens: int, device: torch.device) -> None:
    logits, temperature = random_logits(3, num_tokens), torch.tensor([0.5, 0.0, 2.0])
    logits[2] = -torch.inf
    largest, total = softmax_sum(logits.to(device), temperature.to(device))
    expected_largest, expected_total = softmax_sum_reference(logits, temperature)
    assert torch.equal(largest.cpu(), expected_largest)
    torch.testing.assert_close(total.cpu(), expected_total, rtol=1e-5, atol=0)
    assert float(total[2]) == 0


def test_verdicts_on_ragged_chains(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(4)
    lengths = [1, 2, 5, 1, 40, 33, 32, 65, 3]  # of chains; some are longer than the kernel's blocks
    target, draft = torch.randint(0, 9, (2, sum(lengths)), generator=generator)
    cu_rows = torch.tensor([0, *lengths]).cumsum(0)
    agreeing = torch.rand(sum(lengths), generator=generator) < 0.95
    draft = torch.where(agreeing, target, draft)
    draft[cu_rows[1:] - 1] = -1
    draft[cu_rows[7] : cu_rows[8] - 1] = target[cu_rows[7] : cu_rows[8] - 1]  # all 64 are accepted
    target[cu_rows[2]] = -2  # logits that were not finite
    target[cu_rows[8] - 1] = -1  # the last row ends its chain, whatever the target chose there
    for dtype in (torch.int32, torch.int64):
        found = verify_chain(target.to(device), draft.to(device), cu_rows.to(device, dtype))
        expected = verify_chain_reference(target, draft, cu_rows)
        assert torch.equal(found[0].cpu(), expected[0])
        assert torch.equal(found[1].cpu(), expected[1])
    assert int(expected[0][7]) == 64

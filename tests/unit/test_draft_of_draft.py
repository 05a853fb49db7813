"""A draft with a lookup beneath it drafts what it would have drafted alone, in fewer forwards.

Each property comes with levels that break it (negative controls): a test that passes with those would prove nothing.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import workers.engine.draft_engine
from echelon.pb.sampling_pb2 import SeqSampling
from kernels.sampling.verify_chain import verify_chain
from tests.helpers.engines import DRAFT, assemble_draft, drive, make_engine, poisoned_model
from tests.helpers.engines import POISON as BREAKS
from tests.helpers.rounds import Driver, greedy, seeded
from tests.helpers.tiny_models import TinyModel, make_tiny_model
from workers.engine.chain_lookup import ChainLookup, longest_repeated
from workers.engine.draft_engine import DraftEngine
from workers.engine.engine import ModelRunner
from workers.engine.lower_draft import Proposal
from workers.models.batch import Batch

REPEATED = [5, 17, 3, 80, 41] * 4
PROMPTS = [REPEATED, [*REPEATED[:12], 9, 5, 17], [7] * 11, [1, 2, 3, 4, 5, 6]]
SAMPLINGS: dict[str, Callable[[int], SeqSampling]] = {
    "greedy": lambda slot: greedy(),
    "cold": lambda slot: seeded(slot, temperature=0.2),
    "penalties": lambda slot: seeded(slot, temperature=0.3, repetition_penalty=1.3, frequency_penalty=0.4),
    "truncated": lambda slot: seeded(slot, top_k=3, top_p=0.9),
}


class Oracle(ChainLookup):
    """Proposes tokens of a given chain, some of them wrong, so that every number of them is kept."""

    def __init__(self, chains: list[list[int]]) -> None:
        super().__init__()
        self._chains, self._calls = chains, 0

    def propose(self, token_ids: Any, most: int) -> Proposal:
        held = token_ids.tolist()
        chain = next(chain for chain in self._chains if chain[: len(held)] == held)
        self._calls += 1
        proposed = chain[len(held) : len(held) + min(most, 1 + self._calls % 5)]
        if proposed and self._calls % 3:
            proposed[-1] = (proposed[-1] + 1) % 100
        return Proposal(proposed, 1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_tiny_model("llama", tmp_path_factory.mktemp("tiny"), head_dim=32)


def engine_of(tiny: TinyModel, lookup: ChainLookup | None = None, **changes: Any) -> tuple[DraftEngine, Driver]:
    engine = make_engine(tiny.folder, DRAFT, **changes)
    assert isinstance(engine, DraftEngine)
    engine.lower = lookup
    return engine, drive(engine)


def chains_of(driver: Driver, sampling: Callable[[int], SeqSampling], **options: Any) -> list[Any]:
    """Two rounds of drafts for all prompts; the second one goes on."""
    seqs = [driver.start(slot, prompt, sampling(slot)) for slot, prompt in enumerate(PROMPTS)]
    answers = [driver.run(*[(seq, driver.draft_row(seq, n)) for seq in seqs], **options) for n in (9, 6)]
    return [*zip(*answers, strict=True)]


def drafted(answers: list[Any]) -> list[list[int]]:
    return [[token_id for result in results for token_id in result.token_ids] for results in answers]


@pytest.mark.parametrize("name", SAMPLINGS)
def test_the_chain_is_the_drafts_own(tiny: TinyModel, name: str) -> None:
    alone = chains_of(engine_of(tiny)[1], SAMPLINGS[name], num_alternatives=2, confidences=True)
    oracle = Oracle([prompt + chain for prompt, chain in zip(PROMPTS, drafted(alone), strict=True)])
    _, driver = engine_of(tiny, oracle)
    answers = chains_of(driver, SAMPLINGS[name], num_alternatives=2, confidences=True)
    assert drafted(answers) == drafted(alone)
    assert 0 < oracle.num_kept < oracle.num_proposed, "some proposals were kept, some were not"
    for ours, theirs in zip(answers, alone, strict=True):
        for mine, other in zip(ours, theirs, strict=True):
            assert list(mine.alternative_token_ids) == list(other.alternative_token_ids)
            np.testing.assert_allclose(mine.confidences, other.confidences, rtol=1e-3)


def keep_all(choices: Tensor, proposed: Tensor, cu_rows: Tensor) -> tuple[Tensor, Tensor]:
    return cu_rows[1:] - cu_rows[:-1] - 1, choices[cu_rows[1:] - 1]


def keep_one_more(choices: Tensor, proposed: Tensor, cu_rows: Tensor) -> tuple[Tensor, Tensor]:
    num_kept, next_ids = verify_chain(choices, proposed, cu_rows)
    return torch.minimum(num_kept + 1, cu_rows[1:] - cu_rows[:-1] - 1), next_ids


@pytest.mark.parametrize("rule", [keep_all, keep_one_more])
def test_another_rule_would_show(tiny: TinyModel, rule: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = chains_of(engine_of(tiny)[1], SAMPLINGS["cold"])
    oracle = Oracle([prompt + chain for prompt, chain in zip(PROMPTS, drafted(alone), strict=True)])
    _, driver = engine_of(tiny, oracle)
    monkeypatch.setattr(workers.engine.draft_engine, "verify_chain", rule)
    try:
        shown = drafted(chains_of(driver, SAMPLINGS["cold"])) != drafted(alone)
    except StopIteration:  # the oracle does not know such a chain
        shown = True
    assert shown


def test_right_proposals_save_forwards(tiny: TinyModel) -> None:
    def chain_of(lookup: ChainLookup | None) -> tuple[list[int], int, int]:
        forwards: list[int] = []

        class CountingRunner(ModelRunner):
            def forward(self, batch: Batch) -> Tensor:
                forwards.append(len(batch.input_ids))
                return super().forward(batch)

            def draft_forward(self, batch: Batch) -> Tensor:
                forwards.append(len(batch.input_ids))
                return super().draft_forward(batch)

        engine = assemble_draft(tiny.folder, CountingRunner).engine
        engine.lower = lookup
        driver = drive(engine)
        seq = driver.start(0, REPEATED, greedy())
        result = driver.send(driver.round([driver.draft_row(seq, 24)]))
        return list(result.rows[0].token_ids), len(forwards), result.num_steps

    class Right(Oracle):
        def propose(self, token_ids: Any, most: int) -> Proposal:
            return Proposal(self._chains[0][len(token_ids) : len(token_ids) + min(most, 7)], 1)

    alone, _, num_steps = chain_of(None)
    chain, num_forwards, num_steps_told = chain_of(Right([REPEATED + alone]))
    assert chain == alone
    assert num_forwards == 3, "each brings 8 tokens"
    assert num_steps == num_steps_told == 24, "the policy weighs the time of a draft, whoever found it"


def test_many_chains_get_few_proposals(tiny: TinyModel) -> None:
    """A forward of many rows takes longer than one of few."""
    seen: list[int] = []

    class Eager(ChainLookup):
        def propose(self, token_ids: Any, most: int) -> Proposal:
            seen.append(most)
            return super().propose(token_ids, most)

    _, driver = engine_of(tiny, Eager())
    for num_chains in (1, 4, 8):
        seqs = [driver.start(slot, REPEATED, greedy()) for slot in range(num_chains)]
        rows = [driver.draft_row(seq, 20) for seq in seqs]
        seen.clear()
        driver.send(driver.round(rows))
        assert max(seen) == 16 // num_chains - 1
        driver.send(driver.round([], free_slots=range(num_chains)))


def test_a_break_down_ends_only_its_chain(tiny: TinyModel, tmp_path: Path) -> None:
    sick = poisoned_model(tiny.folder, tmp_path / "poisoned")
    engine = make_engine(sick, DRAFT, lower_draft="suffix")
    driver = drive(engine)
    well = driver.start(0, PROMPTS[0], greedy())
    ill = driver.start(1, [*REPEATED, BREAKS, 8, *REPEATED, BREAKS], greedy())
    result, broken = driver.run((well, driver.draft_row(well, 6)), (ill, driver.draft_row(ill, 6)))
    assert len(result.token_ids) == 6
    assert broken.non_finite
    assert not broken.token_ids


@pytest.mark.parametrize(
    ("token_ids", "expected"),
    [
        ([], (0, 0)),
        ([4], (0, 0)),
        ([4, 5], (0, 0)),
        ([4, 4], (1, 1)),
        ([4, 5, 4], (1, 1)),
        ([1, 2, 3, 9, 1, 2, 8, 2, 3, 1, 2], (2, 6)),
        ([1, 2, 1, 2, 1, 2], (4, 4)),
        ([7] * 20, (8, 19)),
    ],
)
def test_the_longest_suffix_that_occurred_before(token_ids: list[int], expected: tuple[int, int]) -> None:
    assert longest_repeated(np.array(token_ids, np.int32), 8) == expected


def test_what_is_never_kept_is_hardly_proposed_any_more() -> None:
    lookup, text = ChainLookup(), np.array(REPEATED, np.int32)
    counts = []
    for _ in range(400):
        found = lookup.propose(text, 7)
        lookup.observe(found, 0)
        counts.append(len(found.token_ids))
    assert counts[0] > 0
    assert sum(counts[100:]) < 0.1 * 300
    for _ in range(3000):
        found = lookup.propose(text, 7)
        lookup.observe(found, len(found.token_ids))
    assert len(lookup.propose(text, 7).token_ids) == 7
    assert len(lookup.propose(text, 3).token_ids) == 3

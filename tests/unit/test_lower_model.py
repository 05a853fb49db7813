"""A draft with a small model beneath it drafts what it would have drafted alone, whatever that model does."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import workers.engine.draft_engine
import workers.process.lower_level
from checkpoint.config_json import load_model_config
from childproc.spec import SpecError
from echelon.pb.sampling_pb2 import SeqSampling
from echelon.pb.worker_pb2 import Row
from kernels.sampling.verify_chain import verify_chain
from tests.helpers.engines import DRAFT, KV_CACHE_BYTES, POISON, TARGET, drive, make_engine, poisoned_model
from tests.helpers.rounds import Driver, Seq, greedy, seeded
from tests.helpers.tiny_models import TinyModel, make_tiny_model
from workers.engine.draft_engine import DraftEngine
from workers.engine.lower_draft import Pace, StepCosts
from workers.engine.lower_model import LowerModel

PROMPTS = [[5, 17, 3, 80, 41] * 3, [7, 9, 11, 2, 4, 6, 90, 33, 12], [1, 2, 3, 4, 5, 6], [64]]
SAMPLINGS: dict[str, Callable[[int], SeqSampling]] = {
    "greedy": lambda slot: greedy(),
    "cold": lambda slot: seeded(slot, temperature=0.2),
    "penalties": lambda slot: seeded(slot, temperature=0.3, repetition_penalty=1.3, frequency_penalty=0.4),
    "truncated": lambda slot: seeded(slot, top_k=3, top_p=0.9),
}
FREE = StepCosts(lower_step=0.0, row=0.0)  # so that as many tokens are proposed as may be


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_tiny_model("llama", tmp_path_factory.mktemp("tiny"), head_dim=32)


@pytest.fixture(scope="module")
def near(tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that often agrees with the draft, but not always."""
    folder = poisoned_model(tiny.folder, tmp_path_factory.mktemp("near") / "model")
    weights = load_file(tiny.folder / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    for tensor in weights.values():
        tensor += 0.03 * tensor.std() * torch.randn(tensor.shape, generator=generator)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@dataclasses.dataclass
class Levels:
    engine: DraftEngine
    driver: Driver
    lower: LowerModel | None

    def replace_model(self, change: Callable[[Any], Any]) -> None:
        assert self.lower is not None
        self.lower._runner = dataclasses.replace(self.lower._runner, model=change(self.lower._runner.model))

    @property
    def counts(self) -> tuple[int, int]:
        """Proposals, and those that the draft kept."""
        return (self.lower.num_proposed, self.lower.num_kept) if self.lower else (0, 0)


def levels_of(draft: Path, lower: Path | None = None, **changes: Any) -> Levels:
    if lower is not None:
        changes["lower_model"] = str(lower)
    with pytest.MonkeyPatch.context() as patch:  # what this machine measures depends on who uses it besides
        patch.setattr(workers.process.lower_level, "step_costs", lambda *_, **__: FREE)
        engine = make_engine(draft, DRAFT, **changes)
    assert isinstance(engine, DraftEngine)
    assert isinstance(engine.lower, LowerModel | None)
    return Levels(engine, drive(engine), engine.lower)


def chains_of(driver: Driver, sampling: Callable[[int], SeqSampling]) -> list[list[int]]:
    """The chains of all prompts: two rounds, and a third after a verdict that cut each chain."""
    seqs = [driver.start(slot, prompt, sampling(slot)) for slot, prompt in enumerate(PROMPTS)]
    first = driver.run(*[(seq, driver.draft_row(seq, 9)) for seq in seqs])
    second = driver.run(*[(seq, driver.draft_row(seq, 6)) for seq in seqs])
    cut = driver.run(*[(seq, cut_row(driver, seq)) for seq in seqs])
    results = zip(first, second, cut, strict=True)
    return [[token_id for result in each for token_id in result.token_ids] for each in results]


def cut_row(driver: Driver, seq: Seq) -> Row:
    return driver.draft_row(seq, 7, crop_len=seq.num_prompt + 4, append=[(seq.token_ids[seq.num_prompt + 4] + 1) % 90])


@pytest.mark.parametrize("name", SAMPLINGS)
def test_the_chain_is_the_drafts_own(tiny: TinyModel, near: Path, name: str) -> None:
    alone = chains_of(levels_of(tiny.folder).driver, SAMPLINGS[name])
    levels = levels_of(tiny.folder, near)
    assert chains_of(levels.driver, SAMPLINGS[name]) == alone
    num_proposed, num_kept = levels.counts
    assert 0 < num_kept < num_proposed, "some proposals were kept, some were not"


def keep_one_more(choices: torch.Tensor, proposed: torch.Tensor, cu_rows: torch.Tensor) -> Any:
    num_kept, next_ids = verify_chain(choices, proposed, cu_rows)
    return torch.minimum(num_kept + 1, cu_rows[1:] - cu_rows[:-1] - 1), next_ids


@pytest.mark.parametrize("name", SAMPLINGS)
def test_a_draft_that_keeps_by_another_rule_would_show(
    tiny: TinyModel, near: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = chains_of(levels_of(tiny.folder).driver, SAMPLINGS[name])
    monkeypatch.setattr(workers.engine.draft_engine, "verify_chain", keep_one_more)
    # What it keeps is dropped from the answers, or proposed tokens replace its own: either shows.
    assert chains_of(levels_of(tiny.folder, near).driver, SAMPLINGS[name]) != alone


@pytest.mark.parametrize("name", SAMPLINGS)
def test_a_model_like_the_draft_is_always_right(tiny: TinyModel, name: str) -> None:
    """Across rounds, cuts and penalties it has the draft's history, noise and settings; its KV is never stale."""
    levels = levels_of(tiny.folder, tiny.folder)
    chains_of(levels.driver, SAMPLINGS[name])
    num_proposed, num_kept = levels.counts
    assert num_kept == num_proposed > 40


def test_branches_blocks_that_change_hands_and_cached_prefixes(tiny: TinyModel) -> None:
    levels = levels_of(tiny.folder, tiny.folder)
    driver = levels.driver
    parent = driver.start(0, PROMPTS[0], greedy())
    row = driver.draft_row(parent, 6)
    blocks = list(row.new_block_ids)
    driver.run((parent, row))
    branch = driver.fork(parent, 1, parent.num_prompt + 3)
    driver.run((branch, driver.draft_row(branch, 6, append=[8])), (parent, driver.draft_row(parent, 5)))
    driver.send(driver.round([], free_slots=[0, 1]))
    driver.free_blocks += blocks
    other = driver.start(2, PROMPTS[1] * 2, greedy())  # takes the blocks of the first one
    driver.run((other, driver.draft_row(other, 8)))
    assert levels.counts[0] == levels.counts[1] > 15


def test_a_switched_off_level_proposes_nothing(tiny: TinyModel) -> None:
    levels = levels_of(tiny.folder, tiny.folder)
    driver = levels.driver
    on, off = driver.start(0, PROMPTS[0], greedy()), driver.start(1, PROMPTS[1], greedy())
    row = driver.draft_row(off, 6)
    row.without_lower = True
    driver.run((off, row))
    assert levels.counts == (0, 0)
    row = driver.draft_row(off, 6)
    row.without_lower = True
    driver.run((on, driver.draft_row(on, 6)), (off, row))
    assert levels.counts == (5, 5), "of the other seq"
    driver.run((off, driver.draft_row(off, 6)))
    assert levels.counts == (10, 10), "it is back, and has caught up"


def test_it_follows_a_prompt_that_the_draft_computes_in_parts(tiny: TinyModel) -> None:
    levels = levels_of(tiny.folder, tiny.folder)
    driver, seen = levels.driver, list[int]()
    levels.replace_model(lambda model: Counting(model, seen))
    seq = driver.start(0, list(range(1, 41)), greedy())
    part = Row(slot=0, new_block_ids=driver.blocks_for(seq, 46), chunk_len=32)
    driver.send(driver.round([part]))
    seq.num_computed = 32
    assert seen == [32], "while the prompt is computed, not when drafts are waited for"
    driver.run((seq, driver.draft_row(seq, 6)))
    assert seen[1] == 8
    assert levels.counts == (5, 5)


@dataclasses.dataclass
class Failing:
    """A model whose memory has run out."""

    model: Any

    def forward(self, batch: Any, kv_caches: Any) -> Any:
        raise torch.OutOfMemoryError("none left")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


class Counting:
    """A model that notes the tokens of its forwards."""

    def __init__(self, model: Any, seen: list[int]) -> None:
        self._model, self._seen = model, seen

    def forward(self, batch: Any, kv_caches: Any) -> Any:
        self._seen.append(len(batch.input_ids))
        return self._model.forward(batch, kv_caches)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def test_it_dies_alone(tiny: TinyModel, caplog: pytest.LogCaptureFixture) -> None:
    alone = chains_of(levels_of(tiny.folder).driver, SAMPLINGS["cold"])
    levels = levels_of(tiny.folder, tiny.folder)
    levels.replace_model(Failing)
    assert chains_of(levels.driver, SAMPLINGS["cold"]) == alone
    assert levels.counts == (0, 0)
    assert caplog.text.count("goes on without it") == 1


def test_a_break_down_of_its_numbers_costs_proposals_only(tiny: TinyModel, tmp_path: Path) -> None:
    sick = poisoned_model(tiny.folder, tmp_path / "sick")
    prompts = [[3, POISON, 8, 4], [3, 5, 8, 4]]

    def chains(levels: Levels) -> list[list[int]]:
        seqs = [levels.driver.start(slot, prompt, greedy()) for slot, prompt in enumerate(prompts)]
        return [list(r.token_ids) for r in levels.driver.run(*[(s, levels.driver.draft_row(s, 6)) for s in seqs])]

    levels = levels_of(tiny.folder, sick)
    assert chains(levels) == chains(levels_of(tiny.folder))
    assert levels.counts == (5, 5), "of the seq without the token"


@pytest.mark.parametrize("vocab_sizes", [(100, 120), (120, 100)])
def test_vocabularies_may_differ_in_size(tiny: TinyModel, tmp_path: Path, vocab_sizes: tuple[int, int]) -> None:
    draft, lower = (
        make_tiny_model("llama", tmp_path / name, seed=seed, head_dim=32, vocab_size=size).folder
        for name, seed, size in zip(("draft", "lower"), (1, 2), vocab_sizes, strict=True)
    )
    levels, alone = levels_of(draft, lower), levels_of(draft)
    prompts = [[3, 5, 8, 4], [3, 99, 8]] + [[3, 110, 8]] * (vocab_sizes[0] > 110)
    for slot, prompt in enumerate(prompts):
        chains = []
        for each in (levels, alone):
            seq = each.driver.start(slot, prompt, seeded(slot))
            chains.append(list(each.driver.run((seq, each.driver.draft_row(seq, 9)))[0].token_ids))
        assert chains[0] == chains[1]
    assert levels.counts[0] > 0


def test_its_cache_is_part_of_the_memory_that_was_given(tiny: TinyModel) -> None:
    alone, levels = levels_of(tiny.folder), levels_of(tiny.folder, tiny.folder)
    info = levels.engine.info
    assert info.num_blocks == alone.engine.info.num_blocks // 2
    assert info.kv_cache_bytes == info.lower_kv_cache_bytes
    assert info.kv_cache_bytes + info.lower_kv_cache_bytes <= KV_CACHE_BYTES
    assert info.lower_weight_bytes == info.weight_bytes
    assert load_model_config(tiny.folder).num_layers == info.num_layers


def test_workers_refuse_what_cannot_be(tiny: TinyModel) -> None:
    lower = str(tiny.folder)
    with pytest.raises(SpecError, match="for a draft only"):
        make_engine(tiny.folder, TARGET, lower_model=lower)
    with pytest.raises(SpecError, match="excludes lower_model"):
        make_engine(tiny.folder, DRAFT, lower_model=lower, lower_draft="suffix")
    with pytest.raises(SpecError, match="layer-parallel"):
        make_engine(tiny.folder, DRAFT, lower_model=lower, lp_size=2)


@pytest.mark.parametrize(
    ("kept", "costs", "expected"),
    [
        (1.0, StepCosts(lower_step=0.05, row=0.02), 7),
        (0.5, StepCosts(lower_step=0.05, row=0.02), 3),
        (0.5, StepCosts(lower_step=0.9, row=0.1), 0),
        (0.0, StepCosts(lower_step=0.05, row=0.02), 0),
    ],
)
def test_the_number_of_proposals_follows_acceptance_and_cost(kept: float, costs: StepCosts, expected: int) -> None:
    pace = Pace(costs)
    for _ in range(400):
        pace.observe(int(kept * 2), 2)
    assert pace.num_worth() == expected
    assert pace.is_resting == (expected == 0)
    later = [pace.num_worth() for _ in range(Pace.EXPLORE_EVERY)]
    assert (sum(later) == 1) == (expected == 0), "what seems worth nothing is tried now and then"

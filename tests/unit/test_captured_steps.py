"""Captured steps on a CPU, where a capture is the step itself: the same tokens, and KV only where the batch says."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint.captured_sizes import StepSize, fitting, step_sizes
from echelon.pb.process_pb2 import WorkerSpec
from echelon.pb.sampling_pb2 import SeqSampling
from echelon.pb.worker_pb2 import SeqInit
from tests.helpers.engines import DRAFT, POISON, TARGET, drive, engine_spec, interleave, make_engine, poisoned_model
from tests.helpers.rounds import Driver, greedy, seeded
from tests.helpers.tiny_models import make_tiny_model
from workers.captured import captured_model
from workers.captured.captured_model import CapturedModel
from workers.collectives import SoloGroup
from workers.engine.kv_cache import KVLayout
from workers.engine.seq_state import Limits, SeqTable
from workers.models.decoder import KVCache
from workers.models.loading import load_model
from workers.process.cohort import Cohort
from workers.process.load import load_engines
from workers.sampling.sampler import Sampler

CPU = torch.device("cpu")
PROMPTS = [[5, 99, 3, 14, 15, 92, 6, 53, 58, 9, 79], [31, 41], [7] * 17]
SAMPLINGS = {
    "plain": [greedy(), seeded(2), seeded(3, temperature=0.3)],
    "processed": [seeded(1, top_k=20, presence_penalty=1.5), seeded(2, logprobs=2), greedy(frequency_penalty=0.7)],
}
NUM_TOKENS = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model whose forwards are operators on a CPU too: its heads do not suit the native kernels."""
    return make_tiny_model("llama", tmp_path_factory.mktemp("tiny"), head_dim=24).folder


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What captured steps have answered."""
    done: list[str] = []
    for name in ("forward", "draft"):
        original = getattr(CapturedModel, name)

        def observed(self: CapturedModel, *args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Any:
            result = original(self, *args, **kwargs)
            done.extend([name] * (result is not None))
            return result

        monkeypatch.setattr(CapturedModel, name, observed)
    return done


@pytest.mark.parametrize("settings", SAMPLINGS)
def test_decoding_and_verifying_give_the_plain_streams(folder: Path, settings: str, replays: list[str]) -> None:
    plain, captured = (drive(make_engine(folder, TARGET, captured_new_tokens=number)) for number in (0, 5))
    del replays[:]
    streams = []
    for prompt, sampling in zip(PROMPTS, SAMPLINGS[settings], strict=True):
        streams.append(plain.generate(plain.start(len(streams), prompt, sampling), NUM_TOKENS))
    assert not replays
    seqs = [captured.start(slot, prompt, SAMPLINGS[settings][slot]) for slot, prompt in enumerate(PROMPTS)]
    interleave(captured, list(zip(seqs, streams, strict=True)), random.Random(1), NUM_TOKENS)
    assert [seq.output[:NUM_TOKENS] for seq in seqs] == streams
    assert len(replays) > NUM_TOKENS / 5


def drafted(
    driver: Driver, samplings: Sequence[SeqSampling], **settings: Any
) -> tuple[list[tuple[Any, ...]], list[float]]:
    """All that three chains answer while they grow, are cut and continue: tokens and their runners-up, confidences."""
    seqs = [driver.start(slot, prompt, samplings[slot]) for slot, prompt in enumerate(PROMPTS)]
    answers, confidences = [], []
    for cut, numbers in ((0, (6, 6, 6)), (3, (4, 1, 7)), (0, (20, 3, 5)), (1, (5, 5, 5))):
        rows = []
        for seq, number in zip(seqs, numbers, strict=True):
            length = len(seq.token_ids) - cut
            rows.append((seq, driver.draft_row(seq, number, length, [40 + cut] if cut else [])))
        for result in driver.run(*rows, **settings):
            answers.append((list(result.token_ids), list(result.alternative_token_ids)))
            confidences += result.confidences
    return answers, confidences


def assert_same_drafts(folder: Path, samplings: Sequence[SeqSampling], **asked: Any) -> None:
    plain, captured = (drive(make_engine(folder, DRAFT, captured_new_tokens=number)) for number in (0, 2))
    expected, confidences = drafted(plain, samplings, **asked)
    assert drafted(captured, samplings, **asked) == (expected, pytest.approx(confidences, rel=1e-4))


@pytest.mark.parametrize(
    "asked", [{}, {"confidences": True}, {"num_alternatives": 2}, {"num_alternatives": 3, "confidences": True}]
)
@pytest.mark.parametrize("settings", SAMPLINGS)
def test_chains_grow_as_step_by_step(folder: Path, settings: str, asked: dict[str, Any], replays: list[str]) -> None:
    assert_same_drafts(folder, SAMPLINGS[settings], **asked)
    assert ("draft" in replays) == (settings == "plain")
    assert "forward" in replays


def test_more_runners_up_than_a_step_keeps_are_found_too(folder: Path) -> None:
    assert_same_drafts(folder, SAMPLINGS["plain"], num_alternatives=5)


def test_a_chain_whose_logits_break_ends_and_the_others_go_on(folder: Path, tmp_path: Path) -> None:
    broken = poisoned_model(folder, tmp_path / "poisoned")
    answers = []
    for number in (0, 2):
        driver = drive(make_engine(broken, DRAFT, captured_new_tokens=number))
        biased = seeded(7, logit_bias={POISON: 100.0})  # not plain, so its first draft is chosen step by step
        seqs = [driver.start(slot, [3, 1, 4], sampling) for slot, sampling in enumerate((greedy(), biased))]
        results = driver.run(*((seq, driver.draft_row(seq, 6)) for seq in seqs))
        answers.append([(tuple(result.token_ids), result.non_finite) for result in results])
        driver.run((seqs[0], driver.draft_row(seqs[0], 3, len(seqs[0].token_ids), [POISON])))
        results = driver.run((seqs[0], driver.draft_row(seqs[0], 3, len(PROMPTS[1]) + 1, [9])))
        answers[-1].append((tuple(results[0].token_ids), results[0].non_finite))
    assert answers[0] == answers[1]


def capture(folder: Path, *, drafts: bool) -> tuple[CapturedModel, list[KVCache]]:
    """Captured steps of a model of their own, and its KV caches."""
    model = load_model(folder, dtype=torch.float32, device=CPU, group=SoloGroup(), max_model_len=64)
    config = model.config
    layout = KVLayout(
        num_layers=config.num_layers,
        block_size=4,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=torch.float32,
    )
    caches = layout.allocate(40, CPU)
    sampler = Sampler(SoloGroup(), config.vocab_size)
    captured = CapturedModel(model, caches, sampler, step_sizes(8, 4), max_blocks=16, drafts=drafts, device=CPU)
    captured.capture(lambda done, total: None)
    return captured, caches


def test_padding_touches_no_block(folder: Path) -> None:
    captured, caches = capture(folder, drafts=False)
    for cache in (tensor for layer in caches for tensor in layer):
        cache.fill_(torch.nan)  # so that a read shows too
    limits = Limits(
        num_slots=8, max_model_len=64, vocab_size=131, block_size=4, num_blocks=40, max_num_batched_tokens=64
    )
    table = SeqTable(limits)
    for slot, num_tokens in enumerate((3, 2, 4)):
        table.init(SeqInit(slot=slot, token_ids=range(num_tokens), num_prompt_tokens=1, block_table=[5 * slot + 3]))
    with torch.inference_mode():
        hidden = captured.forward(table.pack([0, 1, 2], [3, 2, 4]))
    assert hidden is not None
    assert hidden.shape[0] == 9
    assert hidden.isfinite().all()
    written = caches[-1][0].isfinite().flatten(2).all(dim=2)  # [num_blocks, block_size]
    assert written.sum() == 9
    assert sorted(set(written.nonzero()[:, 0].tolist())) == [3, 8, 13]


def test_the_runs_of_a_capture_leave_no_trace(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA a step runs a few times before it is captured, without a batch."""

    def run_often(step: Callable[[], None]) -> Callable[[], None]:
        for _ in range(3):
            step()
        return step

    empty = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: empty(*args, **kwargs).fill_(torch.nan))
    monkeypatch.setattr(captured_model, "capture_on", lambda device: run_often)
    _, caches = capture(folder, drafts=True)
    assert all(cache.isfinite().all() for layer in caches for cache in layer)
    assert_same_drafts(folder, SAMPLINGS["plain"], num_alternatives=3)


def test_a_step_that_differs_is_not_used(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, replays: list[str]
) -> None:
    monkeypatch.setattr(CapturedModel, "_forward_step", lambda self, size: self._hidden.fill_(1.0))
    driver = drive(make_engine(folder, TARGET, captured_new_tokens=2))
    del replays[:]
    assert driver.generate(driver.start(0, PROMPTS[0], greedy()), 3)
    assert not replays
    assert "CUDA graphs are not used" in caplog.text


def test_progress_is_told_before_each_step(folder: Path) -> None:
    told: list[tuple[str, int, int]] = []
    spec = WorkerSpec(rank=0, world_size=1, device="cpu", engines=[engine_spec(folder, DRAFT, captured_new_tokens=2)])
    load_engines(spec, Cohort(0, 1, None), lambda *event: told.append(event))
    captured = [(done, total) for stage, done, total in told if stage == "capturing steps of the draft"]
    assert captured == [(done, 16) for done in range(16)]  # 8 seqs: forwards of 1 and 2 tokens, chains with and without


@pytest.mark.parametrize(("num_seqs", "most_new"), [(1, 1), (3, 2), (5, 5), (8, 9), (9, 1), (1, 10)])
def test_the_smallest_size_with_room_is_taken(num_seqs: int, most_new: int) -> None:
    sizes = step_sizes(8, 9)
    fit = fitting(sizes, num_seqs=num_seqs, most_new=most_new)
    room = [size for size in sizes if size.num_seqs >= num_seqs and size.max_new >= most_new]
    assert fit == (min(room, key=lambda size: size.num_tokens) if room else None)
    assert (fit is None) == (num_seqs > 8 or most_new > 9)


def test_sizes_waste_less_than_half_of_seqs_and_tokens_and_stay_small() -> None:
    sizes = step_sizes(1000, 9)
    assert max(size.num_tokens for size in sizes) == 256
    assert StepSize(256, 1) in sizes
    assert {size.max_new for size in sizes} == {1, 2, 4, 9}
    assert step_sizes(8, 0) == []

"""What is captured on CUDA, run through Triton's interpreter: a step must do the same whatever its tensors hold."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoint.captured_sizes import StepSize
from kernels.dispatch import INTERPRETED
from tests.helpers.engines import DRAFT, TARGET, drive, make_engine
from tests.helpers.replayed import Impure, watch
from tests.helpers.rounds import greedy, seeded
from tests.helpers.tiny_models import make_tiny_model
from workers.captured.captured_model import CapturedModel
from workers.models.batch import Batch
from workers.process import batch_invariance

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="watches the interpreter's launches")

SAMPLINGS = [greedy(), seeded(1), seeded(2)]
PROMPTS = [[5, 99, 3, 14, 15, 92], [31, 41], [7] * 9]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("qwen3", tmp_path_factory.mktemp("tiny")).folder  # it has head norms as well


@pytest.fixture(autouse=True)
def products_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA; products of native kernels are no operators."""
    monkeypatch.setenv("ECHELON_COMPILE", "off")


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors that live in an object of ours: weights, caches, static tensors."""
    found: dict[int, Tensor] = {}
    opened: dict[int, Any] = {}  # kept, so that no identity comes twice
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, Tensor):
            found[id(each)] = each
        elif id(each) in opened:
            continue
        elif isinstance(each, dict):
            waiting += each.values()
        elif isinstance(each, list | tuple):
            waiting += each
        elif type(each).__module__.split(".")[0] in ("workers", "kernels"):
            names = [*getattr(each, "__dict__", ()), *getattr(type(each), "__slots__", ())]
            waiting += [getattr(each, name) for name in names if hasattr(each, name)]
        opened[id(each)] = each
    return list(found.values())


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[list[tuple[Any, ...]]]]:
    """What each captured step did, each time that it ran."""
    done: dict[str, list[list[tuple[Any, ...]]]] = {}
    for name in ("_forward_step", "_chain_step"):
        original = getattr(CapturedModel, name)

        def watched(self: CapturedModel, size: Any, name: str = name, original: Any = original) -> None:
            log = watch(lambda: original(self, size), tensors_in(self))
            done.setdefault(f"{name} {size}", []).append(log)

        monkeypatch.setattr(CapturedModel, name, watched)
    return done


def assert_repeats(logs: list[list[tuple[Any, ...]]]) -> None:
    first = logs[0]
    for log in logs[1:]:
        assert [entry[0] for entry in log] == [entry[0] for entry in first]
        assert [(old, new) for old, new in zip(first, log, strict=True) if old != new] == []


@pytest.fixture
def few_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.process.capturing.step_sizes", lambda _, most: [StepSize(4, 1), StepSize(4, 3)][:most])


@pytest.mark.usefixtures("few_sizes")
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_decoding_and_verifying_repeat_the_same_launches(
    folder: Path,
    steps: dict[str, list[list[tuple[Any, ...]]]],
    batch_invariant: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for probe in ("probe_linear_batch_invariant", "probe_paged_attention"):  # they take long, and have tests
        monkeypatch.setattr(batch_invariance, probe, lambda *_, **__: None)
    options = {"batch_invariant": batch_invariant}
    plain = drive(make_engine(folder, TARGET, **options))
    stream = plain.generate(plain.start(0, PROMPTS[0], greedy()), 6)
    driver = drive(make_engine(folder, TARGET, captured_new_tokens=3, **options))
    seqs = [
        driver.start(slot, prompt, sampling)
        for slot, (prompt, sampling) in enumerate(zip(PROMPTS, (greedy(), seeded(1), seeded(2)), strict=True))
    ]
    driver.run(*((seq, driver.target_row(seq)) for seq in seqs))
    driver.run(*((seq, driver.target_row(seq)) for seq in seqs[:2]))
    driver.run(
        (seqs[0], driver.target_row(seqs[0], drafts=[stream[2], 9])), (seqs[1], driver.target_row(seqs[1], drafts=[8]))
    )
    driver.run(*((seq, driver.target_row(seq)) for seq in seqs))
    assert seqs[0].output[:4] == stream[:4]
    assert len(steps) == 2
    for name, logs in steps.items():
        assert len(logs) >= 2, f"{name} ran once"
        assert_repeats(logs)


@pytest.mark.usefixtures("few_sizes")
def test_chains_repeat_the_same_launches(folder: Path, steps: dict[str, list[list[tuple[Any, ...]]]]) -> None:
    answers = []
    for number in (0, 2):
        driver = drive(make_engine(folder, DRAFT, captured_new_tokens=number))
        seqs = [driver.start(slot, PROMPTS[slot], sampling) for slot, sampling in enumerate(SAMPLINGS[:2])]
        for asked in ({}, {"num_alternatives": 2, "confidences": True}):
            results = driver.run(*((seq, driver.draft_row(seq, 3)) for seq in seqs), **asked)
            answers.append([(list(result.token_ids), list(result.alternative_token_ids)) for result in results])
    assert answers[2:] == answers[:2]
    chains = {name: logs for name, logs in steps.items() if name.startswith("_chain_step")}
    assert len(chains) == 2
    for name, logs in chains.items():
        assert len(logs) == 2, name
        assert_repeats(logs)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda kept, own: kept.sum().item(), "item reads"),
        (lambda kept, own: kept.tolist(), "tolist reads"),
        (lambda kept, own: bool(kept.any()), "__bool__ reads"),
        (lambda kept, own: kept[kept > 1], "reads the device"),
        (lambda kept, own: kept + own, "neither kept nor made"),
        (lambda kept, own: kept + torch.tensor([1.0]), "neither kept nor made"),
    ],
    ids=["item", "tolist", "bool", "mask", "foreign", "constant"],
)
def test_what_a_graph_cannot_repeat_is_noticed(step: Callable[[Tensor, Tensor], object], message: str) -> None:
    kept, own = torch.ones(3), torch.ones(3)
    with pytest.raises(Impure, match=message):
        watch(lambda: step(kept, own), [kept])


def test_shapes_that_follow_values_differ_in_the_log() -> None:
    kept, length = torch.ones(3), [2]
    log = watch(lambda: kept[: length[0]] * 2, [kept])
    assert watch(lambda: kept[: length[0]] * 2, [kept]) == log
    length[0] = 3
    assert watch(lambda: kept[: length[0]] * 2, [kept]) != log


@pytest.mark.usefixtures("few_sizes", "steps")
def test_a_step_that_asks_how_long_its_seqs_are_is_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The watch sees into the real step."""

    def append(batch: Batch, *_: object, **__: object) -> None:
        batch.seq_lens.tolist()

    monkeypatch.setattr("workers.captured.captured_model._append", append)
    driver = drive(make_engine(folder, DRAFT, captured_new_tokens=2))
    seq = driver.start(0, PROMPTS[0], greedy())
    with pytest.raises(Impure, match="tolist reads"):
        driver.run((seq, driver.draft_row(seq, 3)))

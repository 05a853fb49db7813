"""After a warm-up, rounds launch no kernel that a GPU would still have to compile."""

import random
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from echelon.pb.process_pb2 import TierSpec
from echelon.pb.sampling_pb2 import Grammar
from echelon.pb.worker_pb2 import EngineRole, LayerGroup, MoveOrder, MoveResult
from kernels.dispatch import INTERPRETED
from kernels.sampling import tile
from tests.helpers.engines import DRAFT, TARGET, drive, guesses, make_engine
from tests.helpers.kinds_of_launches import Kind, kinds_launched_by
from tests.helpers.rounds import Driver, Seq, greedy, seeded
from tests.helpers.tiny_models import make_tiny_model
from workers.captured.captured_model import CapturedModel
from workers.engine import warm_up
from workers.engine.engine import Engine
from workers.models import fp8_caches
from workers.process import batch_invariance
from workers.process.cohort import Cohort
from workers.sampling.grammar import GrammarCompiler, GrammarState, TokenBits

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="watches the interpreter's launches")

VOCAB_SIZE = 131
NUM_SLOTS = 40  # enough for large tiles of logits
KINDS = [
    greedy(),
    seeded(1),
    seeded(2, top_k=5),
    seeded(3, top_k=40, top_p=0.9, min_p=0.01),
    seeded(4, logprobs=3, prompt_logprobs=7),
    greedy(repetition_penalty=1.2, frequency_penalty=0.5, logprobs=20),
    seeded(5, logit_bias={3: 2.0, 9: -1.0}, suppressed_token_ids=[7], min_tokens=3),
    seeded(6, grammar=Grammar(eos_token_ids=[1])),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(
        "qwen3",  # it has head norms as well
        tmp_path_factory.mktemp("tiny"),
        intermediate_size=96,  # whole blocks of mxfp4
    ).folder


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of native kernels are no operators, and with a large vocabulary many rows have large tiles."""
    monkeypatch.setenv("ECHELON_COMPILE", "off")
    monkeypatch.setattr(tile, "ENOUGH_PROGRAMS", 1)
    monkeypatch.setattr(warm_up, "compiles_kernels", lambda device: True)
    monkeypatch.setattr(CapturedModel, "_probe", lambda *_: None)  # there is nothing to compare
    monkeypatch.setattr(fp8_caches, "sample_token_ids", lambda *_: torch.arange(9))  # the folder has no tokeniser
    monkeypatch.setattr(GrammarCompiler, "start", lambda *_: _AnyToken())
    for probe in ("probe_linear_batch_invariant", "probe_paged_attention"):  # they take long, and have tests
        monkeypatch.setattr(batch_invariance, probe, lambda *_, **__: None)


class _AnyToken(GrammarState):
    def __init__(self) -> None:
        self._bits = np.full(-(-VOCAB_SIZE // 32), -1, np.int32)

    def extend(self, token_ids: Sequence[int]) -> None: ...

    def truncate(self, num_output: int) -> None: ...

    def num_legal(self, drafts: Sequence[int]) -> int:
        return len(drafts)

    def branch(self) -> GrammarState:
        return self

    def bits_behind(self, drafts: Sequence[int], suppressed: Any = ()) -> TokenBits | None:
        return self._bits


class _Twin:
    """A group of two whose other rank says what this one says."""

    size = 2

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.stack([x, x])

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        return x


class _TwinCohort(Cohort):
    def __init__(self, rank: int) -> None:
        super().__init__(rank, 2, None)

    def gather(self, key: str, value: str) -> list[str]:
        return [value, value]

    def group(self, size: int, *, ordered_sum: bool) -> _Twin:
        return _Twin(self.rank)


def loaded(
    folder: Path, role: EngineRole.ValueType, *, cohort: Cohort | None = None, **changes: object
) -> tuple[Engine, set[Kind]]:
    engines: list[Engine] = []
    options = {"max_num_seqs": NUM_SLOTS, "kv_cache_bytes": 1 << 21, **changes}
    known = kinds_launched_by(lambda: engines.append(make_engine(folder, role, cohort=cohort, **options)))
    return engines[0], known


def start(driver: Driver, rng: random.Random, num_seqs: int, kinds: list[object]) -> list[Seq]:
    """Seqs in all of the first slots, and nothing else."""
    driver.free_blocks = list(range(driver.info.num_blocks))[::-1]
    lengths = [rng.choice((1, 2, 7, 13, 31)) for _ in range(num_seqs)]
    prompts = [[rng.randrange(90) for _ in range(length)] for length in lengths]
    return [driver.start(slot, prompt, rng.choice(kinds)) for slot, prompt in enumerate(prompts)]


def target_rounds(driver: Driver, rng: random.Random) -> None:
    for num_seqs in (1, 3, 6, NUM_SLOTS):
        for kinds in (KINDS[:1], KINDS[2:3], KINDS):
            seqs = start(driver, rng, num_seqs, kinds)
            for _ in range(4):
                work = []
                for seq in seqs:
                    if seq.num_missing > 1 and rng.random() < 0.5:
                        work.append((seq, driver.target_row(seq, rng.randint(1, min(9, seq.num_missing)))))
                    elif seq.num_missing < 10:
                        drafts = guesses(rng, [], rng.randint(0, 4), driver.info.vocab_size)
                        work.append((seq, driver.target_row(seq, drafts=drafts)))
                driver.run(*work)
            driver.send(driver.round([], free_slots=range(num_seqs)))


def draft_rounds(driver: Driver, rng: random.Random) -> None:
    for num_seqs in (1, 3, 6, NUM_SLOTS - 1):
        for kinds in (KINDS[:1], KINDS[2:3], KINDS):
            seqs = start(driver, rng, num_seqs, kinds)
            for asked in ({}, {"num_alternatives": 3, "confidences": True}, {}):
                driver.run(*((seq, driver.draft_row(seq, rng.randint(1, 4))) for seq in seqs), **asked)
                driver.run(*((seq, driver.draft_row(seq, rng.randint(0, 4), seq.num_prompt, [3])) for seq in seqs))
            driver.fork(seqs[0], NUM_SLOTS - 1, len(seqs[0].token_ids) - 1)
            driver.send(driver.round([]))
            driver.send(driver.round([], free_slots=[*range(num_seqs), NUM_SLOTS - 1]))


def check_rounds(engine: Engine, known: set[Kind]) -> None:
    rounds = target_rounds if engine.info.role == TARGET else draft_rounds
    later = kinds_launched_by(lambda: rounds(drive(engine), random.Random(1)))
    assert len(later) > 15
    assert later - known == set()


@pytest.mark.parametrize(
    ("role", "changes"),
    [
        (TARGET, {}),
        (TARGET, {"batch_invariant": True}),
        (TARGET, {"captured_new_tokens": 3, "kv_dtype": "fp8"}),
        (DRAFT, {"captured_new_tokens": 3}),
        (DRAFT, {"quantization": "int4"}),
        (DRAFT, {"quantization": "mxfp4", "batch_invariant": True}),
    ],
    ids=str,
)
def test_no_kernel_is_compiled_in_a_round(folder: Path, role: EngineRole.ValueType, changes: dict[str, Any]) -> None:
    check_rounds(*loaded(folder, role, **changes))


@pytest.mark.parametrize(("rank", "role"), [(0, TARGET), (0, DRAFT), (1, TARGET)])
def test_no_kernel_is_compiled_in_a_round_of_two_ranks(folder: Path, rank: int, role: EngineRole.ValueType) -> None:
    check_rounds(*loaded(folder, role, cohort=_TwinCohort(rank), tp_size=2))


def test_no_kernel_is_compiled_in_a_round_of_a_layer_parallel_draft(folder: Path) -> None:
    parallel = {"lp_size": 2, "layer_groups": [LayerGroup(layers=[0, 1])]}
    check_rounds(*loaded(folder, DRAFT, lower_draft="suffix", **parallel))


def test_no_kernel_is_compiled_for_a_model_beneath_a_draft(folder: Path) -> None:
    check_rounds(*loaded(folder, DRAFT, lower_model=str(folder)))


@pytest.mark.parametrize("tier_dtype", ["same", "int4"])
def test_no_kernel_is_compiled_in_a_move(folder: Path, tier_dtype: str) -> None:
    engine, known = loaded(folder, TARGET, tiers=TierSpec(num_host_slots=4, tier_dtype=tier_dtype))
    mover = engine.mover
    assert mover is not None

    def move() -> None:
        for kind in (MoveOrder.STORE, MoveOrder.LOAD):
            moved: Future[MoveResult] = Future()
            mover.submit(MoveOrder(kind=kind, block_ids=[5, 2, 7], host_slots=[1, 0, 3]), moved.set_result)
            assert not moved.result(60).failed

    later = kinds_launched_by(move)
    mover.close(60)
    assert later
    assert later - known == set()

"""What a spec may ask of layer-parallel drafting, and what is decided where the spec leaves it open."""

from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint.config import ModelConfig
from childproc.spec import SpecError
from echelon.pb.process_pb2 import EngineSpec, WorkerSpec
from echelon.pb.worker_pb2 import LayerGroup
from tests.helpers.engines import DRAFT, TARGET, drive, engine_spec, make_engine
from tests.helpers.layer_parallel_cases import GROUPS, write_deep_model
from tests.helpers.rounds import greedy
from tests.helpers.thread_group import ThreadGroup, run_ranks
from workers.engine.engine import Engine
from workers.layers.context import BuildContext
from workers.models.layer_groups import LayerParallelPlan, MLPs, Weights
from workers.process.cohort import Cohort
from workers.process.draft_layout import num_ranks, resolve_plan
from workers.process.load import load_engines

CPU = torch.device("cpu")
DEMO_DRAFT = Path(__file__).parents[2] / "models" / "demo-draft"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_deep_model(tmp_path_factory.mktemp("draft"), "llama")


def resolve_on(size: int, spec: EngineSpec, **measured_by: Any) -> list[LayerParallelPlan]:
    """The plan of each rank. The spec must name the groups, since threads have no store to publish them in."""

    def resolve(group: ThreadGroup) -> LayerParallelPlan:
        cohort = Cohort(group.rank, size, None)
        return resolve_plan(spec, group, cohort, CPU, lambda stage, done, total: None, **measured_by)

    return run_ranks(size, resolve)


def load(spec: EngineSpec) -> Engine:
    worker = WorkerSpec(rank=0, world_size=1, device="cpu", engines=[spec])
    return load_engines(worker, Cohort(0, 1, None), lambda stage, done, total: None)[spec.role]


def draft_spec(folder: Path, **changes: object) -> EngineSpec:
    groups = [LayerGroup(layers=group) for group in GROUPS[2]]
    return engine_spec(folder, DRAFT, lp_size=2, layer_groups=groups, **changes)


@pytest.mark.parametrize(
    ("lp_size", "world_size", "expected"), [(0, 2, 1), (1, 1, 1), (2, 2, 2), (2, 4, 2), (4, 1, 1), (4, 2, 1)]
)
def test_a_draft_runs_on_a_rank_for_each_layer_or_on_one(lp_size: int, world_size: int, expected: int) -> None:
    assert num_ranks(EngineSpec(role=DRAFT, tp_size=1, lp_size=lp_size), world_size) == expected


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            EngineSpec(role=DRAFT, tp_size=2, lp_size=2),
            "layer_parallel_size: 2: does not go together with draft.tensor_parallel_size 2; set",
        ),
        (EngineSpec(role=TARGET, tp_size=1, lp_size=2), "lp_size 2 is for a draft only"),
    ],
)
def test_contradictory_settings_are_refused(spec: EngineSpec, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        num_ranks(spec, 2)


@pytest.mark.parametrize("field", ["layer_parallel_weights", "layer_parallel_mlp"])
def test_unknown_values_are_refused_with_the_known_ones(folder: Path, field: str) -> None:
    with pytest.raises(SpecError, match=rf"{field} 'spread' must be one of replicated, "):
        resolve_on(2, draft_spec(folder, **{field: "spread"}))


def test_ranks_decide_alike_how_mlps_are_divided(folder: Path) -> None:
    plans = resolve_on(2, draft_spec(folder, layer_parallel_weights="sharded"))
    assert plans[0] == plans[1]
    assert plans[0].groups == GROUPS[2]
    assert plans[0].weights is Weights.SHARDED


@pytest.mark.parametrize(
    ("intermediate_size", "split_s", "expected"),
    [
        (96, (0.9, 0.9), MLPs.TENSOR_PARALLEL),
        (96, (0.5, 1.1), MLPs.REPLICATED),  # one rank waits for the other
        (95, (0.5, 0.5), MLPs.REPLICATED),  # cannot be split
    ],
)
def test_mlps_are_split_where_that_takes_the_slowest_rank_less_time(
    tmp_path: Path, intermediate_size: int, split_s: tuple[float, float], expected: MLPs
) -> None:
    def time(config: ModelConfig, group: ThreadGroup, ctx: BuildContext) -> float:
        return 1.0 if ctx.group.size == 1 else split_s[group.rank]

    folder = write_deep_model(tmp_path / "model", "llama", intermediate_size=intermediate_size)
    assert [plan.mlps for plan in resolve_on(2, draft_spec(folder), time_mlps=time)] == [expected] * 2


def test_one_rank_holds_everything_whatever_the_spec_says(folder: Path) -> None:
    spec = draft_spec(folder, layer_parallel_weights="sharded", layer_parallel_mlp="tensor_parallel")
    info = load(spec).info
    assert (info.lp_size, info.layer_parallel_weights, info.layer_parallel_mlp) == (2, "replicated", "replicated")
    assert [tuple(group.layers) for group in info.layer_groups] == list(GROUPS[2])


def test_groups_that_are_not_named_are_chosen_and_reported() -> None:
    engine = make_engine(DEMO_DRAFT, DRAFT, lp_size=4)
    assert [tuple(group.layers) for group in engine.info.layer_groups] == [(0,), (1, 2, 3), (4, 5, 6), (7,)]
    driver = drive(engine)
    seq = driver.start(0, [0, 300, 301], greedy())
    driver.run((seq, driver.draft_row(seq, 5)))
    assert len(seq.output) == 5


def test_an_ordinary_draft_reports_no_groups(folder: Path) -> None:
    info = make_engine(folder, DRAFT).info
    assert info.lp_size == 1
    assert not info.layer_groups

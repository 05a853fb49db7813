"""Layer-parallel drafts as deployed: processes, gloo and whole workers."""

from pathlib import Path

import pytest
import torch

from echelon.pb.process_pb2 import EngineSpec
from echelon.pb.worker_pb2 import LayerGroup
from tests.helpers.engines import DRAFT, TARGET, drive, engine_spec, make_engine
from tests.helpers.layer_parallel_cases import GROUPS, Case, Outcome, reference, run_on_rank, write_deep_model
from tests.helpers.ranks import run_on_ranks
from tests.helpers.rounds import Driver, greedy, seeded
from tests.helpers.worker_client import RoundStream, WorkerGroup
from workers.models.layer_groups import MLPs, Weights

DEMO_DRAFT = Path(__file__).parents[2] / "models" / "demo-draft"
PROMPTS = [[5, 99, 3, 14, 15, 92, 6, 53, 58, 9, 79], [31, 41], [7] * 17]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_deep_model(tmp_path_factory.mktemp("draft"), "llama-tied")


@pytest.mark.parametrize("lp_size", [2, 3])
def test_processes_together_compute_the_definition(folder: Path, tmp_path: Path, lp_size: int) -> None:
    exact_bits = [Case(folder=folder, lp_size=lp_size, num_ranks=lp_size, weights=weights) for weights in Weights]
    split = [
        Case(folder=folder, lp_size=lp_size, num_ranks=lp_size, weights=weights, mlps=MLPs.TENSOR_PARALLEL)
        for weights in Weights
    ]
    invariant = Case(
        folder=folder,
        lp_size=lp_size,
        num_ranks=lp_size,
        mlps=MLPs.TENSOR_PARALLEL,
        dtype=torch.bfloat16,
        batch_invariant=True,
    )
    ranks = run_on_ranks(run_on_rank, lp_size, tmp_path, [*exact_bits, *split, invariant])
    expected = reference(exact_bits[0])
    for rank in ranks:
        for outcome in rank[:2]:
            assert all(torch.equal(*pair) for pair in zip(outcome.hidden, expected, strict=True))
        for outcome in rank[2:4]:
            assert max(_worst(*pair) for pair in zip(outcome.hidden, expected, strict=True)) < 1e-3
        assert max(map(_worst_kv, rank[:4])) < 1e-5
        assert _worst_kv(rank[4]) == 0.0, "calibrated KV is not that of a prefill, bit for bit"


def _worst(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def _worst_kv(outcome: Outcome) -> float:
    """The largest difference between KV after approximate steps and exact passes and KV of a prefill."""
    return max(
        _worst(*pair) for seq in zip(outcome.kv, outcome.fresh_kv, strict=True) for pair in zip(*seq, strict=True)
    )


def layers(lp_size: int) -> list[LayerGroup]:
    return [LayerGroup(layers=group) for group in GROUPS[lp_size]]


def chains(driver: Driver) -> list[list[int]]:
    """What a draft writes for three seqs in rounds of different lengths, with some drafts dropped and some
    calibrated."""
    seqs = [
        driver.start(slot, prompt, sampling)
        for slot, (prompt, sampling) in enumerate(zip(PROMPTS, (greedy(), seeded(3), greedy()), strict=True))
    ]
    driver.run(*((seq, driver.draft_row(seq, 2 + index)) for index, seq in enumerate(seqs)))
    first = [list(seq.output) for seq in seqs]
    # Two drafts each of seq 0 and seq 1 are accepted, but only one of seq 1's is calibrated: what follows is computed
    # after approximate KV.
    works = []
    for seq, num_kept, num_approximate in zip(seqs, (2, 2, 0), (0, 1, 0), strict=True):
        row = driver.draft_row(seq, 3, crop_len=seq.num_prompt + num_kept, append=[50 + num_kept])
        row.calibrate_len = num_approximate
        works.append((seq, row))
    driver.run(*works)
    driver.run((seqs[2], driver.draft_row(seqs[2], 4)))  # its chain continues
    return first + [list(seq.output) for seq in seqs]


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[list[int]]:
    """What a batch of layers in this process writes."""
    return chains(drive(make_engine(folder, DRAFT, lp_size=2, layer_groups=layers(2))))


@pytest.mark.parametrize("weights", Weights)
def test_a_group_of_workers_drafts_like_one(
    folder: Path, tmp_path: Path, expected: list[list[int]], weights: Weights
) -> None:
    spec = engine_spec(
        folder,
        DRAFT,
        lp_size=2,
        layer_groups=layers(2),
        layer_parallel_weights=weights,
        layer_parallel_mlp=MLPs.REPLICATED,
    )
    with WorkerGroup(tmp_path, 2, [spec]) as group:
        group.spawn().wait_ready()
        (info,) = group.ready.worker.engines
        assert (info.lp_size, info.tp_size, info.layer_parallel_weights) == (2, 1, weights)
        assert info.layer_parallel_mlp == MLPs.REPLICATED
        assert [tuple(each.layers) for each in info.layer_groups] == list(GROUPS[2])
        with RoundStream(group.ready.address, DRAFT) as stream:
            assert chains(Driver(info, stream.call)) == expected


def test_unset_options_are_decided_once_for_all_ranks(tmp_path: Path) -> None:
    """Groups are chosen by similarity, MLPs by time, beside a target with as many ranks in the same processes."""
    engines = [
        engine_spec(DEMO_DRAFT, TARGET, tp_size=2),
        engine_spec(DEMO_DRAFT, DRAFT, lp_size=2, layer_parallel_weights=Weights.SHARDED),
    ]
    with WorkerGroup(tmp_path, 2, engines) as group:
        group.spawn().wait_ready()
        info = group.ready.worker.engines[1]
        assert [tuple(each.layers) for each in info.layer_groups] == [(0,), (1, 2), (3, 4), (5, 6), (7,)]
        assert info.layer_parallel_mlp in [*MLPs]
        with RoundStream(group.ready.address, DRAFT) as stream:
            driver = Driver(info, stream.call)
            seq = driver.start(0, [0, 300, 301, 302], greedy())
            driver.run((seq, driver.draft_row(seq, 6)))
            assert len(seq.output) == 6


def refusal(folder: Path, spec: EngineSpec, tmp_path: Path) -> str:
    with WorkerGroup(tmp_path, 1, [spec]) as group:
        group.spawn()
        return group.ranks[0].next_failed()


def test_a_worker_says_why_it_refuses_groups(folder: Path, tmp_path: Path) -> None:
    spec = engine_spec(folder, DRAFT, lp_size=2, layer_groups=[LayerGroup(layers=[0, 1, 2])])
    assert "has 3 layers, a group has 1 to 2" in refusal(folder, spec, tmp_path)

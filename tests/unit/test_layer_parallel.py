"""Layer-parallel drafting with threads as ranks: every way to divide the layers computes the bits of the definition."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from checkpoint.errors import LoadError
from tests.helpers.layer_parallel_cases import (
    CONFIGS,
    GROUPS,
    PROMPTS,
    Case,
    DraftRunner,
    Outcome,
    draft_rounds,
    reference,
    run_case,
    write_deep_model,
)
from tests.helpers.thread_group import ThreadGroup, run_ranks
from workers.collectives import SoloGroup
from workers.models.batch import Batch
from workers.models.decoder import KVCache
from workers.models.layer_groups import MLPs, Weights


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    return {name: write_deep_model(base / name, name) for name in CONFIGS}


def outcomes(case: Case) -> list[Outcome]:
    """The outcome of each rank."""
    if case.num_ranks == 1:
        return [run_case(SoloGroup(), case)]
    return run_ranks(case.num_ranks, lambda group: run_case(group, case))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("lp_size", [2, 3, 4])
def test_a_batch_of_layers_computes_the_definition(folders: dict[str, Path], name: str, lp_size: int) -> None:
    case = Case(folder=folders[name], lp_size=lp_size, num_ranks=1)
    (outcome,) = outcomes(case)
    for step, (hidden, expected) in enumerate(zip(outcome.hidden, reference(case), strict=True)):
        assert torch.equal(hidden, expected), f"forward {step}"


def test_a_token_without_a_slot_changes_no_layer(folders: dict[str, Path]) -> None:
    model = Case(folder=folders["llama"], lp_size=3, num_ranks=1).load(SoloGroup())
    runner = DraftRunner(model, num_seqs=1, dtype=torch.float32)
    tensors = [tensor.zero_() for tensors in runner.kv_caches for tensor in tensors]

    def draft_forward(batch: Batch, kv_caches: list[KVCache]) -> Tensor:
        return model.draft_forward(replace(batch, slot_mapping=torch.full_like(batch.slot_mapping, -1)), kv_caches)

    runner.draft({0: [1]}, draft_forward)
    assert not any(tensor.any() for tensor in tensors)


@pytest.mark.parametrize("name", CONFIGS)
def test_stacked_weights_compute_the_definition(
    folders: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where no weight is packed. The exact forward uses the same weights."""
    monkeypatch.setenv("ECHELON_COMPILE", "off")
    case = Case(folder=folders[name], lp_size=3, num_ranks=1)
    model = case.load(SoloGroup())
    model.stack_weights()
    hidden = draft_rounds(DraftRunner(model, num_seqs=len(PROMPTS), dtype=case.dtype), model.draft_forward)
    for step, (rows, expected) in enumerate(zip(hidden, reference(case), strict=True)):
        assert (rows - expected).abs().max() < 1e-3, f"forward {step}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_groups_of_one_layer_are_ordinary_decoding(folders: dict[str, Path], dtype: torch.dtype) -> None:
    case = Case(folder=folders["qwen3"], lp_size=1, num_ranks=1, dtype=dtype)
    (outcome,) = outcomes(case)
    model = case.load_exact()
    expected = draft_rounds(DraftRunner(model, num_seqs=len(PROMPTS), dtype=dtype), model.draft_forward)
    for step, (hidden, row) in enumerate(zip(outcome.hidden, expected, strict=True)):
        assert torch.equal(hidden, row), f"forward {step}"


@pytest.mark.parametrize("weights", Weights)
@pytest.mark.parametrize("name", ["llama-tied", "qwen2-window"])
@pytest.mark.parametrize("lp_size", [2, 3, 4])
def test_ranks_together_compute_the_definition(
    folders: dict[str, Path], name: str, lp_size: int, weights: Weights
) -> None:
    case = Case(folder=folders[name], lp_size=lp_size, num_ranks=lp_size, weights=weights)
    expected = reference(case)
    for rank, outcome in enumerate(outcomes(case)):
        for step, (hidden, row) in enumerate(zip(outcome.hidden, expected, strict=True)):
            assert torch.equal(hidden, row), f"rank {rank}, forward {step}"


def test_ranks_and_a_batch_agree_in_bf16(folders: dict[str, Path]) -> None:
    """As deployed: weights in the layout that a CPU reads fastest."""
    case = Case(folder=folders["llama"], lp_size=3, num_ranks=3, dtype=torch.bfloat16)
    (batched,) = outcomes(Case(folder=folders["llama"], lp_size=3, num_ranks=1, dtype=torch.bfloat16))
    for outcome in outcomes(case):
        assert all(torch.equal(*pair) for pair in zip(outcome.hidden, batched.hidden, strict=True))


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
@pytest.mark.parametrize("weights", Weights)
def test_logits_of_the_ranks_are_those_of_the_model(folders: dict[str, Path], name: str, weights: Weights) -> None:
    case = Case(folder=folders[name], lp_size=3, num_ranks=3, weights=weights)
    ranks = outcomes(case)
    with torch.inference_mode():
        expected = case.load_exact().compute_logits(ranks[0].hidden[-1])
    assert (torch.cat([rank.logits for rank in ranks], dim=1) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("weights", Weights)
@pytest.mark.parametrize("mlps", MLPs)
def test_an_exact_pass_replaces_approximate_kv(folders: dict[str, Path], weights: Weights, mlps: MLPs) -> None:
    case = Case(folder=folders["qwen3"], lp_size=2, num_ranks=2, weights=weights, mlps=mlps)
    for outcome in outcomes(case):
        for kept, fresh in zip(outcome.kv, outcome.fresh_kv, strict=True):
            assert all((a - b).abs().max() < 1e-5 for a, b in zip(kept, fresh, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lp_size", [2, 3])
def test_ranks_that_hold_all_layers_hold_the_same_kv(
    folders: dict[str, Path], lp_size: int, dtype: torch.dtype
) -> None:
    """This holds after approximate steps too, so any rank can compute what follows."""
    (batched,) = outcomes(Case(folder=folders["qwen3"], lp_size=lp_size, num_ranks=1, dtype=dtype))
    for outcome in outcomes(Case(folder=folders["qwen3"], lp_size=lp_size, num_ranks=lp_size, dtype=dtype)):
        for own, expected in zip(outcome.approximate_kv, batched.approximate_kv, strict=True):
            assert all(torch.equal(*pair) for pair in zip(own, expected, strict=True))


@pytest.mark.parametrize("mlps", MLPs)
def test_under_batch_invariance_an_exact_pass_leaves_the_bits_of_a_prefill(
    folders: dict[str, Path], mlps: MLPs
) -> None:
    case = Case(folder=folders["llama"], lp_size=2, num_ranks=2, mlps=mlps, batch_invariant=True)
    for outcome in outcomes(case):
        for kept, fresh in zip(outcome.kv, outcome.fresh_kv, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(kept, fresh, strict=True))


def test_without_an_exact_pass_kv_is_approximate(folders: dict[str, Path]) -> None:
    """Without this, the two tests above would pass with exact drafting."""
    model = Case(folder=folders["llama"], lp_size=3, num_ranks=1).load(SoloGroup())
    kv = {}
    for name, forward in (("draft", model.draft_forward), ("exact", model.forward)):
        runner = DraftRunner(model, num_seqs=1, dtype=torch.float32)
        runner.forward({0: PROMPTS[0]})
        runner.draft({0: [8]}, forward)
        runner.draft({0: [9]}, forward)
        kv[name] = runner.kv_of(0)
    differs = [bool((a != b).any()) for a, b in zip(kv["draft"], kv["exact"], strict=True)]
    # Keys and values of layers 0 and 1, which see the exact stream of the first draft, and of the later layers. The
    # second draft's stream has passed no attention over approximate KV before layer 2.
    assert differs[:2] == [False, False]
    assert all(differs[4:])


@pytest.mark.parametrize("lp_size", [2, 4])
def test_ranks_split_what_they_hold(folders: dict[str, Path], lp_size: int) -> None:
    def hold(weights: Weights, mlps: MLPs) -> list[Outcome]:
        case = Case(folder=folders["llama"], lp_size=lp_size, num_ranks=lp_size, weights=weights, mlps=mlps)
        return outcomes(case)

    whole = hold(Weights.REPLICATED, MLPs.REPLICATED)
    shared = hold(Weights.SHARDED, MLPs.TENSOR_PARALLEL)
    assert {rank.num_kv_layers for rank in whole} == {7}
    assert sum(rank.num_kv_layers for rank in shared) == 7
    assert max(rank.num_kv_layers for rank in shared) - min(rank.num_kv_layers for rank in shared) <= 1
    total = sum(rank.weight_bytes for rank in shared)
    assert max(rank.weight_bytes for rank in shared) < 1.2 * total / lp_size


def test_an_mlp_split_over_ranks_is_close_to_the_whole(folders: dict[str, Path]) -> None:
    for weights in Weights:
        case = Case(folder=folders["llama"], lp_size=4, num_ranks=4, weights=weights, mlps=MLPs.TENSOR_PARALLEL)
        expected = reference(case)
        ranks = outcomes(case)
        for rank in ranks:
            assert all(torch.equal(*pair) for pair in zip(rank.hidden, ranks[0].hidden, strict=True))
        for hidden, row in zip(ranks[0].hidden, expected, strict=True):
            assert (hidden - row).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("weights", "mlps", "expected"),
    [
        (Weights.REPLICATED, MLPs.REPLICATED, 2),  # one gather for each group of several layers
        (Weights.REPLICATED, MLPs.TENSOR_PARALLEL, 2 + 7),  # and one sum per layer
        (Weights.SHARDED, MLPs.REPLICATED, 1 + 2 + 3),  # the embedding, gathers, broadcasts of lone layers
    ],
)
def test_collectives_of_a_draft_step(folders: dict[str, Path], weights: Weights, mlps: MLPs, expected: int) -> None:
    groups = ((0,), (1, 2), (3, 4), (5,), (6,))

    def count(group: ThreadGroup) -> int:
        case = Case(folder=folders["llama"], lp_size=2, num_ranks=2, weights=weights, mlps=mlps, groups=groups)
        model = case.load(group)
        runner = DraftRunner(model, num_seqs=1, dtype=torch.float32)
        runner.forward({0: PROMPTS[0]})
        group.all_gather(torch.zeros(1))  # a barrier: no rank counts while another still runs
        before = group.num_collectives
        runner.draft({0: [1]}, model.draft_forward)
        group.all_gather(torch.zeros(1))
        return group.num_collectives - before - 1

    assert run_ranks(2, count) == [expected] * 2


def test_an_exact_pass_over_replicated_weights_needs_no_communication(folders: dict[str, Path]) -> None:
    def count(group: ThreadGroup) -> int:
        model = Case(folder=folders["llama"], lp_size=3, num_ranks=3).load(group)
        DraftRunner(model, num_seqs=1, dtype=torch.float32).forward({0: PROMPTS[0]})
        return group.num_collectives

    assert run_ranks(3, count) == [0] * 3


def test_a_rank_reads_only_its_layers_and_still_finds_a_missing_tensor(tmp_path: Path) -> None:
    folder = write_deep_model(tmp_path / "model", "llama", num_hidden_layers=6)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 7}))
    case = Case(folder=folder, lp_size=2, num_ranks=2, weights=Weights.SHARDED, groups=GROUPS[2])
    with pytest.raises(LoadError, match=r"model\.layers\.6\."):
        outcomes(case)


@pytest.mark.parametrize(
    ("changes", "num_ranks", "mlps", "message"),
    [
        (
            {"num_hidden_layers": 3},
            4,
            MLPs.REPLICATED,
            "layer_parallel_size: 4: is more than the draft's 3 layers; use at most 3",
        ),
        ({"intermediate_size": 96}, 5, MLPs.TENSOR_PARALLEL, "5 does not divide the draft's intermediate size 96"),
    ],
)
def test_layouts_that_ranks_cannot_share_are_refused(
    tmp_path: Path, changes: dict[str, int], num_ranks: int, mlps: MLPs, message: str
) -> None:
    folder = write_deep_model(tmp_path / "model", "llama", **changes)
    case = Case(folder=folder, lp_size=num_ranks, num_ranks=num_ranks, mlps=mlps, groups=GROUPS[1])
    with pytest.raises(LoadError, match=message):
        outcomes(case)

"""The parts of bench.speculate that decide what its numbers mean: variants, pairing, differences."""

from pathlib import Path

import pytest

from bench.differences import first_difference
from bench.speculate_results import Cell, Results, Run
from bench.variants import METHODS, PLAIN, Pair, Variant, adjust_scheduler, adjust_worker, all_variants
from echelon.pb.process_pb2 import EngineSpec, SchedulerSpec, SpeculationSpec, WorkerSpec
from echelon.pb.worker_pb2 import ENGINE_ROLE_DRAFT, ENGINE_ROLE_TARGET

GREEDY = Cell(0.0, 1)
SERIAL = Variant(source="draft", num_drafts=3)
PAIR = Pair(
    target=Path("target"),
    draft=Path("draft"),
    dtype="bfloat16",
    tp_size=1,
    colocated=True,
    threads=2,
    max_num_seqs=1,
    lp_size=4,
    forced_acceptance=0.7,
)


def run(tokens_per_s: float) -> Run:
    return Run(
        tokens_per_s=tokens_per_s,
        token_s=2.0 / tokens_per_s,
        tokens_per_round=1.0,
        acceptance=0.5,
        draft_idle=0.0,
        target_idle=0.0,
        drafts_per_draft_round=1.0,
        cache_hits=0.0,
        outputs=[],
    )


def test_lookup_is_measured_once_not_in_every_pipeline() -> None:
    variants = all_variants(["serial", "continuous"], ["draft", "suffix"], [3])
    assert [v.name for v in variants] == [
        "plain",
        "serial, draft, k = 3",
        "serial, suffix, k = 3",
        "continuous, draft, k = 3",
    ]


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        (PLAIN, SpeculationSpec(method="none", pipeline="serial")),
        (SERIAL, SpeculationSpec(method="draft_model", pipeline="serial", num_speculative_tokens=3)),
        (
            Variant(source="hybrid", pipeline="continuous+cache"),
            SpeculationSpec(
                method="hybrid", pipeline="continuous", num_speculative_tokens=8, adaptive=True, verdict_cache_rows=4
            ),
        ),
    ],
    ids=lambda value: value.name if isinstance(value, Variant) else "",
)
def test_a_variant_reaches_the_scheduler(variant: Variant, expected: SpeculationSpec) -> None:
    spec = SchedulerSpec(speculation=SpeculationSpec(method="none", pipeline="serial"))
    adjust_scheduler(spec, variant)
    assert spec.speculation == expected


def test_a_draft_model_runs_exactly_if_a_variant_drafts_with_one() -> None:
    sources = {variant.source for variant in all_variants(["serial"], [*METHODS], [3]) if variant.uses_draft_model}
    made = {"draft", "self-int8", "self-int4", "self-mxfp4"}
    assert sources == {"layer-parallel", "hybrid"} | made | {f"{source}+suffix" for source in made}


def test_forced_acceptance_belongs_to_the_target_and_layer_parallelism_to_the_draft() -> None:
    target, draft = EngineSpec(role=ENGINE_ROLE_TARGET), EngineSpec(role=ENGINE_ROLE_DRAFT)
    spec = WorkerSpec(engines=[target, draft])
    adjust_worker(spec, PAIR, Variant(source="layer-parallel", num_drafts=3))
    assert [engine.forced_acceptance for engine in spec.engines] == [0.7, 0.0]
    assert [engine.lp_size for engine in spec.engines] == [0, 4]


def test_ratios_compare_neighbouring_runs_not_medians() -> None:
    results = Results()
    for plain, other in [(10.0, 20.0), (5.0, 11.0), (8.0, 24.0)]:
        results.add(PLAIN, GREEDY, run(plain))
        results.add(SERIAL, GREEDY, run(other))
    assert results.ratios(GREEDY, SERIAL, PLAIN) == [2.0, 2.2, 3.0]


def test_pipelines_are_measured_against_the_best_fixed_number_of_drafts() -> None:
    results = Results()
    best = Variant(source="draft", num_drafts=5)
    for variant, speed in [(SERIAL, 10.0), (best, 12.0), (Variant(source="draft"), 99.0), (PLAIN, 50.0)]:
        results.add(variant, GREEDY, run(speed))
    assert results.best_serial(GREEDY, "draft") == best
    assert results.best_serial(GREEDY, "hybrid") is None


def test_the_policy_is_measured_against_the_best_that_it_could_have_chosen() -> None:
    results = Results()
    auto = Variant(source="draft")
    for variant, speed in [(PLAIN, 50.0), (SERIAL, 10.0), (auto, 49.0)]:
        results.add(variant, GREEDY, run(speed))
    assert results.best_without_policy(GREEDY, auto) == PLAIN
    better = Variant(source="draft", num_drafts=5)
    results.add(better, GREEDY, run(60.0))
    assert results.best_without_policy(GREEDY, auto) == better


def test_the_first_difference_is_shown_with_the_common_part() -> None:
    found = first_difference([1, 2], [5, 6, 7], [5, 9, 7])
    assert found is not None
    assert (found.output, found.plain_token_id, found.other_token_id) == ([5], 6, 9)
    assert first_difference([1], [5, 6], [5, 6]) is None

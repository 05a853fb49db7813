"""What `plan` says that drafters would gain, before anything is measured."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster import lifecycle
from cluster.deployment.deployment_file import load_deployment
from cluster.planning.drafters import DrafterEstimate, Speed, estimate_drafters
from tests.helpers.deployment_streams import DRAFT, TARGET

SLOW = Speed(bandwidth=1e6, step_s=0.0)  # only bytes count


def file_of(folder: Path, more: str = "") -> Path:
    file = folder / "deployment.yaml"
    file.write_text(
        f"apiVersion: echelon/v1\nkind: Deployment\nname: demo\ntarget: {{model: {TARGET}}}\ndevice: cpu\n{more}"
    )
    return file


def estimates(settings: Any, acceptance: float, speed: Speed = SLOW) -> dict[str, DrafterEstimate]:
    return {each.name: each for each in estimate_drafters(settings, acceptance, speed)}


def test_every_drafter_that_needs_no_other_model_is_there(tmp_path: Path) -> None:
    settings = load_deployment(file_of(tmp_path))
    names = ["self, int8, colocated", "self, int4, colocated", "self, mxfp4, colocated"]
    assert [*estimates(settings, 0.8)] == [*names, "suffix, where earlier text repeats"]
    settings = load_deployment(file_of(tmp_path, "draft: {model: self, quantization: int4, placement: colocated}"))
    this, *others = estimates(settings, 0.8)
    assert this == "the target's own weights in int4, 8 layers (this file)"
    assert others == [names[0], names[2], "suffix, where earlier text repeats"]
    assert {names[0], names[2]} <= estimates(replace(settings, device="cuda"), 0.8).keys()


def test_speed_follows_from_bytes_and_acceptance(tmp_path: Path) -> None:
    settings = load_deployment(file_of(tmp_path, f"draft: {{model: {DRAFT}, placement: colocated}}"))
    target = settings.target.step_bytes + 1024 * settings.target.kv_bytes_per_token
    this = next(iter(estimates(settings, 0.8).values()))
    draft = settings.draft.step_bytes + 1024 * settings.draft.kv_bytes_per_token
    assert this.step_bytes == draft
    assert this.step_s == pytest.approx(draft / 1e6)

    def speedup(num_drafts: int) -> float:
        tokens = (1 - 0.8 ** (num_drafts + 1)) / 0.2
        return tokens * target / (target + num_drafts * draft)

    assert this.speedup == pytest.approx(max(map(speedup, range(1, 17))))
    assert this.speedup == pytest.approx(speedup(this.num_drafts))
    assert estimates(settings, 0.5)[this.name].speedup < this.speedup
    lookup = estimates(settings, 1.0)["suffix, where earlier text repeats"]
    assert (lookup.speedup, lookup.num_drafts) == (17.0, 16)


def test_a_draft_that_works_meanwhile_is_worth_more_and_latency_makes_it_worth_less(tmp_path: Path) -> None:
    beside = load_deployment(file_of(tmp_path, f"draft: {{model: {DRAFT}}}"))
    colocated = load_deployment(file_of(tmp_path, f"draft: {{model: {DRAFT}, placement: colocated}}"))
    name = "demo-draft (this file)"
    assert estimates(beside, 0.8)[name].speedup > estimates(colocated, 0.8)[name].speedup
    late = Speed(bandwidth=1e6, step_s=1.0)
    assert estimates(colocated, 0.8, late)[name].speedup < estimates(colocated, 0.8)[name].speedup


def test_the_plan_has_them_if_they_are_asked_for(tmp_path: Path) -> None:
    assert lifecycle.plan(file_of(tmp_path)).drafters == ()
    made = lifecycle.plan(file_of(tmp_path), acceptances=(0.7, 0.9), bandwidth=1e9)
    assert [each.acceptance for each in made.drafters] == [0.7] * 4 + [0.9] * 4
    faster = lifecycle.plan(file_of(tmp_path), acceptances=(0.7,), bandwidth=2e9)
    assert faster.drafters[0].step_s < made.drafters[0].step_s

"""The stream is that of plain decoding, bit for bit, whatever drafts, and wherever and whenever it does."""

from typing import Any

import pytest

from cluster.deployment.settings import SpeculationSettings
from cluster.local import LocalDraft
from tests.helpers.deployment_streams import DRAFT, TARGET, Case, generate, make_cases

NUM_DRAFTS = (0, 3, None)  # None: as many as the policy likes

CONTINUOUS = {"pipeline": "continuous"}
DEPLOYMENTS: dict[str, dict[str, Any]] = {
    "continuous": {"speculation": {"pipeline": "continuous", "verdict_cache": "off"}},
    "verdict cache": {"speculation": {"pipeline": "continuous", "verdict_cache": 6}},
    "tensor-parallel draft": {"speculation": CONTINUOUS, "draft": {"tp_size": 2}},
    "layer-parallel draft": {"speculation": CONTINUOUS, "draft": {"layer_parallel_size": 2}},
    "sharded layer-parallel draft": {
        "speculation": CONTINUOUS,
        "draft": {
            "layer_parallel_size": 3,
            "layer_parallel_weights": "sharded",
            "layer_parallel_mlp": "replicated",
        },
    },
    "colocated, layers in one batch": {"draft": {"colocated": True, "layer_parallel_size": 4}},
    "lookup": {"draft": None, "speculation": {"method": "suffix"}},
    "hybrid": {"speculation": {"method": "hybrid", "pipeline": "continuous"}},
    "hybrid, serial": {"speculation": {"method": "hybrid", "pipeline": "serial"}},
}


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    names = ("plain", "everything", "logprobs")
    return {name: case for name, case in make_cases().items() if name.startswith(names) or name == "long"}


@pytest.mark.parametrize("settings", DEPLOYMENTS.values(), ids=DEPLOYMENTS)
def test_every_drafter_leaves_the_stream_as_it_is(cases: dict[str, Case], settings: dict[str, Any]) -> None:
    draft: dict[str, Any] | None = settings.get("draft", {})
    streams = generate(
        cases,
        NUM_DRAFTS,
        target=TARGET,
        draft=None if draft is None else LocalDraft(folder=DRAFT, **draft),
        speculation=SpeculationSettings(**settings.get("speculation", {})),
        dtype="bfloat16",
        batch_invariant=True,
    )
    for (name, k), stream in streams.items():
        assert stream.token_ids == streams[name, 0].token_ids, f"{name}, k = {k}"
        assert stream.logprobs == streams[name, 0].logprobs, f"{name}, k = {k}"
    fixed = [stream.speculation for (_, k), stream in streams.items() if k == 3]
    # How many depends on how fast three busy workers run on this machine; whether there are any does not.
    assert sum(stats.num_draft_tokens for stats in fixed) > 0

"""Whatever drafts, wherever and whenever it does, the stream is that of plain decoding, to the last bit."""

from typing import Any

import pytest

from tests.helpers.deployment_streams import DRAFT, TARGET, Case, generate, make_cases

NUM_DRAFTS = (0, 3, None)  # None: as many as the policy likes

DEPLOYMENTS: dict[str, dict[str, Any]] = {
    "continuous": {"pipeline": "continuous", "verdict_cache": "off"},
    "verdict cache": {"pipeline": "continuous", "verdict_cache": 6},
    "tensor-parallel draft": {"pipeline": "continuous", "draft_tp_size": 2},
    "layer-parallel draft": {"pipeline": "continuous", "layer_parallel_size": 2},
    "sharded layer-parallel draft": {
        "pipeline": "continuous",
        "layer_parallel_size": 3,
        "layer_parallel_weights": "sharded",
        "layer_parallel_mlp": "replicated",
    },
    "colocated, layers in one batch": {"colocated": True, "layer_parallel_size": 4},
    "lookup": {"draft": None, "method": "suffix"},
    "hybrid": {"method": "hybrid", "pipeline": "continuous"},
    "hybrid, serial": {"method": "hybrid", "pipeline": "serial"},
}


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    names = ("plain", "everything", "logprobs")
    return {name: case for name, case in make_cases().items() if name.startswith(names) or name == "long"}


@pytest.mark.parametrize("settings", DEPLOYMENTS.values(), ids=DEPLOYMENTS)
def test_every_drafter_leaves_the_stream_as_it_is(cases: dict[str, Case], settings: dict[str, Any]) -> None:
    defaults = {"target": TARGET, "draft": DRAFT, "dtype": "bfloat16", "batch_invariant": True}
    streams = generate(cases, NUM_DRAFTS, **defaults | settings)
    for (name, k), stream in streams.items():
        assert stream.token_ids == streams[name, 0].token_ids, f"{name}, k = {k}"
        assert stream.logprobs == streams[name, 0].logprobs, f"{name}, k = {k}"
    fixed = [stream.speculation for (_, k), stream in streams.items() if k == 3]
    # How many depends on how fast three busy workers are on this machine; that there are any does not.
    assert sum(stats.num_draft_tokens for stats in fixed) > 0

"""A deployment whose workers run on Triton kernels writes the same as one whose workers run on CPU code."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from childproc.wires import open_blocking_channel
from cluster.deployment.settings import KvCacheSettings, SpeculationSettings
from cluster.local import LOCAL_SCHEDULER, LocalDeployment, LocalDraft, local_settings
from echelon.pb import scheduler_pb2_grpc
from kernels.dispatch import INTERPRETED
from tests.helpers.scheduler_client import SchedulerClient

MODELS = Path(__file__).parents[2] / "models"
NUM_TOKENS = 6
PROMPT = [0, 519, 835, 66, 274, 632, 912, 8, 78, 284, 260]
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0, "logprobs": 2},
    "sampled": {"temperature": 1.0, "seed": 7, "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.2},
}


def generate(**environment: str) -> tuple[dict[str, list[int]], int]:
    """The streams by request, and the number of accepted drafts."""
    settings = local_settings(
        MODELS / "demo-target",
        draft=LocalDraft(folder=MODELS / "demo-draft"),
        dtype="float32",
        kv_cache=KvCacheSettings(device_bytes=8 << 20),
        scheduler=replace(LOCAL_SCHEDULER, max_model_len=64),
        speculation=SpeculationSettings(num_speculative_tokens=3, pipeline="serial"),
        collective_timeout_s=300.0,
        startup_timeout_s=300.0,
    )
    deployment = LocalDeployment(settings)
    with deployment, open_blocking_channel(deployment.running.replicas[0].scheduler_address) as channel:
        client = SchedulerClient(scheduler_pb2_grpc.SchedulerStub(channel), max_tokens=NUM_TOKENS, ignore_eos=True)
        for name, sampling in SETTINGS.items():
            client.submit(name, PROMPT, num_drafts=3, **sampling)
        client.finish(len(SETTINGS))
    accepted = sum(client.ends[name].speculation.num_accepted_tokens for name in SETTINGS)
    return {name: client.tokens[name, 0] for name in SETTINGS}, accepted


@pytest.mark.timeout(600)
def test_the_demo_pair_writes_the_same_through_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    if not INTERPRETED:
        pytest.skip("on a GPU, tests/gpu compares whole models")
    through_kernels, accepted = generate()  # workers inherit TRITON_INTERPRET
    monkeypatch.delenv("TRITON_INTERPRET")
    assert through_kernels == generate()[0]
    assert accepted > 0

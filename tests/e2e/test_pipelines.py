"""The stream is that of plain decoding, bit for bit, whatever drafts, and wherever and whenever it does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedModel

from cluster.deployment.settings import KvCacheSettings, SpeculationSettings
from cluster.local import LocalDeployment, LocalDraft, local_settings
from echelon import Client
from tests.helpers.deployment_streams import (
    DRAFT,
    PROMPTS,
    TARGET,
    Case,
    Streams,
    generate,
    make_cases,
    make_structured_cases,
)
from tests.helpers.stored_models import compressed, compressed_config, write_stored
from tests.helpers.structured import assert_valid

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
    "int4 self-draft with KV in FP8 and a lookup beneath": {
        "speculation": CONTINUOUS,
        "draft": {"folder": TARGET, "quantization": "int4", "lower_draft": "suffix", "kv_dtype": "fp8"},
    },
    "tensor-parallel MXFP4 self-draft of the first layers, a model beneath": {
        "speculation": CONTINUOUS,
        "draft": {
            "folder": TARGET,
            "quantization": "mxfp4",
            "num_layers": 6,
            "tp_size": 2,
            "lower_folder": DRAFT,
        },
    },
    "colocated int8 self-draft, layers in one batch": {
        "draft": {
            "folder": TARGET,
            "quantization": "int8",
            "colocated": True,
            "layer_parallel_size": 4,
            "lower_draft": "suffix",
        }
    },
    "lookup": {"draft": None, "speculation": {"method": "suffix"}},
    "hybrid": {"speculation": {"method": "hybrid", "pipeline": "continuous"}},
    "hybrid, serial": {"speculation": {"method": "hybrid", "pipeline": "serial"}},
}


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    names = ("plain", "everything", "logprobs")
    plain = {name: case for name, case in make_cases().items() if name.startswith(names) or name == "long"}
    return plain | make_structured_cases()


@pytest.mark.parametrize("settings", DEPLOYMENTS.values(), ids=DEPLOYMENTS)
def test_no_drafter_changes_the_stream(cases: dict[str, Case], settings: dict[str, Any]) -> None:
    draft: dict[str, Any] | None = settings.get("draft", {})
    streams = generate(
        cases,
        NUM_DRAFTS,
        target=TARGET,
        draft=None if draft is None else LocalDraft(**{"folder": DRAFT, **draft}),
        speculation=SpeculationSettings(**settings.get("speculation", {})),
        dtype="bfloat16",
        batch_invariant=True,
    )
    assert_no_difference(streams)


def test_a_quantised_target_drafts_for_itself(tmp_path: Path) -> None:
    """A client gets what transformers computes with the dequantised weights, drafted or not."""
    stored_as = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True}
    store = compressed("pack-quantized", **stored_as)
    write_stored(tmp_path, TARGET, compressed_config("pack-quantized", **stored_as), store)
    settings = local_settings(
        tmp_path / "stored",
        tp_size=2,
        draft=LocalDraft(folder=tmp_path / "stored", quantization="int8", colocated=True),
        dtype="float32",
        batch_invariant=True,
        kv_cache=KvCacheSettings(device_bytes=64 << 20),
    )
    assert settings.target.folder.keeps_bits
    reference = LlamaForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    with LocalDeployment(settings, gateway=True) as deployment, Client(deployment.running.gateway_address) as client:
        for prompt in PROMPTS:
            for temperature in (0.0, 1.0):
                options: Any = {"max_tokens": 32, "temperature": temperature, "seed": 3, "ignore_eos": True}
                plain = client.generate(prompt, **options, speculation={"num_speculative_tokens": 0})
                drafted = client.generate(prompt, **options, speculation={"num_speculative_tokens": 4})
                assert drafted.token_ids == plain.token_ids
                assert plain.speculation.num_draft_tokens == 0
                assert drafted.speculation.num_accepted_tokens > 0.8 * drafted.speculation.num_draft_tokens > 0
                if temperature == 0.0:
                    assert list(plain.token_ids) == greedy(reference, prompt, 32)


def greedy(model: PreTrainedModel, prompt: str, num_tokens: int) -> list[int]:
    token_ids = torch.tensor([Tokenizer.from_file(str(TARGET / "tokenizer.json")).encode(prompt).ids])
    options = GenerationConfig(max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False)
    return model.generate(token_ids, generation_config=options)[0, token_ids.shape[1] :].tolist()


def assert_no_difference(streams: Streams) -> None:
    for (name, k), stream in streams.items():
        assert stream.token_ids == streams[name, 0].token_ids, f"{name}, k = {k}"
        assert stream.logprobs == streams[name, 0].logprobs, f"{name}, k = {k}"
        if name.startswith("schema"):
            assert_valid(TARGET, stream.token_ids)
    fixed = [stream.speculation for (_, k), stream in streams.items() if k == 3]
    # How many depends on how fast three busy workers run on this machine.
    assert sum(stats.num_draft_tokens for stats in fixed) > 0

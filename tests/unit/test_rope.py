"""Angles equal those of transformers for every scaling, and an unsupported scaling is refused by name."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from checkpoint.errors import LoadError
from checkpoint.fields import Fields
from checkpoint.rope import Rope
from checkpoint.rope_json import parse_rope
from workers.layers.rope import cos_sin_cache

HEAD_DIM = 32
NUM_POSITIONS = 300

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}

SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn-not-truncated": YARN | {"truncate": False},
    "yarn-betas": YARN | {"beta_fast": 4.0, "beta_slow": 0.5},
    "yarn-attention-factor": YARN | {"attention_factor": 0.7},
    "yarn-mscale": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3},
    "yarn-mscale-alone": YARN | {"mscale": 0.7},
    "yarn-of-config-length": {"rope_type": "yarn", "factor": 4.0},
    "yarn-flat-ramp": YARN | {"beta_fast": 1.0, "beta_slow": 1.0, "truncate": False},
}


def expected_cache(rope: dict[str, Any], theta: float) -> torch.Tensor:  # [NUM_POSITIONS, HEAD_DIM]
    config = LlamaConfig(head_dim=HEAD_DIM, max_position_embeddings=256, rope_parameters={**rope, "rope_theta": theta})
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(NUM_POSITIONS)[None])
    half = HEAD_DIM // 2
    return torch.cat((cos[0, :, :half], sin[0, :, :half]), dim=1)


def rope_of(raw: dict[str, Any]) -> Rope:
    return parse_rope(Fields("config.json", raw))


def our_cache(raw: dict[str, Any]) -> torch.Tensor:  # [NUM_POSITIONS, HEAD_DIM]
    rope = rope_of({"max_position_embeddings": 256, **raw})
    return cos_sin_cache(rope, head_dim=HEAD_DIM, num_positions=NUM_POSITIONS, device=torch.device("cpu"))


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize("name", SCALINGS)
def test_cos_and_sin_equal_transformers(name: str, theta: float) -> None:
    rope = SCALINGS[name]
    ours = our_cache({"rope_parameters": {**rope, "rope_theta": theta}})
    assert (ours - expected_cache(rope, theta)).abs().max() < 2e-5


@pytest.mark.parametrize("name", [name for name in SCALINGS if name != "default"])
def test_every_scaling_turns_differently(name: str) -> None:
    """Guards the test above: no scaling comes close to another one or to none."""
    theta = {"rope_theta": 10_000.0}
    ours = our_cache({"rope_parameters": SCALINGS[name] | theta})
    for other, rope in SCALINGS.items():
        if {name, other} != {"yarn", "yarn-mscale-alone"}:  # mscale counts only beside mscale_all_dim
            same = torch.allclose(ours, our_cache({"rope_parameters": rope | theta}), atol=1e-3)
            assert same == (name == other), other


def test_both_spellings_mean_the_same() -> None:
    old = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}}
    new = {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}}
    assert rope_of({"max_position_embeddings": 64, **old}) == rope_of({"max_position_embeddings": 64, **new})


def test_theta_stands_outside_or_is_the_default() -> None:
    assert torch.equal(our_cache({"rope_theta": 77.0}), our_cache({"rope_parameters": {"rope_theta": 77.0}}))
    assert torch.equal(our_cache({}), our_cache({"rope_theta": 10_000.0, "rope_scaling": None}))


def test_original_length_may_stand_outside() -> None:
    inside = our_cache({"rope_scaling": YARN})
    outside = our_cache({"rope_scaling": {"type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 64})
    assert torch.equal(inside, outside)


@pytest.mark.parametrize(
    ("rope", "complaint"),
    [
        ({"rope_type": "longrope", "factor": 4.0}, "longrope"),
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "linear", "factor": "4"}, "factor"),
        ({"rope_type": "linear", "factor": -1.0}, "factor"),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}, "high_freq_factor"),
        ({**LLAMA3, "high_freq_factor": 1.0}, "low_freq_factor"),
        ({"rope_type": "default", "mrope_section": [16, 24, 24]}, "mrope_section"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"full_attention": {"rope_type": "default"}}, "full_attention"),
    ],
)
def test_refusals_name_the_key(rope: dict[str, Any], complaint: str) -> None:
    with pytest.raises(LoadError, match=complaint):
        rope_of({"max_position_embeddings": 256, "rope_parameters": rope})


def test_partial_rotation_beside_the_dictionary_is_refused() -> None:
    with pytest.raises(LoadError, match=r"partial_rotary_factor 0\.25"):
        rope_of({"max_position_embeddings": 256, "partial_rotary_factor": 0.25})


def test_dynamic_changes_nothing_up_to_the_original_length() -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0}
    assert torch.equal(our_cache({"rope_parameters": rope}), our_cache({}))
    assert rope_of({"max_position_embeddings": 256, "rope_parameters": rope}).max_len(256) == 256


def test_lengths_that_scalings_reach() -> None:
    reach = {
        name: rope_of({"max_position_embeddings": 100, "rope_parameters": rope}).max_len(100)
        for name, rope in SCALINGS.items()
    }
    assert (reach["default"], reach["linear"], reach["llama3"], reach["yarn"]) == (100, 250, 100, 256)

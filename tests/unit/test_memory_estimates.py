"""What the plan expects of a forward is what a worker takes for it."""

from pathlib import Path

import pytest
import torch

from checkpoint.config_json import load_model_config
from checkpoint.memory import forward_bytes
from workers.collectives import SoloGroup
from workers.engine.kv_cache import KVLayout, one_block_batch
from workers.models.loading import load_model

NUM_TOKENS = 512
CPU = torch.device("cpu")
DEMO_DRAFT = Path(__file__).parents[2] / "models/demo-draft"


def test_native_kernels_take_what_the_plan_expects(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_model_config(DEMO_DRAFT)
    model = load_model(DEMO_DRAFT, dtype=torch.float32, device=CPU, group=SoloGroup(), max_model_len=NUM_TOKENS)
    if model.native is None:
        pytest.skip("nothing is compiled here")
    layout = KVLayout(
        num_layers=config.num_layers,
        block_size=NUM_TOKENS,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=torch.float32,
    )
    caches = layout.allocate(1, CPU)
    taken: list[int] = []
    empty = torch.empty

    def counted(*args: object, **kwargs: object) -> torch.Tensor:
        tensor: torch.Tensor = empty(*args, **kwargs)  # type: ignore[call-overload]
        taken.append(tensor.nbytes)
        return tensor

    monkeypatch.setattr(torch, "empty", counted)
    with torch.inference_mode():
        model.forward(one_block_batch(NUM_TOKENS, CPU), caches)
    expected = forward_bytes(config, 1, num_tokens=NUM_TOKENS, value_bytes=4)
    assert expected * 0.98 <= sum(taken) <= expected * 1.02

"""A target whose KV cache is in FP8: its logits are close to exact ones, and do not depend on how a prompt is fed."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench.kv_precision import Cache
from checkpoint.errors import LoadError
from workers.collectives import Group, SoloGroup
from workers.engine.kv_cache import KVLayout
from workers.models.decoder import CausalLM
from workers.models.fp8_caches import use_fp8_caches
from workers.models.loading import load_model

TARGET = Path(__file__).parents[2] / "models" / "demo-target"
TOKENS = [(31 * i + i * i % 89) % 4000 for i in range(75)]
DTYPES = [torch.float32, torch.bfloat16]
CPU = torch.device("cpu")


def load(dtype: torch.dtype, group: Group | None = None) -> CausalLM:
    return load_model(TARGET, dtype=dtype, device=CPU, group=group or SoloGroup(), max_model_len=128)


def logits(model: CausalLM, dtype: torch.dtype, step: int = len(TOKENS)) -> Tensor:
    """Of all tokens, computed some at a time."""
    heads, head_dim = model.kv_heads_per_rank, model.config.head_dim
    layout = KVLayout(num_layers=8, block_size=16, num_kv_heads=heads, head_dim=head_dim, dtype=dtype)
    cache = Cache(model, layout, len(TOKENS))
    with torch.inference_mode():
        parts = [cache.logits(TOKENS[start : start + step], start) for start in range(0, len(TOKENS), step)]
    return torch.cat(parts)


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_are_close_to_exact_ones_and_the_same_in_any_chunks(dtype: torch.dtype) -> None:
    exact, rounded = load(dtype), load(dtype)
    digest = use_fp8_caches(rounded, TARGET, max_model_len=128, dtype=dtype)
    assert digest == use_fp8_caches(load(dtype), TARGET, max_model_len=128, dtype=dtype)
    expected, found = logits(exact, dtype), logits(rounded, torch.uint8)
    assert not torch.equal(found, expected)
    assert (found - expected).norm() < 0.15 * (expected - expected.mean(1, keepdim=True)).norm()
    for step in (1, 7):
        torch.testing.assert_close(logits(rounded, torch.uint8, step), found, rtol=0, atol=2e-2)


def test_without_a_tokenizer_there_are_no_scales(tmp_path: Path) -> None:
    with pytest.raises(
        LoadError, match=r"KV in fp8: .* has no tokenizer.json.*leave kv_cache.dtype or draft.kv_dtype out"
    ):
        use_fp8_caches(load(torch.float32), tmp_path, max_model_len=64, dtype=torch.float32)

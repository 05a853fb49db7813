"""Captures the steps of an engine at start, on all its ranks or on none."""

import logging
from collections.abc import Callable

import torch

from checkpoint.captured_sizes import captured_bytes, step_sizes
from checkpoint.config import ModelConfig
from echelon.pb.process_pb2 import EngineSpec
from echelon.pb.worker_pb2 import EngineRole
from workers.captured.captured_model import CapturedModel
from workers.engine.kv_cache import KVCaches
from workers.models.decoder import CausalLM
from workers.models.layer_parallel_decoder import LayerParallelLM
from workers.process.cohort import Cohort
from workers.sampling.sampler import Sampler

logger = logging.getLogger(__name__)


def capture_steps(
    spec: EngineSpec,
    model: CausalLM | LayerParallelLM,
    kv_caches: KVCaches,
    sampler: Sampler,
    *,
    device: torch.device,
    on_captured: Callable[[int, int], None],
) -> CapturedModel | None:
    """The captured steps of a loaded model on this rank; None, with a warning, if they cannot be had."""
    sizes = step_sizes(spec.max_num_seqs, spec.captured_new_tokens)
    if not sizes or not isinstance(model, CausalLM):
        return None
    captured = CapturedModel(
        model,
        kv_caches,
        sampler,
        sizes,
        max_blocks=-(-spec.max_model_len // spec.block_size),
        drafts=spec.role == EngineRole.ENGINE_ROLE_DRAFT,
        device=device,
    )
    try:
        captured.capture(on_captured)
    except RuntimeError as err:  # what CUDA refuses, and a probe that differs
        logger.warning("CUDA graphs are not used, each kernel is launched by itself: %s", err)
        return None
    return captured


def agree_on_steps(
    captured: CapturedModel | None, cohort: Cohort, key: str, *, takes_part: bool
) -> CapturedModel | None:
    """The captured steps if every rank of the engine has them: ranks must make the same calls of collectives. All ranks
    call it, those without the engine too."""
    has_steps = not takes_part or captured is not None
    return captured if all(answer == "yes" for answer in cohort.gather(key, "yes" if has_steps else "no")) else None


def reserved_captured_bytes(spec: EngineSpec, config: ModelConfig, *, num_ranks: int, value_bytes: int) -> int:
    """Memory for captured steps on one rank."""
    return captured_bytes(
        config,
        num_ranks=num_ranks,
        max_num_seqs=spec.max_num_seqs,
        most_new=spec.captured_new_tokens,
        max_model_len=spec.max_model_len,
        block_size=spec.block_size,
        value_bytes=value_bytes,
        drafts=spec.role == EngineRole.ENGINE_ROLE_DRAFT,
    )

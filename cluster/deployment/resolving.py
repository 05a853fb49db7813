"""What an open setting of a deployment becomes."""

from dataclasses import replace
from typing import Literal

from childproc.speculation import DRAFT_MODEL_METHODS
from cluster.deployment.settings import ModelSettings, Pipeline, SchedulerSettings, Speculation, SpeculationSettings

SEPARATE_PIPELINE: Pipeline = "continuous"  # the default of a draft on devices of its own; a colocated one takes turns
AUTO_NUM_SPECULATIVE_TOKENS = 8  # a limit: the policy chooses below it
AUTO_VERDICT_CACHE_ROWS = 8
_DEFAULT_MAX_MODEL_LEN = 32768  # a longer context must be asked for: its KV cache decides how many seqs fit


def resolve_speculation(wanted: SpeculationSettings, *, has_draft: bool, colocated: bool) -> Speculation:
    """Fill in what is unset (None, "auto")."""
    pipeline, verdict_cache = wanted.pipeline, wanted.verdict_cache
    method = wanted.method or ("draft_model" if has_draft else "none")
    if method == "none":
        return Speculation()
    if method not in DRAFT_MODEL_METHODS:
        pipeline = "serial"  # lookup takes no time that could overlap
    pipeline = pipeline or ("serial" if colocated else SEPARATE_PIPELINE)
    is_continuous = pipeline == "continuous"
    if verdict_cache == "auto":
        verdict_cache = AUTO_VERDICT_CACHE_ROWS
    return Speculation(
        method=method,
        pipeline=pipeline,
        num_speculative_tokens=(
            AUTO_NUM_SPECULATIVE_TOKENS if wanted.num_speculative_tokens == "auto" else wanted.num_speculative_tokens
        ),
        adaptive=wanted.num_speculative_tokens == "auto",
        window=wanted.window if is_continuous and wanted.window != "auto" else 0,
        verdict_cache_rows=verdict_cache if is_continuous and verdict_cache != "off" else 0,
    )


def resolve_batch_invariant(wanted: bool | Literal["auto"], device: Literal["cpu", "cuda"]) -> bool | None:
    """None: only the workers can say. On CUDA nobody has measured what it costs."""
    if wanted == "auto":
        return None if device == "cpu" else False
    return wanted


def resolve_scheduler(wanted: SchedulerSettings, target: ModelSettings) -> SchedulerSettings:
    """An open max_model_len becomes the target's own limit, at most 32768; a longer context must be asked for."""
    if wanted.max_model_len is not None:
        return wanted
    return replace(wanted, max_model_len=min(target.folder.config.max_len, _DEFAULT_MAX_MODEL_LEN))

"""What a person may ask of the settings of a deployment that runs."""

from cluster.deployment.made_drafts import what_was_made
from cluster.deployment.settings import Settings
from cluster.planning.plan import size_text
from echelon.pb.worker_pb2 import EngineInfo


def shown_settings(
    settings: Settings, target: EngineInfo | None, draft: EngineInfo | None
) -> dict[str, str | int | float | bool]:
    """What defaults and "auto" have become. `target`, `draft`: what their workers report, if they are ready."""
    batch_invariant = target.batch_invariant if target else settings.batch_invariant
    return {
        "method": settings.method,
        "pipeline": settings.pipeline,
        "num_speculative_tokens": settings.num_speculative_tokens,
        "placement": "colocated" if settings.colocated else "separate",
        "device": settings.device,
        "dtype": settings.target.dtype,
        "weights": _shown_weights(settings, target),
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.scheduler.max_num_seqs,
        "max_num_batched_tokens": settings.scheduler.max_num_batched_tokens,
        "block_size": settings.kv_cache.block_size,
        "batch_invariant": "auto" if batch_invariant is None else batch_invariant,
        "draft": _shown_draft(settings, draft),
    }


def _shown_weights(settings: Settings, target: EngineInfo | None) -> str:
    """Whether the target keeps the bits of a quantised checkpoint, and what it takes."""
    folder = settings.target.folder
    stored = folder.config.stored_as
    held = f"{stored.name}, as stored" if stored is not None and folder.keeps_bits else settings.target.dtype
    return held if target is None else f"{held}, {size_text(target.weight_bytes)} on a rank"


def _shown_draft(settings: Settings, draft: EngineInfo | None) -> str:
    """A draft that was made at load, and what it takes; empty if it is a model as it is."""
    made = what_was_made(settings)
    if not made or draft is None:
        return made
    shown = f"{made}, {size_text(draft.weight_bytes)} on a rank"
    if not draft.lower_weight_bytes:
        return shown
    kv_sizes = f"{size_text(draft.kv_cache_bytes)} and {size_text(draft.lower_kv_cache_bytes)}"
    return f"{shown} and {size_text(draft.lower_weight_bytes)} beneath it; KV cache {kv_sizes}"

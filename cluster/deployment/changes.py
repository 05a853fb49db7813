"""What differs between a deployment that runs and its edited file. Pure."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from checkpoint.folder import ModelFolder
from cluster.deployment.settings import ModelSettings, ScalingSettings, Settings

# Settings that have another name in the file.
_KEYS = {
    "num_replicas": "replicas.min",
    "rollout": "replicas.rollout",
    "max_replicas": "replicas.max",
    "scaling.target_ongoing_requests": "replicas.target_ongoing_requests",
    "scaling.upscale_delay_s": "replicas.upscale_delay_s",
    "scaling.downscale_delay_s": "replicas.downscale_delay_s",
    "target.tp_size": "target.tensor_parallel_size",
    "draft.tp_size": "draft.tensor_parallel_size",
    "draft.layer_parallel": "draft.layer_parallel_*",
    "target.folder": "target.model",
    "draft.folder": "draft.model",
    "draft.lower_draft": "draft.draft.method",
    "draft.lower.folder": "draft.draft.model",
    "colocated": "draft.placement",
    "speculation.adaptive": "speculation.num_speculative_tokens",
    "speculation.verdict_cache_rows": "speculation.verdict_cache",
}
# That come or go as a whole.
_SECTIONS = {"scaling": "replicas.target_ongoing_requests", "draft.lower": "draft.draft.model"}
# Follow from others.
_NO_KEYS = ("notes", "model_name", "target.role", "draft.role", "target.kv_dtype", "draft.lower.tp_size")
_MOST_REPLICAS = "replicas.max"  # decides the shares of what runs where there are tiers
_LIVE = {
    "replicas.min",
    "replicas.target_ongoing_requests",
    "replicas.upscale_delay_s",
    "replicas.downscale_delay_s",
    "replicas.rollout",
    "startup_timeout_s",
    "drain_timeout_s",
    "spares",
}
# What a replica has to itself.
_ROLLED = (
    "target.",
    "draft",
    "speculation",
    "kv_cache",
    "scheduler.max_model_len",
    "scheduler.max_num_seqs",
    "scheduler.max_num_batched_tokens",
    "scheduler.max_queue",
    "scheduler.enable_prefix_caching",
    "attention",
    "batch_invariant",
    "cpu",
    "cuda",
    "collective_timeout_s",
)


class Effect(StrEnum):
    """What a change takes."""

    LIVE = "nothing restarts"
    ROLLED = "replica by replica"
    DOWN = "needs down and up"


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    key: str  # of the deployment file
    old: str
    new: str
    effect: Effect


def changes(old: Settings, new: Settings) -> list[Change]:
    """In the order of the settings."""
    return [
        Change(key=key, old=_shown(before, key), new=_shown(after, key), effect=_effect(key, old))
        for key, before, after in _differences(old, new)
    ]


def _effect(key: str, old: Settings) -> Effect:
    if key in _LIVE or (key == _MOST_REPLICAS and not old.kv_cache.cpu_bytes):
        return Effect.LIVE
    return Effect.ROLLED if key.startswith(_ROLLED) else Effect.DOWN


def _differences(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Key and values."""
    for field in dataclasses.fields(old):
        name, before, after = f"{path}{field.name}", getattr(old, field.name), getattr(new, field.name)
        if name in _NO_KEYS or before == after:
            continue
        if name in _KEYS or not (dataclasses.is_dataclass(before) and dataclasses.is_dataclass(after)):
            yield _KEYS.get(name) or _SECTIONS.get(name, name), before, after
        else:
            yield from _differences(before, after, f"{name}.")


def _shown(value: Any, key: str) -> str:
    """For people. A folder whose files have changed shows the same text twice."""
    if isinstance(value, ModelSettings):
        value = value.folder
    if isinstance(value, ModelFolder):
        rounded = "" if value.quantization is None else f" in {value.quantization.format}"
        return f"{value.path}{rounded}, layers: {value.config.num_layers}"
    if isinstance(value, ScalingSettings):
        return str(value.target_ongoing_requests)
    if isinstance(value, bool) and key == _KEYS["speculation.adaptive"]:
        return "auto" if value else "fixed"
    if value in (None, ""):
        return "none"
    return "given" if dataclasses.is_dataclass(value) else str(value)

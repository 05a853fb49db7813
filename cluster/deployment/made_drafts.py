"""Drafts that are made when they are loaded: rounded weights, the first layers only, of the target itself or of another
model."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from checkpoint.quantization import Quantization, WeightFormat
from childproc.tier_block import TierDtype
from cluster.deployment.settings import ModelSettings, Settings
from cluster.errors import Problem

SELF = "self"  # draft.model: the target's own checkpoint


def made_at_load(
    draft: ModelSettings, device: Literal["cpu", "cuda"], *, quantization: WeightFormat | None, num_layers: int
) -> ModelSettings:
    """The draft that is made of a model; num_layers 0: of all its layers. Raises LoadError if it has fewer."""
    folder = draft.folder.first_layers(num_layers)
    if quantization is not None:
        folder = folder.rounded(Quantization(format=quantization, device=device))
    return replace(draft, folder=folder)


def quantization_problems(draft: ModelSettings) -> Iterator[Problem]:
    """Why the draft's weights cannot be rounded as they should be."""
    wanted, layers = draft.folder.quantization, draft.layer_parallel
    if wanted is None:
        return
    problem = wanted.problem(
        draft.folder.config,
        num_ranks=draft.num_ranks,
        splits_heads=layers is None,
        splits_mlps=layers is None or layers.mlps == "tensor_parallel",
    )
    if problem is not None:
        remedy = "use int4 or int8"
        yield Problem(path="draft.quantization", value=repr(wanted.format), message=problem, remedy=remedy)


def kv_dtype_problems(draft: ModelSettings, tier_dtype: TierDtype) -> Iterator[Problem]:
    """Why the draft's KV cannot be in FP8."""
    if draft.kv_dtype != "fp8":
        return
    message = ""
    if draft.layer_parallel is not None:
        message = "is not there for a layer-parallel draft"
    elif tier_dtype != "same":
        message = f"has 8 bits already, and kv_cache.tier_dtype {tier_dtype} would round its blocks again"
    if message:
        yield Problem(path="draft.kv_dtype", value="'fp8'", message=message, remedy="leave one of them out")


def what_was_made(settings: Settings) -> str:
    """Of which weights the draft is made at load, and how, and what drafts for it, for people; empty if it is a model
    as it is."""
    draft = settings.draft
    if draft is None:
        return ""
    is_self = draft.folder.path == settings.target.folder.path
    beneath = "earlier text" if draft.lower_draft else draft.lower and draft.lower.folder.path.name
    if not is_self and draft.folder.quantization is None and not beneath and draft.kv_dtype == "auto":
        return ""
    source = "the target's own weights" if is_self else draft.folder.path.name
    rounded = "" if draft.folder.quantization is None else f" in {draft.folder.quantization.format}"
    kv = "" if draft.kv_dtype == "auto" else f", KV in {draft.kv_dtype}"
    lower = f", with drafts of its own from {beneath}" if beneath else ""
    return f"{source}{rounded}, {draft.folder.config.num_layers} layers{kv}{lower}"

"""What a person should know of the models of a plan."""

from collections.abc import Iterator

from childproc.batch_invariance import why_not_free
from cluster.deployment.made_drafts import what_was_made
from cluster.deployment.settings import ModelSettings, Settings
from cluster.deployment.stored_weights import why_dequantized
from cluster.planning.plan import size_text


def model_notes(settings: Settings) -> Iterator[str]:
    """All of them."""
    yield from stored_weights_notes(settings)
    yield from _made_draft_notes(settings)
    yield from _lower_draft_notes(settings)
    if settings.draft is not None and settings.draft.kv_dtype == "fp8" and settings.device == "cpu":
        yield "the draft's KV in fp8 takes half the memory, and a CPU two to four times as long for a step"
    yield from _layer_parallel_notes(settings)
    yield from _draft_limit_notes(settings)
    yield from _batch_invariance_notes(settings)


def _made_draft_notes(settings: Settings) -> Iterator[str]:
    """What a draft that is made at load takes, beside the target."""
    made, draft, target = what_was_made(settings), settings.draft, settings.target
    if made and draft is not None:
        lower = draft.lower
        beneath = (
            f"; beneath it, a step of {lower.folder.path.name} reads {size_text(lower.step_bytes)} and a token of KV "
            f"takes {lower.kv_bytes_per_token} bytes more on a rank"
            if lower
            else ""
        )
        yield (
            f"the draft is made of {made}; a step reads {size_text(draft.step_bytes)} of weights on a rank, one of the "
            f"target {size_text(target.step_bytes)}; a token of KV takes {draft.kv_bytes_per_token} bytes on a rank of "
            f"the draft, {target.kv_bytes_per_token} on one of the target{beneath}"
        )


def _lower_draft_notes(settings: Settings) -> Iterator[str]:
    """A level beneath the draft that cannot pay."""
    draft = settings.draft
    if draft is not None and draft.lower is not None and draft.lower.step_bytes >= draft.step_bytes:
        yield (
            f"a step of {draft.lower.folder.path.name} reads no less than one of the draft above it, so it will hardly "
            "be asked for drafts; a smaller model would be"
        )


def stored_weights_notes(settings: Settings) -> Iterator[str]:
    """Which models are stored in few bits."""
    for model in (settings.target, settings.draft):
        if model is not None and (stored := model.folder.config.stored_as) is not None:
            yield f"the {model.role}'s weights are stored as {stored.name}; {_how_held(model, settings)}"


def _how_held(model: ModelSettings, settings: Settings) -> str:
    if model.folder.keeps_bits:
        return "workers keep these bits"
    if model.folder.quantization is not None:
        return f"workers hold them in {model.folder.quantization.format}"
    compiles, batch_invariant = settings.cpu.compile != "off", settings.batch_invariant is True
    reason = why_dequantized(model, settings.device, compiles=compiles, batch_invariant=batch_invariant)
    return f"workers hold them in {model.dtype}" + ("" if reason is None else f", because {reason}")


def _layer_parallel_notes(settings: Settings) -> Iterator[str]:
    wanted = None if settings.draft is None else settings.draft.layer_parallel
    if wanted is not None and wanted.num_ranks == 1:
        yield f"attention of {wanted.size} draft layers at once is one batched pass on target rank 0"


def _draft_limit_notes(settings: Settings) -> Iterator[str]:
    if settings.draft is not None and settings.max_model_len_of("draft") < settings.max_model_len:
        limit = settings.max_model_len_of("draft")
        yield f"the draft model's own limit is {limit} tokens: beyond them a seq continues without drafts"


def _batch_invariance_notes(settings: Settings) -> Iterator[str]:
    """Why `batch_invariant: auto` will be false. Whether it will be true, only the workers can say."""
    if settings.batch_invariant is not None:
        return
    target, compiles = settings.target, settings.cpu.compile != "off"
    reason = why_not_free(
        num_ranks=target.num_ranks, dtype=target.dtype, compiles=compiles, keeps_bits=target.folder.keeps_bits
    )
    if reason is not None:
        yield f"batch_invariant is false, for auto: {reason}; the output is exact up to near ties"

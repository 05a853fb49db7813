"""What drafters could gain, estimated before a start from bytes, latency and an acceptance that a person gives.

A step takes a fixed time and that of reading its weights and keys and values. A target that verifies a few drafts reads
what a plain step reads, so it is taken to take as long. A round of k drafts, each accepted with probability a, yields
(1 - a^(k+1)) / (1 - a) tokens (arXiv 2406.14066). What a draft costs matters more than how good a model it is (arXiv
2402.01528).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final, get_args

from checkpoint.quantization import WeightFormat
from cluster.deployment.made_drafts import made_at_load, quantization_problems, what_was_made
from cluster.deployment.settings import ModelSettings, Settings

_MOST_DRAFTS: Final = 16  # the limit of speculation.num_speculative_tokens
_CONTEXT: Final = 1024  # tokens whose keys and values a step reads
# Of weights in few bits, the share of the bandwidth that a CPU reaches, by the bits of a code: it has to expand them.
# Measured with one thread of an Intel Xeon (docs/choosing-a-draft.md), where bf16 weights count as 1.
_CPU_SHARE: Final = {8: 0.7, 4: 0.6}


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Of one device. The defaults are assumptions; none is measured."""

    bandwidth: float  # bytes a second from its memory
    step_s: float  # that a step takes besides


ASSUMED: Final = {"cpu": Speed(bandwidth=20e9, step_s=0.5e-3), "cuda": Speed(bandwidth=2e12, step_s=2e-3)}


@dataclass(frozen=True, slots=True, kw_only=True)
class DrafterEstimate:
    """One drafter at one acceptance."""

    name: str
    acceptance: float
    step_bytes: int  # that a draft step reads on one rank; 0: it reads nothing
    step_s: float
    num_drafts: int  # that gain most
    speedup: float  # of one seq, as a multiple of plain decoding


def estimate_drafters(settings: Settings, acceptance: float, speed: Speed) -> Iterator[DrafterEstimate]:
    """The drafter of the deployment first, then those that need no other model."""
    target = _step(settings.target, speed, settings.device)
    for name, draft, overlaps in _drafters(settings):
        step = _Step(0, 0.0) if draft is None else _step(draft, speed, settings.device)

        draft_token_s = step.seconds
        if draft is not None and draft.lower is not None:
            draft_token_s = _token_s(step, _step(draft.lower, speed, settings.device), acceptance)

        def speedup(num_drafts: int, draft_token_s: float = draft_token_s, overlaps: bool = overlaps) -> float:
            draft_s = num_drafts * draft_token_s
            round_s = max(draft_s, target.seconds) if overlaps else draft_s + target.seconds
            return _expected_tokens(acceptance, num_drafts) * target.seconds / round_s

        best = max(range(1, _MOST_DRAFTS + 1), key=speedup)
        yield DrafterEstimate(
            name=name,
            acceptance=acceptance,
            step_bytes=step.num_bytes,
            step_s=draft_token_s,
            num_drafts=best,
            speedup=speedup(best),
        )


@dataclass(frozen=True, slots=True)
class _Step:
    num_bytes: int
    seconds: float


def _step(model: ModelSettings, speed: Speed, device: str) -> _Step:
    kv_bytes = _CONTEXT * model.kv_bytes_per_token
    share = _CPU_SHARE.get(_code_bits(model), 1.0) if device == "cpu" else 1.0
    seconds = speed.step_s + (model.step_bytes / share + kv_bytes) / speed.bandwidth
    return _Step(model.step_bytes + kv_bytes, seconds)


def _code_bits(model: ModelSettings) -> int:
    """Of its matrices in memory, if they are held in few bits; else 0."""
    folder = model.folder
    if folder.quantization is not None:
        return 8 if folder.quantization.format == "int8" else 4
    return folder.config.stored_as.num_bits if folder.keeps_bits and folder.config.stored_as is not None else 0


def _drafters(settings: Settings) -> Iterator[tuple[str, ModelSettings | None, bool]]:
    """Names, models (None: lookup), and whether the target computes meanwhile."""
    draft = settings.draft
    if draft is not None:
        overlaps = settings.pipeline == "continuous"
        yield f"{what_was_made(settings) or draft.folder.path.name} (this file)", draft, overlaps
    whole = replace(settings.target, role="draft", folder=replace(settings.target.folder, keeps_bits=False))
    for format in get_args(WeightFormat):
        made = made_at_load(whole, settings.device, quantization=format, num_layers=0)
        is_this = draft is not None and (draft.folder.path, draft.folder.quantization) == (
            made.folder.path,
            made.folder.quantization,
        )
        if not is_this and not any(quantization_problems(made)):
            yield f"self, {format}, colocated", made, False
    yield "suffix, where earlier text repeats", None, False


def _token_s(draft: _Step, lower: _Step, acceptance: float) -> float:
    """Of a draft that verifies what a model beneath it proposes: as many tokens as are best, which may be none. The
    draft is taken to keep as large a share of them as the target keeps of drafts."""
    counts = range(_MOST_DRAFTS + 1)
    return min((draft.seconds + num * lower.seconds) / _expected_tokens(acceptance, num) for num in counts)


def _expected_tokens(acceptance: float, num_drafts: int) -> float:
    return float(sum(acceptance**depth for depth in range(num_drafts + 1)))

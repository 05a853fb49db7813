"""What drafts for a draft, as the file names it: earlier text, or a small model."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from checkpoint.errors import LoadError
from checkpoint.folder import find_model, read_model_folder
from cluster.deployment.schema import LowerDraft
from cluster.deployment.settings import ModelSettings
from cluster.errors import Problem

_WHERE = "draft.draft"


def with_lower(draft: ModelSettings, section: LowerDraft | None, base: Path, problems: list[Problem]) -> ModelSettings:
    """The draft with what drafts for it; without where that is wrong, which joins `problems`. `base`: where relative
    paths start."""
    if section is None:
        return draft
    if (section.method is None) == (section.model is None):
        remedy = "set method: suffix, or the folder of a small model"
        problems.append(Problem(path=_WHERE, message="needs one of method and model", remedy=remedy))
        return draft
    if section.model is None:
        return replace(draft, lower_draft="suffix")
    try:
        folder = read_model_folder(find_model(section.model, base), dtype=draft.dtype)
    except LoadError as err:
        problems.append(_problem(section.model, err.message, err.remedy))
        return draft
    lower = ModelSettings(role="draft", folder=folder, tp_size=draft.tp_size)
    problems += [_problem(section.model, *found) for found in _conflicts(draft, lower)]
    return replace(draft, lower=lower)


def _conflicts(draft: ModelSettings, lower: ModelSettings) -> Iterator[tuple[str, str]]:
    """Message and remedy of each."""
    if draft.layer_parallel is not None:
        yield "cannot be beneath a layer-parallel draft", "use method: suffix, or layer_parallel_size: 1"
        return
    uneven = lower.folder.config.tensor_parallel_problem(lower.tp_size)
    if uneven is not None:
        yield f"shares the draft's {lower.tp_size} ranks: {uneven}", "lower draft.tensor_parallel_size"


def _problem(model: str, message: str, remedy: str) -> Problem:
    return Problem(path=f"{_WHERE}.model", value=repr(model), message=message, remedy=remedy)

"""From a deployment file to settings: all problems at once, each with its line, its path and a remedy."""

import difflib
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from checkpoint.errors import LoadError
from checkpoint.folder import ModelFolder, find_model, read_model_folder
from childproc.speculation import DRAFT_MODEL_METHODS
from cluster.deployment.schema import DeploymentFile, Draft, KvCache, Section, Target
from cluster.deployment.settings import (
    CpuSettings,
    DiskSettings,
    KvCacheSettings,
    ModelSettings,
    Role,
    SchedulerSettings,
    ServerSettings,
    Settings,
    SpeculationSettings,
    resolve_scheduler,
    resolve_speculation,
)
from cluster.deployment.text import check_text
from cluster.deployment.yaml_lines import read_document
from cluster.errors import ConfigError, Problem
from cluster.layer_parallel import LayerParallel, layer_parallel, layer_parallel_key_problems

T = TypeVar("T")

# How alike a key must be to a known one to be suggested, by difflib (1: equal); other sections have many keys.
_ALIKE, _ALIKE_ELSEWHERE = 0.7, 0.85

# By pydantic's error types. Where there is no remedy, the message says what the value must be.
_REMEDIES = {
    "int_type": "write a whole number, without quotes",
    "float_type": "write a number, without quotes",
    "bool_type": "write true or false, without quotes",
    "string_type": "write text, in quotes where it looks like something else",
    "string_unicode": "take out half a surrogate pair, like \\ud800",
    "list_type": "write a list, like [1, 2]",
}


def load_deployment(path: Path) -> Settings:
    """Read and check a deployment file and the model folders that it names.

    Raises ConfigError with every problem found: first those of the file itself, or, where there are none, those of
    the models and of how the values go together.
    """
    document = read_document(path)
    try:
        file = DeploymentFile.model_validate(document.value)
    except ValidationError as err:
        problems = [_problem(details) for details in err.errors()]
    else:
        settings, problems = _resolve(file, path.resolve().parent)
        if settings is not None and not problems:
            return settings
    lined = [replace(p, line=document.line_of(p.path.split("."))) for p in problems]
    raise ConfigError(str(path), sorted(lined, key=lambda problem: problem.line or 0))


def _problem(details: ErrorDetails) -> Problem:
    """What pydantic found, in our words."""
    path = ".".join(str(part) for part in details["loc"]) or "file"
    kind, message, value = details["type"], details["msg"], details["input"]
    if kind == "extra_forbidden":
        return Problem(path=path, message="unknown key", remedy=_nearest(tuple(str(p) for p in details["loc"])))
    if kind == "missing":
        return Problem(path=path, message="is missing", remedy="add it")
    if kind == "invalid_key":
        return Problem(path=path, message="a key must be text", remedy="put it in quotes, or take it out")
    if kind == "model_type":
        return Problem(path=path, message="must be a section of keys", remedy="fill it in or leave it out")
    if kind == "string_pattern_mismatch":
        message = "must be lower-case letters, digits and hyphens, at most 63"
    message = message.removeprefix("Value error, ").replace("Input should ", "must ")
    return Problem(path=path, message=message, remedy=_REMEDIES.get(kind, ""), value=repr(value))


def _nearest(path: tuple[str, ...]) -> str:
    """The known key that an unknown one probably stands for: spelt alike, or the same word in another section."""
    *parents, key = path
    known = dict(_sections(DeploymentFile))
    section = known.get(".".join(parents), DeploymentFile)
    wanted = key.replace("-", "_").lower()
    by_lower = {name.lower(): name for name in section.model_fields}
    close = difflib.get_close_matches(wanted, by_lower, n=1, cutoff=_ALIKE)
    if close:
        return f"did you mean {'.'.join([*parents, by_lower[close[0]]])}?"
    everywhere = [name for model in known.values() for name in model.model_fields]
    alike = difflib.get_close_matches(wanted, everywhere, n=1, cutoff=_ALIKE_ELSEWHERE)
    if alike:
        places = [f"{path}.{alike[0]}".lstrip(".") for path, model in known.items() if alike[0] in model.model_fields]
        return f"did you mean {' or '.join(places)}?"
    return f"known keys here: {', '.join(section.model_fields)}"


def _sections(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    yield path, model
    for name, field in model.model_fields.items():
        for candidate in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                yield from _sections(candidate, f"{path}.{name}".lstrip("."))


def _resolve(file: DeploymentFile, base: Path) -> tuple[Settings | None, list[Problem]]:
    """Fill in what depends on the models; None where they cannot be read."""
    problems: list[Problem] = []
    target = _model("target", file.target, base, problems)
    draft = None if file.draft is None else _model("draft", file.draft, base, problems)
    method = file.speculation.method
    if method in DRAFT_MODEL_METHODS and file.draft is None:
        remedy = "add a draft section or set method: " + ("suffix" if method == "hybrid" else "none")
        message = "needs a draft model"
        problems.append(Problem(path="speculation.method", value=f"'{method}'", message=message, remedy=remedy))
    if target is None or (file.draft is not None and draft is None):
        return None, problems
    if draft is not None and file.draft is not None:
        draft = replace(draft, layer_parallel=_layer_parallel(file.draft, target))
        problems += _layer_parallel_problems(file.draft, draft)
    if method is not None and method not in DRAFT_MODEL_METHODS:
        draft = None  # none and suffix are for comparisons, so the file may keep its draft section
    settings = _settings(file, base, target, draft)
    if file.scheduler.max_model_len is None and settings.device == "cpu":
        settings = _cap_max_model_len(settings)
    text = check_text(settings, {"target": file.target.model, "draft": file.draft.model if file.draft else ""})
    settings = replace(settings, notes=text.notes)
    problems += text.problems
    return settings, problems + list(_pair_problems(file, settings)) + list(_limit_problems(settings))


def _model(role: Role, section: Target | Draft, base: Path, problems: list[Problem]) -> ModelSettings | None:
    try:
        folder = read_model_folder(find_model(section.model, base), dtype=section.dtype)
    except LoadError as err:
        value = repr(section.model)
        problems.append(Problem(path=f"{role}.model", value=value, message=err.message, remedy=err.remedy))
        return None
    tp_size = section.tensor_parallel_size
    uneven = folder.config.tensor_parallel_problem(tp_size)
    if uneven is not None:
        path, remedy = f"{role}.tensor_parallel_size", folder.config.tensor_parallel_remedy()
        problems.append(Problem(path=path, value=str(tp_size), message=uneven, remedy=remedy))
    return ModelSettings(role=role, folder=folder, tp_size=tp_size)


def _layer_parallel(section: Draft, target: ModelSettings) -> LayerParallel | None:
    return layer_parallel(
        section.layer_parallel_size,
        target_tp_size=target.tp_size,
        colocated=section.placement == "colocated",
        groups=None if section.layer_groups == "auto" else section.layer_groups,
        weights=section.layer_parallel_weights,
        mlps=section.layer_parallel_mlp,
    )


def _layer_parallel_problems(section: Draft, draft: ModelSettings) -> Iterator[Problem]:
    return layer_parallel_key_problems(
        section.layer_parallel_size,
        draft.folder.config,
        tp_size=draft.tp_size,
        groups=None if section.layer_groups == "auto" else section.layer_groups,
        mlps=section.layer_parallel_mlp,
    )


def _settings(file: DeploymentFile, base: Path, target: ModelSettings, draft: ModelSettings | None) -> Settings:
    colocated = draft is not None and file.draft is not None and file.draft.placement == "colocated"
    return Settings(
        name=file.name,
        model_name=_served_name(file.target.model, target.folder),
        target=target,
        draft=draft,
        speculation=resolve_speculation(
            _section(SpeculationSettings, file.speculation), has_draft=draft is not None, colocated=colocated
        ),
        colocated=colocated,
        device=file.device,
        cpu=_section(CpuSettings, file.cpu),
        kv_cache=_kv_cache(file.kv_cache, base),
        scheduler=resolve_scheduler(_section(SchedulerSettings, file.scheduler), target),
        server=_section(ServerSettings, file.server),
        batch_invariant=file.batch_invariant,
        startup_timeout_s=file.startup_timeout_s,
        collective_timeout_s=file.collective_timeout_s,
    )


def _section(kind: type[T], section: Section) -> T:
    """A section of the file as settings: keys of the same name, defaults for those that are left open."""
    values = {field.name: getattr(section, field.name) for field in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in values.items() if value is not None})


def _kv_cache(section: KvCache, base: Path) -> KvCacheSettings:
    settings = _section(KvCacheSettings, section)
    if section.disk is None:
        return settings
    disk = _section(DiskSettings, section.disk)
    return replace(settings, disk=replace(disk, path=str((base / Path(disk.path).expanduser()).resolve())))


def _served_name(model: str, folder: ModelFolder) -> str:
    """The hub id as written, or the last part of a path."""
    is_cached_hub_id = folder.path.parent.name == "snapshots"
    return model if is_cached_hub_id else folder.path.name


def _cap_max_model_len(settings: Settings) -> Settings:
    """A default must work: no longer than what the KV cache of one device holds."""
    models = [settings.target] if settings.draft is None else [settings.target, settings.draft]
    num_tokens = min(settings.kv_cache_bytes(model.role) // model.kv_bytes_per_token for model in models)
    max_model_len = max(1, min(settings.max_model_len, num_tokens))
    return replace(settings, scheduler=replace(settings.scheduler, max_model_len=max_model_len))


def _pair_problems(file: DeploymentFile, settings: Settings) -> Iterator[Problem]:
    target, draft = settings.target, settings.draft
    if draft is None or file.draft is None:
        return
    if settings.colocated and settings.pipeline == "continuous":
        message = "needs a draft on devices of its own: a colocated one takes turns with the target"
        remedy = "use serial or draft.placement: separate"
        yield Problem(path="speculation.pipeline", value="'continuous'", message=message, remedy=remedy)
    if 0 < settings.speculation.window < settings.num_speculative_tokens and not settings.speculation.adaptive:
        message = f"is less than speculation.num_speculative_tokens {settings.num_speculative_tokens}"
        value = str(settings.speculation.window)
        yield Problem(path="speculation.window", value=value, message=message, remedy="raise it or use auto")
    if settings.colocated and draft.tp_size > target.tp_size:
        message = f"a colocated draft has no more ranks than the target, which has {target.tp_size}"
        remedy = "lower it or use placement: separate"
        yield Problem(path="draft.tensor_parallel_size", value=str(draft.tp_size), message=message, remedy=remedy)


def _limit_problems(settings: Settings) -> Iterator[Problem]:
    limit = settings.target.folder.config.max_len
    if settings.max_model_len > limit:
        message = f"the target model's own limit is {limit} tokens"
        yield _limit_problem("max_model_len", settings.max_model_len, message, f"use at most {limit}")
    if settings.scheduler.max_num_batched_tokens < settings.scheduler.max_num_seqs:
        message = f"is less than max_num_seqs ({settings.scheduler.max_num_seqs}): a round could not decode all seqs"
        yield _limit_problem("max_num_batched_tokens", settings.scheduler.max_num_batched_tokens, message, "raise it")
    yield from _kv_problems(settings)
    yield from _tier_problems(settings)


def _tier_problems(settings: Settings) -> Iterator[Problem]:
    cache = settings.kv_cache
    if cache.cpu_bytes and not settings.scheduler.enable_prefix_caching:
        message = "keeps prefixes, and scheduler.enable_prefix_caching is false"
        yield Problem(
            path="kv_cache.cpu_bytes", value=str(cache.cpu_bytes), message=message, remedy="leave one of them out"
        )
    if cache.disk is not None and not cache.cpu_bytes:
        message = "blocks go to disk through host memory"
        yield Problem(path="kv_cache.disk", message=message, remedy="set kv_cache.cpu_bytes too")


def _limit_problem(key: str, value: int, message: str, remedy: str) -> Problem:
    return Problem(path=f"scheduler.{key}", value=str(value), message=message, remedy=remedy)


def _kv_problems(settings: Settings) -> Iterator[Problem]:
    """On cpu the KV cache's size is given, so whether it holds one longest seq is known before anything starts."""
    if settings.device != "cpu":
        return
    target, draft = settings.target.kv_bytes_per_token, settings.draft.kv_bytes_per_token if settings.draft else 0
    if settings.colocated:
        yield from _kv_problem(settings, "", settings.max_model_len, target + draft)
        return
    yield from _kv_problem(settings, "", settings.max_model_len, target)
    if draft:
        yield from _kv_problem(settings, " of the draft", settings.max_model_len_of("draft"), draft)


def _kv_problem(settings: Settings, whose: str, max_model_len: int, per_token: int) -> Iterator[Problem]:
    block_size, device_bytes = settings.kv_cache.block_size, settings.kv_cache.device_bytes
    needed = -(-max_model_len // block_size) * block_size * per_token
    if needed > device_bytes:
        message = (
            f"one seq of max_model_len {max_model_len} takes {needed} bytes a rank{whose} "
            f"({per_token} a token), device_bytes is {device_bytes}"
        )
        remedy = "raise kv_cache.device_bytes or lower scheduler.max_model_len"
        yield Problem(path="kv_cache.device_bytes", message=message, remedy=remedy)

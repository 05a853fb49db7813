"""From a deployment file to settings: all problems at once, each with its line, its path and a remedy."""

import os
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from checkpoint.errors import LoadError
from checkpoint.folder import ModelFolder, find_model, read_model_folder
from childproc.speculation import DRAFT_MODEL_METHODS
from cluster import state_dir
from cluster.deployment.lower_drafts import with_lower
from cluster.deployment.made_drafts import SELF, kv_dtype_problems, made_at_load, quantization_problems
from cluster.deployment.problems import problems_of
from cluster.deployment.resolving import resolve_batch_invariant, resolve_scheduler, resolve_speculation
from cluster.deployment.schema import DeploymentFile, Draft, KvCache, Replicas, Section, Server, Target, Tls
from cluster.deployment.settings import (
    AuthSettings,
    CpuSettings,
    CudaSettings,
    DiskSettings,
    JobsSettings,
    KvCacheSettings,
    ModelSettings,
    Role,
    ScalingSettings,
    SchedulerSettings,
    ServerSettings,
    Settings,
    SpeculationSettings,
    TlsSettings,
)
from cluster.deployment.start_time import start_time_notes, start_time_problems
from cluster.deployment.stored_weights import resolve_weights
from cluster.deployment.text import check_text
from cluster.deployment.tier_problems import tier_problems
from cluster.deployment.yaml_lines import read_document
from cluster.errors import Problem
from cluster.layer_parallel import LayerParallel, layer_parallel, layer_parallel_key_problems

T = TypeVar("T")


def load_deployment(path: Path, *, startup_timeout_s: float | None = None) -> Settings:
    """Read and check a deployment file and the model folders that it names. `startup_timeout_s` replaces the file's.

    Raises ConfigError with every problem found: first those of the file itself, or, if there are none, those of
    the models and of how the values go together.
    """
    document = read_document(path)
    if startup_timeout_s is not None:
        document = replace(document, value={**document.value, "startup_timeout_s": startup_timeout_s})
    try:
        file = DeploymentFile.model_validate(document.value)
    except ValidationError as err:
        problems = problems_of(err, DeploymentFile)
    else:
        settings, problems = _resolve(file, path.resolve().parent)
        if settings is not None and not problems:
            return settings
    raise document.error(path, problems)


def _resolve(file: DeploymentFile, base: Path) -> tuple[Settings | None, list[Problem]]:
    """Fill in what depends on the models; None where they cannot be read."""
    problems: list[Problem] = []
    target = _model("target", file.target, base, problems, model=file.target.model)
    draft = None if file.draft is None else _draft(file, base, problems)
    method = file.speculation.method
    if method in DRAFT_MODEL_METHODS and file.draft is None:
        remedy = "add a draft section or set method: " + ("suffix" if method == "hybrid" else "none")
        message = "needs a draft model"
        problems.append(Problem(path="speculation.method", value=f"'{method}'", message=message, remedy=remedy))
    if target is None or (file.draft is not None and draft is None):
        return None, problems
    if draft is not None and file.draft is not None:
        draft = replace(draft, layer_parallel=_layer_parallel(file.draft, target), kv_dtype=file.draft.kv_dtype)
        draft = with_lower(draft, file.draft.draft, base, problems)
        problems += [*_layer_parallel_problems(file.draft, draft), *quantization_problems(draft)]
        problems += kv_dtype_problems(draft, file.kv_cache.tier_dtype)
    target, draft = _with_stored_weights(file, target, draft, problems)
    if method is not None and method not in DRAFT_MODEL_METHODS:
        draft = None  # none and suffix are for comparisons, so the file may keep its draft section
    settings = _settings(file, base, target, draft)
    if file.scheduler.max_model_len is None and settings.device == "cpu" and settings.attention == "full":
        settings = _cap_max_model_len(settings)
    text = check_text(settings, {"target": file.target.model, "draft": file.draft.model if file.draft else ""})
    settings = replace(settings, notes=(*text.notes, *start_time_notes(settings)))
    problems += text.problems
    return settings, problems + list(_pair_problems(file, settings)) + list(_limit_problems(settings))


def _with_stored_weights(
    file: DeploymentFile, target: ModelSettings, draft: ModelSettings | None, problems: list[Problem]
) -> tuple[ModelSettings, ModelSettings | None]:
    """Both models, with the bits of quantised checkpoints where they can be kept; a draft has no key for it."""
    compiles = file.cpu.compile != "off"
    fixed = file.batch_invariant is True
    target, problem = resolve_weights(
        target, file.target.weights, file.device, compiles=compiles, batch_invariant=fixed
    )
    if problem is not None:
        problems.append(problem)
    if draft is not None:
        draft, _ = resolve_weights(draft, "auto", file.device, compiles=compiles, batch_invariant=fixed)
    return target, draft


def _model(
    role: Role, section: Target | Draft, base: Path, problems: list[Problem], *, model: str
) -> ModelSettings | None:
    try:
        folder = read_model_folder(find_model(model, base), dtype=section.dtype)
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


def _draft(file: DeploymentFile, base: Path, problems: list[Problem]) -> ModelSettings | None:
    """The draft's model, with what is made of it at load."""
    section = file.draft
    assert section is not None, "asked for the draft of a file without one"
    is_self = section.model == SELF
    if is_self and section.quantization is None and section.layers == "all":
        message, remedy = "would be the target again, which is no faster", "set draft.quantization or draft.layers"
        problems.append(Problem(path="draft.model", value=repr(SELF), message=message, remedy=remedy))
        return None
    draft = _model("draft", section, base, problems, model=file.target.model if is_self else section.model)
    if draft is None:
        return None
    num_layers = 0 if section.layers == "all" else section.layers
    try:
        return made_at_load(draft, file.device, quantization=section.quantization, num_layers=num_layers)
    except LoadError as err:
        problems.append(Problem(path="draft.layers", value=str(num_layers), message=err.message, remedy=err.remedy))
        return None


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
        target=replace(target, kv_dtype=file.kv_cache.dtype),
        draft=draft,
        speculation=resolve_speculation(
            _section(SpeculationSettings, file.speculation), has_draft=draft is not None, colocated=colocated
        ),
        num_replicas=file.replicas.min,
        max_replicas=file.replicas.max or file.replicas.min,
        scaling=_scaling(file.replicas),
        rollout=file.replicas.rollout,
        colocated=colocated,
        device=file.device,
        cpu=_section(CpuSettings, file.cpu),
        cuda=_section(CudaSettings, file.cuda),
        kv_cache=_kv_cache(file.kv_cache, base),
        scheduler=resolve_scheduler(_section(SchedulerSettings, file.scheduler), target),
        server=_server(file.server, base),
        jobs=_jobs(file, base),
        attention=file.attention,
        batch_invariant=resolve_batch_invariant(file.batch_invariant, file.device),
        startup_timeout_s=file.startup_timeout_s,
        drain_timeout_s=file.drain_timeout_s,
        collective_timeout_s=file.collective_timeout_s,
        rebuild=file.rebuild,
        spares=file.spares,
    )


def _scaling(replicas: Replicas) -> ScalingSettings | None:
    if replicas.target_ongoing_requests is None:
        return None
    return ScalingSettings(
        target_ongoing_requests=replicas.target_ongoing_requests,
        upscale_delay_s=replicas.upscale_delay_s,
        downscale_delay_s=replicas.downscale_delay_s,
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
    return replace(settings, disk=replace(disk, path=os.path.realpath(_beside(disk.path, base))))


def _server(section: Server, base: Path) -> ServerSettings:
    return ServerSettings(
        host=section.host,
        grpc_port=section.grpc_port,
        http_port=section.http_port or 0,
        gateways=section.gateways,
        audit_file="" if section.audit_file is None else _beside(section.audit_file, base),
        tls=None if section.tls is None else _tls(section.tls, base),
        auth=None if section.auth is None else AuthSettings(tokens_file=_beside(section.auth.tokens_file, base)),
    )


def _jobs(file: DeploymentFile, base: Path) -> JobsSettings:
    section = file.jobs
    if not section.enabled:
        return JobsSettings()
    path = state_dir.folder_of(file.name) / "jobs" if section.path is None else _beside(section.path, base)
    return replace(_section(JobsSettings, section), path=str(path))


def _tls(section: Tls, base: Path) -> TlsSettings:
    client_ca = _beside(section.client_ca, base) if section.client_ca else ""
    return TlsSettings(cert=_beside(section.cert, base), key=_beside(section.key, base), client_ca=client_ca)


def _beside(path: str, base: Path) -> str:
    """A path of the file, which may be relative to its folder. Links stay: Kubernetes replaces what they lead to."""
    return os.path.abspath(base / Path(path).expanduser())


def _served_name(model: str, folder: ModelFolder) -> str:
    """The hub id as written, or the last part of a path."""
    is_cached_hub_id = folder.path.parent.name == "snapshots"
    return model if is_cached_hub_id else folder.path.name


def _cap_max_model_len(settings: Settings) -> Settings:
    """A default must work: no longer than what the KV cache of one device holds."""
    models = [settings.target] if settings.draft is None else [settings.target, settings.draft]
    num_tokens = min(settings.kv_cache_bytes(model.role) // model.held_kv_bytes_per_token for model in models)
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
    yield from tier_problems(settings)
    yield from start_time_problems(settings)


def _limit_problem(key: str, value: int, message: str, remedy: str) -> Problem:
    return Problem(path=f"scheduler.{key}", value=str(value), message=message, remedy=remedy)


def _kv_problems(settings: Settings) -> Iterator[Problem]:
    """On cpu the KV cache's size is given, so whether it holds one longest seq is known before anything starts."""
    if settings.device != "cpu":
        return
    target, draft = settings.target.kv_bytes_per_token, settings.draft.held_kv_bytes_per_token if settings.draft else 0
    num_tokens = settings.num_tokens_on_device("target")
    if settings.colocated:
        yield from _kv_problem(settings, "", num_tokens, target + draft)
        return
    yield from _kv_problem(settings, "", num_tokens, target)
    if draft:
        yield from _kv_problem(settings, " of the draft", settings.num_tokens_on_device("draft"), draft)


def _kv_problem(settings: Settings, whose: str, num_tokens: int, per_token: int) -> Iterator[Problem]:
    block_size, device_bytes = settings.kv_cache.block_size, settings.kv_cache.device_bytes
    needed = -(-num_tokens // block_size) * block_size * per_token
    if needed > device_bytes:
        what = f"max_model_len {num_tokens}" if settings.attention == "full" else f"{num_tokens} tokens"
        message = (
            f"one seq of {what} takes {needed} bytes a rank{whose} "
            f"({per_token} a token), device_bytes is {device_bytes}"
        )
        remedy = "raise kv_cache.device_bytes or lower scheduler.max_model_len"
        yield Problem(path="kv_cache.device_bytes", message=message, remedy=remedy)

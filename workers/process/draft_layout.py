"""Turns an engine's spec into the plan by which its ranks share a draft's layers."""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

import torch

from checkpoint.config import ModelConfig
from checkpoint.config_json import load_model_config
from checkpoint.layer_parallel import LayerGroups, tensor_parallel_too_problem
from checkpoint.quantization import WeightFormat
from childproc.spec import SpecError
from echelon.pb.process_pb2 import EngineSpec
from echelon.pb.worker_pb2 import EngineRole
from workers.collectives import Group, SoloGroup
from workers.layers.context import BuildContext, WeightSlice
from workers.models.decoder import MLP
from workers.models.layer_groups import LayerParallelPlan, MLPs, Weights, check_groups, choose_groups
from workers.models.layer_similarity import layer_input_similarity
from workers.process.cohort import Cohort

# Between the stream that enters a group and the one that each of its layers would see. EasySpec finds 0.8 and more in
# groups of four. With the demo draft, a group of six whose last layer is at 0.70 loses 2.6 % of the acceptance.
LEAST_SIMILARITY = 0.7
_AUTO = "auto"
_SCRATCH_BYTES = 256 << 20  # MLP weights to time: more than fits in a processor's cache; not measured
_TIMED_RUNS = 5  # after a first one, which may be slower; the median counts; not measured

OnProgress = Callable[[str, int, int], None]  # stage, done, total
TimeMLPs = Callable[[ModelConfig, Group, BuildContext], float]


def is_layer_parallel(spec: EngineSpec) -> bool:
    return spec.lp_size > 1


def quantization_of(spec: EngineSpec) -> WeightFormat | None:
    """Raises SpecError if the spec names a format that there is not, or rounds a target."""
    if not spec.quantization:
        return None
    if spec.role != EngineRole.ENGINE_ROLE_DRAFT:
        raise SpecError(f"engines: quantization {spec.quantization!r} is for a draft only: it would change the output")
    formats: tuple[WeightFormat, ...] = get_args(WeightFormat)
    for known in formats:
        if known == spec.quantization:
            return known
    raise SpecError(f"engines: quantization {spec.quantization!r} must be one of {', '.join(formats)}")


def num_ranks(spec: EngineSpec, world_size: int) -> int:
    """The number of ranks that run an engine. If a draft has fewer devices than lp_size, its layers run as one batch,
    on the leader.

    Raises:
        SpecError: The spec combines settings that exclude each other.
    """
    if not is_layer_parallel(spec):
        return spec.tp_size
    if spec.role != EngineRole.ENGINE_ROLE_DRAFT:
        raise SpecError(f"engines: lp_size {spec.lp_size} is for a draft only: a target must compute its own model")
    problem = tensor_parallel_too_problem(spec.lp_size, tp_size=spec.tp_size)
    if problem is not None:
        raise SpecError(f"engines: {problem.finding}; {problem.remedy}")
    return spec.lp_size if spec.lp_size <= world_size else 1


def time_mlps(config: ModelConfig, group: Group, ctx: BuildContext) -> float:
    """Seconds of one token through some MLPs of the model's shape, split as `ctx` says, on all ranks together."""
    bytes_each = 3 * config.hidden_size * config.intermediate_size * ctx.dtype.itemsize
    num_layers = max(1, min(config.num_layers, _SCRATCH_BYTES // bytes_each))
    mlps = [MLP(f"scratch.{layer}", config=config, ctx=ctx) for layer in range(num_layers)]
    with torch.inference_mode():
        ctx.fill(_fill_with_any)
        x = torch.ones(1, config.hidden_size, dtype=ctx.dtype, device=ctx.device)
        return statistics.median(_time(mlps, x, group) for _ in range(1 + _TIMED_RUNS))


def _fill_with_any(slices: Sequence[WeightSlice]) -> None:
    for part in slices:
        part.target.fill_(1e-3)


def _time(mlps: list[MLP], x: torch.Tensor, group: Group) -> float:
    group.all_gather(x).flatten()[0].item()  # all ranks start together, with their devices idle
    started_s = time.perf_counter()
    for mlp in mlps:
        x = mlp(x)
    x.flatten()[0].item()
    return time.perf_counter() - started_s


def resolve_plan(
    spec: EngineSpec,
    group: Group,
    cohort: Cohort,
    device: torch.device,
    on_progress: OnProgress,
    *,
    time_mlps: TimeMLPs = time_mlps,
) -> LayerParallelPlan:
    """Measure and decide what the spec leaves open. All ranks of `group` call it and get the same plan.

    Args:
        time_mlps: measures how long a token takes through MLPs that are split as the context says.

    Raises:
        LoadError: The groups of the spec are not those of the model, or the folder cannot be read.
        SpecError: A field of the spec has a value that it does not allow.
    """
    config = load_model_config(Path(spec.model)).first_layers(spec.num_layers)
    weights = _choice("layer_parallel_weights", spec.layer_parallel_weights or Weights.REPLICATED, [*Weights])
    mlps = _choice("layer_parallel_mlp", spec.layer_parallel_mlp or _AUTO, [*MLPs, _AUTO])
    if group.size == 1:
        weights, mlps = Weights.REPLICATED, MLPs.REPLICATED
    if mlps == _AUTO:
        on_progress("timing MLPs", 0, 0)
        mlps = _faster_mlps(spec, config, group, device, time_mlps)
    return LayerParallelPlan(
        groups=_groups(spec, config, cohort, device, on_progress),
        lp_size=spec.lp_size,
        num_ranks=group.size,
        weights=Weights(weights),
        mlps=MLPs(mlps),
    )


def _choice(field: str, value: str, choices: list[str]) -> str:
    if value not in choices:
        raise SpecError(f"engines: {field} {value!r} must be one of {', '.join(choices)}")
    return value


def _groups(
    spec: EngineSpec, config: ModelConfig, cohort: Cohort, device: torch.device, on_progress: OnProgress
) -> LayerGroups:
    if spec.layer_groups:
        given = [list(group.layers) for group in spec.layer_groups]
        return check_groups(given, num_layers=config.num_layers, lp_size=spec.lp_size)
    key = "layer_groups"
    if cohort.rank > 0:
        return tuple(tuple(group) for group in json.loads(cohort.read(key)))
    similarity = layer_input_similarity(
        Path(spec.model),
        num_layers=spec.num_layers,
        dtype=getattr(torch, spec.dtype),
        device=device,
        max_model_len=spec.max_model_len,
        progress=lambda done, total: on_progress("comparing draft layers", done, total),
    )
    groups = choose_groups(similarity, lp_size=spec.lp_size, least_similarity=LEAST_SIMILARITY)
    cohort.publish(key, json.dumps(groups))
    return groups


def _faster_mlps(
    spec: EngineSpec, config: ModelConfig, group: Group, device: torch.device, time_mlps: TimeMLPs
) -> MLPs:
    """The option with the shorter time of the slowest rank for one token. All ranks see the same times and agree."""
    if config.intermediate_size % group.size:
        return MLPs.REPLICATED

    def time_over(shared_by: Group) -> float:
        dtype = getattr(torch, spec.dtype)
        ctx = BuildContext(
            shared_by,
            dtype=dtype,
            device=device,
            batch_invariant=spec.batch_invariant,
            quantization=quantization_of(spec),
        )
        return time_mlps(config, group, ctx)

    own = [time_over(SoloGroup()), time_over(group)]
    replicated_s, split_s = group.all_gather(torch.tensor(own, device=device)).amax(dim=0).tolist()
    return MLPs.TENSOR_PARALLEL if split_s < replicated_s else MLPs.REPLICATED

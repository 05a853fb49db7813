"""Loads what drafts for a draft, and measures what a token of it costs."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from checkpoint.config_json import load_model_config
from childproc.spec import SpecError
from echelon.pb.process_pb2 import EngineSpec
from echelon.pb.worker_pb2 import EngineRole
from kernels.kv.block_copy import cache_addresses
from workers.collectives import Group
from workers.engine.chain_lookup import ChainLookup
from workers.engine.engine import ModelRunner
from workers.engine.kv_cache import KVLayout, one_block_batch
from workers.engine.lower_draft import LowerDraft, Pace, StepCosts
from workers.engine.lower_model import LowerModel
from workers.engine.seq_state import Limits
from workers.engine.warm_up import warm_up
from workers.models.checkpoint import Progress
from workers.models.decoder import CausalLM
from workers.models.loading import load_model
from workers.sampling.sampler import Sampler
from workers.trace import Tracer

SUFFIX: Final = "suffix"
_TIMED_RUNS: Final = 5  # after a first one, which may be slower; the median counts; not measured
_ROWS: Final = 4  # of a step that verifies three proposals


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedLower:
    """A model beneath a draft whose KV cache is not made yet."""

    model: CausalLM
    group: Group
    layout: KVLayout
    max_model_len: int


def check_lower(spec: EngineSpec) -> None:
    """Raises SpecError if the spec names what there is not, or gives a target a draft."""
    lower = spec.lower_draft or spec.lower_model
    if lower and spec.role != EngineRole.ENGINE_ROLE_DRAFT:
        raise SpecError(f"engines: lower_draft {lower!r} is for a draft only")
    if spec.lower_draft and spec.lower_model:
        raise SpecError(f"engines: lower_draft {spec.lower_draft!r} excludes lower_model {spec.lower_model!r}")
    if spec.lower_draft not in ("", SUFFIX):
        raise SpecError(f"engines: lower_draft {spec.lower_draft!r} must be {SUFFIX!r}")
    if spec.lower_model and spec.lp_size > 1:
        raise SpecError(f"engines: lower_model {spec.lower_model!r} cannot be beneath a layer-parallel draft")


def load_lower(
    spec: EngineSpec, group: Group, *, dtype: torch.dtype, device: torch.device, progress: Progress
) -> LoadedLower | None:
    """The model of `lower_model`, shared by the ranks as the draft is. Raises LoadError."""
    if not spec.lower_model:
        return None
    folder = Path(spec.lower_model)
    max_model_len = min(spec.max_model_len, load_model_config(folder).max_len)
    model = load_model(folder, dtype=dtype, device=device, group=group, max_model_len=max_model_len, progress=progress)
    layout = KVLayout(
        num_layers=model.num_kv_layers,
        block_size=spec.block_size,
        num_kv_heads=model.kv_heads_per_rank,
        head_dim=model.config.head_dim,
        dtype=dtype,
    )
    return LoadedLower(model=model, group=group, layout=layout, max_model_len=max_model_len)


def build_lower(spec: EngineSpec, loaded: LoadedLower | None, draft: ModelRunner, limits: Limits) -> LowerDraft | None:
    """What drafts for the draft, if the spec names something. All ranks of the draft call it."""
    if loaded is None:
        return ChainLookup() if spec.lower_draft else None
    kv_caches = loaded.layout.allocate(limits.num_blocks, draft.device)
    runner = ModelRunner(
        model=loaded.model,
        kv_caches=kv_caches,
        kv_addresses=cache_addresses(kv_caches),
        sampler=Sampler(loaded.group, loaded.model.config.vocab_size),
        num_ranks=loaded.group.size,
        device=draft.device,
        tracer=Tracer(),  # its time is part of the draft's spans
    )
    warm_up(runner, limits, verifies=False)
    costs = step_costs(draft, runner, loaded.group, block_size=limits.block_size)
    return LowerModel(runner, limits, Pace(costs), max_model_len=loaded.max_model_len)


def step_costs(draft: ModelRunner, lower: ModelRunner, group: Group, *, block_size: int) -> StepCosts:
    """Measured at load, before there are seqs. All ranks see the times of the slowest, so they decide alike."""
    rows = min(_ROWS, block_size)

    def forward(runner: ModelRunner, num_tokens: int) -> Callable[[], object]:
        batch = one_block_batch(num_tokens, torch.device("cpu"))
        return lambda: runner.forward(batch)[-1, 0].item()

    own = [_median_s(forward(*each)) for each in ((lower, 1), (draft, 1), (draft, rows))]
    lower_s, one_s, rows_s = group.all_gather(torch.tensor(own, device=draft.device)).amax(dim=0).tolist()
    return StepCosts(lower_step=lower_s / one_s, row=max(0.0, rows_s / one_s - 1) / max(1, rows - 1))


def _median_s(work: Callable[[], object]) -> float:
    times = []
    for _ in range(1 + _TIMED_RUNS):
        started_s = time.perf_counter()
        work()
        times.append(time.perf_counter() - started_s)
    return statistics.median(times[1:])

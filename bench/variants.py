"""What `bench.speculate` compares: each way to speculate as a deployment on this machine.

A variant is written into the specs of the processes (protos/process.proto), not into a deployment file. So what only a
benchmark may ask for (forced acceptance) can be set here and nowhere else.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from checkpoint.quantization import WeightFormat
from childproc.speculation import DRAFT_MODEL_METHODS
from cluster.deployment.settings import CpuSettings, CudaSettings, Settings, SpeculationSettings
from cluster.errors import PlanError, StartError
from cluster.local import LOCAL_SCHEDULER, LocalDeployment, LocalDraft, local_settings
from cluster.processes.child import Child
from cluster.processes.startup import Launch
from echelon.pb.process_pb2 import SchedulerSpec, SpeculationSpec, WorkerSpec
from echelon.pb.worker_pb2 import ENGINE_ROLE_DRAFT, ENGINE_ROLE_TARGET, EngineInfo

PIPELINES = ("serial", "continuous", "continuous+cache")
SELF_DRAFTS: dict[str, WeightFormat] = {"self-int8": "int8", "self-int4": "int4", "self-mxfp4": "mxfp4"}
METHODS = {"draft": "draft_model", "suffix": "suffix", "layer-parallel": "draft_model", "hybrid": "hybrid"}
SOURCES = tuple(METHODS)  # those that need no model made at load
METHODS |= dict.fromkeys(SELF_DRAFTS, "draft_model")
BENEATH = "+suffix"  # with a lookup that drafts for the draft
METHODS |= {f"{source}{BENEATH}": "draft_model" for source in ("draft", *SELF_DRAFTS)}
VERDICT_CACHE_ROWS = 4
MOST_DRAFTS = 8  # where the policy chooses
START_TIMEOUT_S = 300.0


class NotAvailableError(RuntimeError):
    """This build of Echelon does not offer the variant. The message says what refused it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """The models and where they run."""

    target: Path
    draft: Path
    dtype: str
    tp_size: int  # of the target
    colocated: bool
    threads: int  # of each worker
    max_num_seqs: int
    lp_size: int
    forced_acceptance: float
    device: Literal["cpu", "cuda"] = "cpu"
    graphs: Literal["auto", "off"] = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A way to speculate."""

    source: str  # a key of METHODS, or "none"
    pipeline: str = "serial"
    num_drafts: int | None = None  # per round; None: the policy chooses

    @property
    def name(self) -> str:
        if self.source == "none":
            return "plain"
        return f"{self.pipeline}, {self.source}, {self.short_name}"

    @property
    def short_name(self) -> str:
        """Its name among the variants of the same pipeline and source."""
        if self.source == "none":
            return "plain"
        return f"k = {'auto' if self.num_drafts is None else self.num_drafts}"

    @property
    def uses_draft_model(self) -> bool:
        return METHODS.get(self.source) in DRAFT_MODEL_METHODS


PLAIN = Variant(source="none")


def all_variants(pipelines: list[str], sources: list[str], num_drafts: list[int | None]) -> list[Variant]:
    """Every useful combination, plain decoding first. Lookup takes no time, so it is serial only."""
    combinations = [
        Variant(source=source, pipeline=pipeline, num_drafts=k)
        for pipeline in pipelines
        for source in sources
        for k in num_drafts
        if source != "suffix" or pipeline == "serial"
    ]
    return [PLAIN, *combinations]


def adjust_scheduler(spec: SchedulerSpec, variant: Variant) -> None:
    """Makes a scheduler speculate as the variant says."""
    if variant == PLAIN:
        return
    spec.speculation.CopyFrom(
        SpeculationSpec(
            method=METHODS[variant.source],
            pipeline=variant.pipeline.removesuffix("+cache"),
            num_speculative_tokens=variant.num_drafts or MOST_DRAFTS,
            adaptive=variant.num_drafts is None,
            verdict_cache_rows=VERDICT_CACHE_ROWS if variant.pipeline.endswith("+cache") else 0,
        )
    )


def adjust_worker(spec: WorkerSpec, pair: Pair, variant: Variant) -> None:
    """Adds what a worker's engines need beyond the settings."""
    for engine in spec.engines:
        if engine.role == ENGINE_ROLE_TARGET:
            engine.forced_acceptance = pair.forced_acceptance
        elif variant.source == "layer-parallel":
            engine.lp_size = pair.lp_size


class VariantDeployment(LocalDeployment):
    """The processes of one variant. Entering raises NotAvailableError if one of them refuses it."""

    def __init__(self, pair: Pair, variant: Variant) -> None:
        self._pair = pair
        self._variant = variant
        try:
            super().__init__(_settings(pair, variant), gateway=True)
        except PlanError as error:
            raise NotAvailableError(str(error)) from error

    def __enter__(self) -> "VariantDeployment":
        try:
            self.start()
            self._check_layer_parallel()
        except StartError as error:
            raise NotAvailableError(str(error)) from error
        except NotAvailableError:
            self.stop()
            raise
        return self

    def spawn(self, launch: Launch) -> Child:
        if isinstance(launch.spec, SchedulerSpec):
            adjust_scheduler(launch.spec, self._variant)
        if isinstance(launch.spec, WorkerSpec):
            adjust_worker(launch.spec, self._pair, self._variant)
        return super().spawn(launch)

    def _check_layer_parallel(self) -> None:
        """A worker that does not know the setting would run an ordinary draft."""
        if self._variant.source == "layer-parallel" and self._draft_engine().lp_size != self._pair.lp_size:
            raise NotAvailableError(f"the draft worker has lp_size {self._draft_engine().lp_size}")

    def _draft_engine(self) -> EngineInfo:
        (replica,) = self.running.replicas
        group = replica.draft or replica.target
        return next(engine for engine in group.info.engines if engine.role == ENGINE_ROLE_DRAFT)


def _draft(pair: Pair, variant: Variant) -> LocalDraft:
    """A self-draft is made of the target."""
    rounded_to = SELF_DRAFTS.get(variant.source.removesuffix(BENEATH))
    folder = pair.draft if rounded_to is None else pair.target
    return LocalDraft(
        folder=folder,
        quantization=rounded_to,
        lower_draft="suffix" if variant.source.endswith(BENEATH) else "",
        colocated=pair.colocated,
    )


def _settings(pair: Pair, variant: Variant) -> Settings:
    return local_settings(
        pair.target,
        tp_size=pair.tp_size,
        draft=_draft(pair, variant) if variant.uses_draft_model else None,
        dtype=pair.dtype,
        device=pair.device,
        cpu=CpuSettings(threads_per_worker=pair.threads),
        cuda=CudaSettings(graphs=pair.graphs),
        scheduler=replace(
            LOCAL_SCHEDULER,
            max_num_seqs=pair.max_num_seqs,
            enable_prefix_caching=False,  # prompts repeat from run to run
        ),
        speculation=SpeculationSettings(num_speculative_tokens=variant.num_drafts or MOST_DRAFTS),
        startup_timeout_s=START_TIMEOUT_S,
    )

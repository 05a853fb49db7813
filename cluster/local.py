"""A deployment on this machine alone, as plain child processes: no Ray, no pydantic, no YAML.

What benchmarks and tests use, and what runs where Ray is not installed.
"""

import logging
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

from checkpoint.folder import read_model_folder
from checkpoint.quantization import WeightFormat
from childproc.speculation import DRAFT_MODEL_METHODS
from cluster.authority import Authority
from cluster.deployment.made_drafts import made_at_load
from cluster.deployment.resolving import resolve_batch_invariant, resolve_scheduler, resolve_speculation
from cluster.deployment.settings import (
    DEFAULT_COLLECTIVE_TIMEOUT_S,
    DEFAULT_STARTUP_TIMEOUT_S,
    CpuSettings,
    CudaSettings,
    JobsSettings,
    KvCacheSettings,
    KvDtype,
    LowerDraft,
    ModelSettings,
    Role,
    SchedulerSettings,
    ServerSettings,
    Settings,
    SpeculationSettings,
)
from cluster.deployment.stored_weights import StoredWeights, resolve_weights
from cluster.errors import StartError
from cluster.layer_parallel import LayerParallel, Mlps, Weights, layer_parallel
from cluster.planning.inventory import inventory_of, machine_facts
from cluster.planning.plan import Plan, describe_devices
from cluster.planning.planner import make_plan
from cluster.processes.child import Child
from cluster.processes.rollout import RunningDeployment, roll_out, stop_order
from cluster.processes.spares import Recipe, SpareKeeper
from cluster.processes.startup import Launch, ProcessSet, recipe_of
from cluster.processes.status import ProcessStatus, State
from cluster.processes.supervisor import Supervisor

logger = logging.getLogger(__name__)

STOP_GRACE_S = 5.0
_LOCAL_CPU, _LOCAL_CUDA = CpuSettings(), CudaSettings()
_LOCAL_KV_CACHE = KvCacheSettings()
LOCAL_SCHEDULER = SchedulerSettings(max_num_seqs=64, max_num_batched_tokens=2048)
_LOCAL_SPECULATION = SpeculationSettings()
_LOCAL_JOBS = JobsSettings()
LOCAL_SERVER = ServerSettings(grpc_port=0, http_port=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalDraft:
    """The section `draft`; the keys mean the same."""

    folder: Path
    quantization: WeightFormat | None = None
    num_layers: int = 0  # 0: all
    lower_draft: LowerDraft | Literal[""] = ""
    lower_folder: Path | None = None  # of a model beneath the draft, instead
    kv_dtype: KvDtype = "auto"
    tp_size: int = 1
    layer_parallel_size: int = 1
    layer_groups: Sequence[Sequence[int]] | None = None  # None: auto
    layer_parallel_weights: Weights = "replicated"
    layer_parallel_mlp: Mlps = "auto"
    colocated: bool = False

    def layer_parallel(self, *, target_tp_size: int) -> LayerParallel | None:
        return layer_parallel(
            self.layer_parallel_size,
            target_tp_size=target_tp_size,
            colocated=self.colocated,
            groups=self.layer_groups,
            weights=self.layer_parallel_weights,
            mlps=self.layer_parallel_mlp,
        )


def local_settings(
    target: Path,
    *,
    tp_size: int = 1,
    draft: LocalDraft | None = None,
    dtype: str | None = None,
    weights: StoredWeights = "auto",
    device: Literal["cpu", "cuda"] = "cpu",
    cpu: CpuSettings = _LOCAL_CPU,
    cuda: CudaSettings = _LOCAL_CUDA,
    kv_cache: KvCacheSettings = _LOCAL_KV_CACHE,
    scheduler: SchedulerSettings = LOCAL_SCHEDULER,
    speculation: SpeculationSettings = _LOCAL_SPECULATION,
    server: ServerSettings = LOCAL_SERVER,
    jobs: JobsSettings = _LOCAL_JOBS,
    forced_acceptance: float = 0.0,
    attention: Literal["full", "budgeted"] = "full",
    batch_invariant: bool | Literal["auto"] = "auto",
    startup_timeout_s: float = DEFAULT_STARTUP_TIMEOUT_S,
    collective_timeout_s: float = DEFAULT_COLLECTIVE_TIMEOUT_S,
    rebuild: bool = True,
    spares: int | Literal["auto"] = 0,
    num_replicas: int = 1,
) -> Settings:
    """Settings from the sections of a deployment file.

    `dtype` is that of both models (default: each checkpoint's own); `forced_acceptance` is for benchmarks only.
    Values are not checked against one another. Raises LoadError.
    """

    def model(role: Role, folder: Path, size: int) -> ModelSettings:
        facts = read_model_folder(folder.resolve(), dtype=dtype)
        return ModelSettings(role=role, folder=facts, tp_size=size)

    compiles = cpu.compile != "off"
    given = replace(model("target", target, tp_size), kv_dtype=kv_cache.dtype)
    fixed = batch_invariant is True
    target_model, _ = resolve_weights(given, weights, device, compiles=compiles, batch_invariant=fixed)
    draft_model = None
    if draft is not None and speculation.method in (None, *DRAFT_MODEL_METHODS):
        layers = draft.layer_parallel(target_tp_size=tp_size)
        whole = replace(
            model("draft", draft.folder, draft.tp_size), layer_parallel=layers, lower_draft=draft.lower_draft
        )
        whole = replace(whole, kv_dtype=draft.kv_dtype)
        if draft.lower_folder is not None:
            whole = replace(whole, lower=model("draft", draft.lower_folder, draft.tp_size))
        draft_model = made_at_load(whole, device, quantization=draft.quantization, num_layers=draft.num_layers)
        draft_model, _ = resolve_weights(draft_model, "auto", device, compiles=compiles, batch_invariant=fixed)
    colocated = draft is not None and draft.colocated
    return Settings(
        name="local",
        model_name=target_model.folder.path.name,
        target=target_model,
        draft=draft_model,
        speculation=resolve_speculation(speculation, has_draft=draft_model is not None, colocated=colocated),
        colocated=colocated and draft_model is not None,
        device=device,
        cpu=cpu,
        cuda=cuda,
        kv_cache=kv_cache,
        scheduler=resolve_scheduler(scheduler, target_model),
        server=server,
        jobs=jobs,
        forced_acceptance=forced_acceptance,
        attention=attention,
        batch_invariant=resolve_batch_invariant(batch_invariant, device),
        startup_timeout_s=startup_timeout_s,
        collective_timeout_s=collective_timeout_s,
        rebuild=rebuild,
        spares=spares,
        num_replicas=num_replicas,
        max_replicas=num_replicas,
    )


class LocalDeployment:
    """Target group, draft group, scheduler and, if wanted, gateway as children of this process.

        with LocalDeployment(local_settings(Path("models/demo-target"), tp_size=2)) as deployment:
            connect(deployment.running.scheduler_address)

    Leaving the block ends every process, and so does the death of this one. Their logs are in a temporary folder, which
    stays only if a process has failed.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        gateway: bool = False,
        authority: Authority | None = None,
        on_change: Callable[[ProcessStatus], None] = lambda _: None,
    ) -> None:
        """Plans; raises PlanError. `authority`: locks the wires inside, as `up` does; None: they are plain."""
        self.settings = settings
        self._authority = authority
        facts = machine_facts(settings.kv_cache.disk, settings.server)
        self.plan: Plan = make_plan(settings, inventory_of(facts))
        self.processes = ProcessSet(self.spawn, spares=self, on_change=on_change)
        self._gateway = gateway
        self._free_gpus = [gpu.device_id for gpu in facts.gpus]
        self._gpus: dict[str, list[str]] = {}  # by process, which keeps them when it is started again
        self._keepers: dict[str, SpareKeeper] = {}  # by process
        self._supervisor: Supervisor | None = None
        self._log_dir: Path | None = None  # while it is of use

    @property
    def supervisor(self) -> Supervisor:
        assert self._supervisor is not None, "start the deployment first"
        return self._supervisor

    @property
    def running(self) -> RunningDeployment:
        """Where everything is now."""
        return self.supervisor.running

    def state(self) -> tuple[State, str]:
        """The deployment's state, and why it is not READY."""
        state, reason, _ = self.processes.read(self.supervisor.judge)
        return state, reason

    def start(self) -> RunningDeployment:
        """Block until it serves. Raises StartError, after everything was stopped again."""
        self._log_dir = Path(tempfile.mkdtemp(prefix="echelon-"))
        try:
            running = roll_out(
                self.settings,
                self.plan,
                self.processes,
                timeout_s=self.settings.startup_timeout_s,
                gateway=self._gateway,
            )
            identity = None if self._authority is None else self._authority.issue("controller")
            self._supervisor = Supervisor(self.settings, self.plan, self.processes, running, identity)
            self.processes.all_ready()
        except StartError as err:
            self._end()
            log_dir, self._log_dir = self._log_dir, None
            raise StartError(f"{err}; logs are in {log_dir}", err.detail) from err
        except BaseException:
            self.stop()
            raise
        return running

    def stop(self) -> None:
        """End every process. Idempotent."""
        self._end()
        log_dir, self._log_dir = self._log_dir, None
        if log_dir is None:
            return
        failed = self.processes.read(lambda board: board.first_loss())
        if failed is None:
            shutil.rmtree(log_dir, ignore_errors=True)
        else:
            logger.warning("%s: %s; logs are in %s", failed.name, failed.error, log_dir)

    def _end(self) -> None:
        if self._supervisor is not None:
            self._supervisor.stop()
        self.processes.stop(STOP_GRACE_S, order=stop_order(self.plan))
        for keeper in list(self._keepers.values()):
            keeper.keep(False)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def spawn(self, launch: Launch) -> Child:
        """Starts a process. A subclass may change the spec first."""
        if self._authority is not None:
            spec: Any = launch.spec
            spec.identity.CopyFrom(self._authority.issue(launch.name))
        recipe, devices = self._recipe(launch), describe_devices(launch.bundle, self._gpus_of(launch))
        return self._keeper_of(launch.name).start(recipe, launch.spec, log_name=launch.log_name, devices=devices)

    def prepare(self, launch: Launch) -> None:
        self._keeper_of(launch.name).prepare(self._recipe(launch))

    def keep_spare(self, name: str, is_wanted: bool) -> None:
        self._keeper_of(name).keep(is_wanted)

    def _keeper_of(self, name: str) -> SpareKeeper:
        return self._keepers.setdefault(name, SpareKeeper())

    def _recipe(self, launch: Launch) -> Recipe:
        assert self._log_dir is not None, "processes are spawned by `start`"
        return recipe_of(launch, self._log_dir, self._gpus_of(launch))

    def _gpus_of(self, launch: Launch) -> list[str]:
        if launch.name not in self._gpus:
            num_gpus = launch.bundle.num_gpus if launch.bundle is not None else 0
            self._gpus[launch.name] = [self._free_gpus.pop(0) for _ in range(num_gpus)]
        return self._gpus[launch.name]

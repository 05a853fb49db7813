"""A deployment on this machine alone, as plain child processes: no Ray, no pydantic, no YAML.

What benchmarks and tests use, and what runs where Ray is not installed.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Self

from checkpoint.folder import read_model_folder
from childproc.speculation import DRAFT_MODEL_METHODS
from cluster.deployment.settings import (
    DEFAULT_COLLECTIVE_TIMEOUT_S,
    DEFAULT_STARTUP_TIMEOUT_S,
    CpuSettings,
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
from cluster.layer_parallel import LayerParallel, Mlps, Weights, layer_parallel
from cluster.planning.inventory import inventory_of, machine_facts
from cluster.planning.plan import Plan, describe_devices
from cluster.planning.planner import make_plan
from cluster.processes.child import Child, ChildProcess
from cluster.processes.rollout import RunningDeployment, roll_out, stop_order
from cluster.processes.startup import Launch, ProcessSet
from cluster.processes.status import ProcessStatus

STOP_GRACE_S = 5.0
_LOCAL_CPU = CpuSettings()
_LOCAL_KV_CACHE = KvCacheSettings()
LOCAL_SCHEDULER = SchedulerSettings(max_num_seqs=64, max_num_batched_tokens=2048)
_LOCAL_SPECULATION = SpeculationSettings()
LOCAL_SERVER = ServerSettings(grpc_port=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalDraft:
    """The section `draft`; the keys mean the same."""

    folder: Path
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
    device: Literal["cpu", "cuda"] = "cpu",
    cpu: CpuSettings = _LOCAL_CPU,
    kv_cache: KvCacheSettings = _LOCAL_KV_CACHE,
    scheduler: SchedulerSettings = LOCAL_SCHEDULER,
    speculation: SpeculationSettings = _LOCAL_SPECULATION,
    server: ServerSettings = LOCAL_SERVER,
    forced_acceptance: float = 0.0,
    batch_invariant: bool = False,
    startup_timeout_s: float = DEFAULT_STARTUP_TIMEOUT_S,
    collective_timeout_s: float = DEFAULT_COLLECTIVE_TIMEOUT_S,
) -> Settings:
    """Settings from the sections of a deployment file.

    `dtype` is that of both models (default: each checkpoint's own); `forced_acceptance` is for benchmarks only.
    Values are not checked against one another. Raises LoadError.
    """

    def model(role: Role, folder: Path, size: int) -> ModelSettings:
        facts = read_model_folder(folder.resolve(), dtype=dtype)
        return ModelSettings(role=role, folder=facts, tp_size=size)

    target_model = model("target", target, tp_size)
    draft_model = None
    if draft is not None and speculation.method in (None, *DRAFT_MODEL_METHODS):
        layers = draft.layer_parallel(target_tp_size=tp_size)
        draft_model = replace(model("draft", draft.folder, draft.tp_size), layer_parallel=layers)
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
        kv_cache=kv_cache,
        scheduler=resolve_scheduler(scheduler, target_model),
        server=server,
        forced_acceptance=forced_acceptance,
        batch_invariant=batch_invariant,
        startup_timeout_s=startup_timeout_s,
        collective_timeout_s=collective_timeout_s,
    )


class LocalDeployment:
    """Target group, draft group, scheduler and, if wanted, gateway as children of this process.

        with LocalDeployment(local_settings(Path("models/demo-target"), tp_size=2)) as deployment:
            connect(deployment.running.scheduler_address)

    Leaving the block ends every process, and so does the death of this one.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        gateway: bool = False,
        log_dir: Path | None = None,
        on_change: Callable[[ProcessStatus], None] = lambda _: None,
    ) -> None:
        """Plans; raises PlanError. `log_dir` (default: a new temporary folder) takes a log of each process."""
        self.settings = settings
        facts = machine_facts()
        self.plan: Plan = make_plan(settings, inventory_of(facts))
        self.log_dir = log_dir or Path(tempfile.mkdtemp(prefix="echelon-"))
        self.processes = ProcessSet(self._spawn, on_change=on_change)
        self._gateway = gateway
        self._free_gpus = [gpu.device_id for gpu in facts.gpus]
        self._running: RunningDeployment | None = None

    @property
    def running(self) -> RunningDeployment:
        assert self._running is not None, "start the deployment first"
        return self._running

    def start(self) -> RunningDeployment:
        """Block until it serves. Raises StartError, after everything was stopped again."""
        timeout_s = self.settings.startup_timeout_s
        try:
            self._running = roll_out(
                self.settings, self.plan, self.processes, timeout_s=timeout_s, gateway=self._gateway
            )
        except BaseException:
            self.stop()
            raise
        return self._running

    def stop(self) -> None:
        """End every process. Idempotent."""
        self.processes.stop(STOP_GRACE_S, order=stop_order(self.plan))

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _spawn(self, launch: Launch) -> Child:
        gpu_ids: list[str] = []
        if launch.bundle is not None:
            gpu_ids = [self._free_gpus.pop(0) for _ in range(launch.bundle.num_gpus)]
        return ChildProcess(
            launch.module,
            launch.spec,
            name=launch.name,
            log_path=self.log_dir / f"{launch.name}.log",
            env={**launch.env, "CUDA_VISIBLE_DEVICES": ",".join(gpu_ids)},
            devices=describe_devices(launch.bundle, gpu_ids),
        )

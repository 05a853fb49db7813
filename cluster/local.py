"""A deployment on this machine alone, as plain child processes: no Ray, no pydantic, no YAML.

What benchmarks and tests use, and what runs where Ray is not installed.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, Self

from cluster.deployment.settings import (
    DEFAULT_DEVICE_BYTES,
    Method,
    ModelSettings,
    Pipeline,
    Role,
    Settings,
    default_max_model_len,
    resolve_speculation,
)
from cluster.layer_parallel import Mlps, Weights, layer_parallel
from cluster.model_folder import read_model_folder
from cluster.planning.inventory import inventory_of, machine_facts
from cluster.planning.plan import Plan, describe_devices
from cluster.planning.planner import make_plan
from cluster.processes.child import Child, ChildProcess
from cluster.processes.rollout import RunningDeployment, roll_out, stop_order
from cluster.processes.startup import Launch, ProcessSet
from cluster.processes.status import ProcessStatus

STOP_GRACE_S = 5.0


def local_settings(
    target: Path,
    *,
    tp_size: int = 1,
    draft: Path | None = None,
    draft_tp_size: int = 1,
    layer_parallel_size: int = 1,
    layer_groups: Sequence[Sequence[int]] | None = None,
    layer_parallel_weights: Weights = "replicated",
    layer_parallel_mlp: Mlps = "auto",
    colocated: bool = False,
    dtype: str | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    threads_per_worker: int = 1,
    block_size: int = 16,
    kv_cache_bytes: int = DEFAULT_DEVICE_BYTES,
    gpu_memory_utilization: float = 0.9,
    max_num_seqs: int = 64,
    max_num_batched_tokens: int = 2048,
    max_model_len: int | None = None,
    max_queue: int = 1024,
    enable_prefix_caching: bool = True,
    method: Method | None = None,
    pipeline: Pipeline | None = None,
    num_speculative_tokens: int | Literal["auto"] = "auto",
    window: int | Literal["auto"] = "auto",
    verdict_cache: int | Literal["auto", "off"] = "auto",
    forced_acceptance: float = 0.0,
    batch_invariant: bool = False,
    grpc_port: int = 0,
    http_port: int = 0,
    startup_timeout_s: float = 120.0,
    collective_timeout_s: float = 60.0,
) -> Settings:
    """Settings from keyword arguments, which mean what the deployment file's keys of the same name mean.

    `dtype` is that of both models (default: each checkpoint's own), `kv_cache_bytes` is that of one cpu device,
    `layer_groups` None is auto, `forced_acceptance` is for benchmarks only, `grpc_port` 0 takes any
    free port and `http_port` 0 serves no metrics.
    Values are not checked against one another. Raises ModelFolderError.
    """

    def model(role: Role, folder: Path, size: int) -> ModelSettings:
        facts = read_model_folder(folder.resolve())
        return ModelSettings(role=role, folder=facts, dtype=dtype or facts.dtype, tp_size=size)

    target_model = model("target", target, tp_size)
    draft_model = None
    if draft is not None and method not in ("none", "suffix"):
        layers = layer_parallel(
            layer_parallel_size,
            target_tp_size=tp_size,
            colocated=colocated,
            groups=layer_groups,
            weights=layer_parallel_weights,
            mlps=layer_parallel_mlp,
        )
        draft_model = replace(model("draft", draft, draft_tp_size), layer_parallel=layers)
    default_len = default_max_model_len(target_model.folder, None if draft_model is None else draft_model.folder)
    return Settings(
        name="local",
        model_name=target_model.folder.path.name,
        target=target_model,
        draft=draft_model,
        speculation=resolve_speculation(
            method=method,
            has_draft=draft_model is not None,
            colocated=colocated,
            pipeline=pipeline,
            num_speculative_tokens=num_speculative_tokens,
            window=window,
            verdict_cache=verdict_cache,
        ),
        colocated=colocated and draft_model is not None,
        device=device,
        threads_per_worker=threads_per_worker,
        block_size=block_size,
        device_bytes=kv_cache_bytes,
        gpu_memory_utilization=gpu_memory_utilization,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len or default_len,
        max_queue=max_queue,
        enable_prefix_caching=enable_prefix_caching,
        forced_acceptance=forced_acceptance,
        batch_invariant=batch_invariant,
        grpc_port=grpc_port,
        http_port=http_port,
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

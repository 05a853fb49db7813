"""A process on a node of the Ray cluster: an actor in its bundle runs it as a child and relays what it says."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from google.protobuf.message import Message
from ray.exceptions import GetTimeoutError, RayError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from cluster.on_ray.cluster import NAMESPACE
from cluster.planning.plan import Bundle, describe_devices
from cluster.processes.child import ChildProcess
from cluster.processes.startup import Launch
from echelon.pb.process_pb2 import ProcessEvent

logger = logging.getLogger(__name__)

_LOST_HOST_STATUS = 255  # exit status of a process whose host died, as ssh reports a lost connection
_CALL_TIMEOUT_S = 30.0
_NUM_THREADS = 4  # a call that waits for events, one that stops, one that reads the log, and one to spare


@dataclass(frozen=True, slots=True, kw_only=True)
class HostedProcess:
    """What a host says of the process that it has started."""

    pid: int
    gpu_ids: tuple[str, ...]  # Ray's choice
    node_id: str


class ProcessHost:
    """The actor. It holds the devices of its bundle; its child runs on them and dies with it."""

    def __init__(self) -> None:
        self._child: ChildProcess | None = None

    def start(self, module: str, spec: Message, name: str, log_path: Path, env: Mapping[str, str]) -> HostedProcess:
        context = ray.get_runtime_context()
        gpu_ids = tuple(str(gpu) for gpu in context.get_accelerator_ids().get("GPU", ()))
        child_env = {**env, "CUDA_VISIBLE_DEVICES": ",".join(gpu_ids)}
        self._child = ChildProcess(module, spec, name=name, log_path=log_path, env=child_env)
        assert self._child.pid is not None, "a child process has a pid"
        return HostedProcess(pid=self._child.pid, gpu_ids=gpu_ids, node_id=context.get_node_id())

    def watch(self, timeout_s: float) -> tuple[int | None, ProcessEvent | None]:
        """The exit status, asked before the next event is awaited, and that event."""
        child = self._started()
        exit_status = child.poll()
        return exit_status, child.next_event(timeout_s)

    def stderr_tail(self) -> str:
        return self._started().stderr_tail()

    def stop(self, grace_s: float) -> None:
        if self._child is not None:
            self._child.stop(grace_s)

    def _started(self) -> ChildProcess:
        assert self._child is not None, "start comes first"
        return self._child


class RayChild:
    """A process behind a host, with the methods of `cluster.processes.child.Child`."""

    def __init__(self, launch: Launch, host: Any, log_dir: Path) -> None:
        """Does not block: the host may still be on its way to its node."""
        self.name = launch.name
        self.pid: int | None = None
        self.devices = ""
        self.node_id = ""
        self._bundle = launch.bundle
        self._host = host
        self._exit_status: int | None = None
        self._lost = ""  # why the host cannot be asked any more
        log_path = log_dir / f"{launch.name}.log"
        self._starting = host.start.remote(launch.module, launch.spec, launch.name, log_path, dict(launch.env))

    def next_event(self, timeout_s: float) -> ProcessEvent | None:
        try:
            if self.pid is None and not self._has_started(timeout_s):
                return None
            self._exit_status, event = ray.get(self._host.watch.remote(timeout_s), timeout=timeout_s + _CALL_TIMEOUT_S)
        except RayError as err:
            self._lost = f"its host is lost: {_first_line(err)}"
            self._exit_status = _LOST_HOST_STATUS
            return None
        assert event is None or isinstance(event, ProcessEvent), "a host relays events"
        return event

    def poll(self) -> int | None:
        return self._exit_status

    def stop(self, grace_s: float) -> None:
        try:
            ray.get(self._host.stop.remote(grace_s), timeout=grace_s + _CALL_TIMEOUT_S)
        except RayError as err:
            # Where the host is gone its child has seen its standard input end.
            logger.info("%s: host did not answer stop: %s", self.name, _first_line(err))
        ray.kill(self._host)

    def stderr_tail(self) -> str:
        if self._lost:
            return self._lost
        try:
            return str(ray.get(self._host.stderr_tail.remote(), timeout=_CALL_TIMEOUT_S))
        except RayError as err:
            return f"its host is lost: {_first_line(err)}"

    def _has_started(self, timeout_s: float) -> bool:
        try:
            hosted: HostedProcess = ray.get(self._starting, timeout=timeout_s)
        except GetTimeoutError:
            return False
        self.pid, self.node_id = hosted.pid, hosted.node_id
        self.devices = describe_devices(self._bundle, hosted.gpu_ids)
        return True


def host_in_bundle(name: str, bundle: Bundle, group: PlacementGroup) -> Any:
    """A host that takes the whole of a worker's bundle."""
    strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle.rank)
    return _host(name, scheduling_strategy=strategy, num_cpus=bundle.num_cpus, num_gpus=bundle.num_gpus)


def host_on_node(name: str, node_id: str) -> Any:
    """A host for a control process: on this node and no other, without a share of its CPUs."""
    return _host(name, scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False), num_cpus=0)


def _host(name: str, **options: Any) -> Any:
    options |= {"name": name, "namespace": NAMESPACE, "max_concurrency": _NUM_THREADS}
    return ray.remote(ProcessHost).options(**options).remote()


def _first_line(err: Exception) -> str:
    return str(err).strip().splitlines()[0] if str(err).strip() else type(err).__name__

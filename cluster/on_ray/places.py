"""Where Ray keeps a deployment's processes: a placement group for each worker group, a host for each process."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, remove_placement_group

from cluster.authority import Authority
from cluster.on_ray.cluster import actor_name, group_name, reserve
from cluster.on_ray.host import RayChild, host_in_bundle, host_on_node, start_child
from cluster.planning.plan import Bundle, ControlProcess, ReplicaPlan
from cluster.process_id import PartId
from cluster.processes.child import Child
from cluster.processes.startup import Launch

logger = logging.getLogger(__name__)

_RESERVE_TIMEOUT_S = 15.0  # the plan counts on free devices only, so this is Ray's own delay

Process = Bundle | ControlProcess


class Places:
    """Several threads may use it at once, each for processes of its own."""

    def __init__(self, deployment: str, log_dir: Path, authority: Authority) -> None:
        """`log_dir`: on each node."""
        self._deployment, self._log_dir = deployment, log_dir
        self.authority = authority
        self._groups: dict[PartId, PlacementGroup] = {}
        self._processes: dict[str, Process] = {}
        self._hosts: dict[str, Any] = {}
        self._children: dict[str, RayChild] = {}  # the latest of each name

    def adopt(
        self,
        processes: Iterable[Process],
        groups: Mapping[PartId, PlacementGroup],
        hosts: Mapping[str, Any],
        children: Mapping[str, RayChild],
    ) -> None:
        """What another controller has left; processes without a host get one when they are started again."""
        self._processes.update((process.name, process) for process in processes)
        self._groups.update(groups)
        self._hosts.update(hosts)
        self._children.update(children)

    def stands(self, part: PartId) -> bool:
        """Whether a worker group has a placement group."""
        return part in self._groups

    def on_node(self, node_id: str) -> list[str]:
        """Names of processes whose hosts are there, as far as is known."""
        here = [name for name, process in list(self._processes.items()) if process.node_id == node_id]
        return [name for name in here if (child := self._children.get(name)) is not None and child.has_host]

    def abandon(self, names: Iterable[str], reason: str) -> None:
        """Their node is lost: wait for nothing more there."""
        for name in names:
            if (child := self._children.get(name)) is not None:
                child.abandon(reason)

    def move(self, processes: Sequence[Process]) -> None:
        """These processes, which have ended, will be where the plan says now. Raises PlanError."""
        self.end(processes)
        bundles = [process for process in processes if isinstance(process, Bundle)]
        if bundles:
            part = bundles[0].id.part
            self._groups[part] = reserve(group_name(self._deployment, part.name), bundles, _RESERVE_TIMEOUT_S)
        self._processes.update((process.name, process) for process in processes)

    def reserve(self, replicas: Iterable[ReplicaPlan]) -> None:
        """A placement group for each worker group that has none. Raises PlanError."""
        for replica in replicas:
            for role in ("target", "draft"):
                bundles = replica.group(role)
                if bundles and (part := bundles[0].id.part) not in self._groups:
                    self._groups[part] = reserve(group_name(self._deployment, part.name), bundles, _RESERVE_TIMEOUT_S)

    def create_hosts(self, processes: Sequence[Process]) -> None:
        """All at once, since each takes a second or two to come up."""
        for process in processes:
            self._processes[process.name] = process
            self._hosts[process.name] = self._new_host(process, number=1)

    def spawn(self, launch: Launch) -> Child:
        """On the host of the process; on another one if that is lost."""
        before, host = self._children.get(launch.name), self._hosts.get(launch.name)
        if host is None or (before is not None and not before.has_host):
            if host is not None:
                ray.kill(host)
            process = self._processes[launch.name]
            host = self._hosts[launch.name] = self._new_host(process, number=launch.number)
        spec: Any = launch.spec
        spec.identity.CopyFrom(self.authority.issue(launch.name))
        child = self._children[launch.name] = start_child(launch, host, self._log_dir)
        return child

    def prepare(self, launch: Launch) -> None:
        """A host that is lost is replaced later, by `spawn`."""
        if (host := self._hosts.get(launch.name)) is not None:
            host.prepare.remote(launch, self._log_dir)

    def keep_spare(self, name: str, is_wanted: bool) -> None:
        if (host := self._hosts.get(name)) is not None:
            host.keep_spare.remote(is_wanted)

    def end(self, processes: Iterable[Process]) -> None:
        """Give up the hosts and placement groups of processes that have ended."""
        for process in processes:
            self._children.pop(process.name, None)
            self._processes.pop(process.name, None)
            if (host := self._hosts.pop(process.name, None)) is not None:
                ray.kill(host)
            if (group := self._groups.pop(process.id.part, None)) is not None:
                remove_placement_group(group)

    def end_hosts(self) -> None:
        for host in list(self._hosts.values()):
            ray.kill(host)
        self._hosts.clear()

    def end_all(self) -> None:
        self.end_hosts()
        for group in list(self._groups.values()):
            remove_placement_group(group)
        self._groups.clear()

    def _new_host(self, process: Process, *, number: int) -> Any:
        """`number`: how many of this process there were, with this one; Ray may still hold the names of the others."""
        name = actor_name(self._deployment, process.name if number == 1 else f"{process.name}-{number}")
        if isinstance(process, Bundle):
            return host_in_bundle(name, process, self._groups[process.id.part])
        return host_on_node(name, process.node_id)

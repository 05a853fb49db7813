"""The ranks of one worker group: how they meet, and the process groups in which they compute together."""

import os
import socket
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store, TCPStore  # torch.distributed has them without types
from torch.distributed import ProcessGroup, ProcessGroupGloo

from echelon.pb.process_pb2 import WorkerSpec
from workers.collectives import Group, SoloGroup, TorchGroup
from workers.one_shot import OneShotGroup, can_keep_bits, is_allowed, open_one_shot
from workers.process.fast_sums import with_fast_sums
from workers.trace import TracedGroup, Tracer

START_TIMEOUT_S = 1800.0  # ranks load at different speeds; the process that starts them has a shorter limit
_MEETING_TIMEOUT_S = 20.0  # of ranks that do the same at the same time; not measured
_GLOO_ON_HOST = "gloo_on_host"


class Cohort:
    """A group of one needs no store and no process group. All ranks must call the methods in the same order."""

    start_timeout_s = START_TIMEOUT_S

    def __init__(self, rank: int, world_size: int, store: TCPStore | None) -> None:
        self.rank = rank
        self.world_size = world_size
        self.tracer = Tracer(rank)  # of this rank's rounds
        self._store = store
        self._num_groups = 0
        self._uses_nccl = False
        self._can_share_memory = False
        self._process_groups: list[ProcessGroup] = []

    @classmethod
    def open(cls, spec: WorkerSpec) -> "Cohort":
        """The leader opens the store on a free port of its host, the others connect to it."""
        if spec.world_size <= 1:
            return cls(0, 1, None)
        timeout = timedelta(seconds=START_TIMEOUT_S)
        if spec.rank > 0:
            host, port = _split(spec.store_address)
            store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
            return cls(spec.rank, spec.world_size, store)
        listener = socket.create_server((spec.host, 0))  # by default the store would listen on every address
        port = listener.getsockname()[1]
        store = TCPStore(
            spec.host, port, is_master=True, wait_for_workers=False, timeout=timeout, master_listen_fd=listener.detach()
        )
        return cls(spec.rank, spec.world_size, store)

    @property
    def store_address(self) -> str:
        """host:port for the other ranks; empty in a group of one."""
        return f"{self._store.host}:{self._store.port}" if self._store else ""

    def publish(self, key: str, value: str) -> None:
        if self._store:
            self._store.set(key, value)

    def read(self, key: str) -> str:
        """The value that some rank has published under `key`; waits for it."""
        assert self._store is not None, f"nobody else can publish {key}"
        value: bytes = self._store.get(key)
        return value.decode()

    def gather(self, key: str, value: str) -> list[str]:
        """The values of all ranks, by rank; waits for them."""
        if self._store is None:
            return [value]
        self._store.set(f"{key}/{self.rank}", value)
        return [self.read(f"{key}/{rank}") for rank in range(self.world_size)]

    def join(self, spec: WorkerSpec) -> None:
        """Make the process group of all ranks."""
        if self._store is None:
            return
        device_ids = self.gather("device", _device_id(spec))  # also waits for all ranks before short timeouts apply
        self._uses_nccl = spec.device == "cuda" and len(set(device_ids)) == self.world_size
        is_one_node = len(set(self.gather("host", spec.host))) == 1
        self._can_share_memory = self._uses_nccl and is_one_node and is_allowed()
        _register_gloo(spec.host)
        dist.init_process_group(
            "nccl" if self._uses_nccl else _GLOO_ON_HOST,
            store=self._store,
            rank=self.rank,
            world_size=self.world_size,
            timeout=timedelta(seconds=START_TIMEOUT_S),
            pg_options=self._options(),
        )

    def group(self, size: int, *, ordered_sum: bool) -> Group | None:
        """The group of the first `size` ranks; None on the others."""
        if size == 1:
            return SoloGroup() if self.rank == 0 else None
        timeout = timedelta(seconds=START_TIMEOUT_S)
        process_group = dist.new_group(list(range(size)), timeout=timeout, pg_options=self._options())
        plain = None
        if self.rank < size:
            assert isinstance(process_group, ProcessGroup), "a member gets the group"
            self._process_groups.append(process_group)
            plain = TorchGroup(process_group, ordered_sum=ordered_sum)
        self._num_groups += 1
        group: Group | None = plain
        if self._can_share_memory and can_keep_bits(size, ordered_sum=ordered_sum):
            key, device = f"fast_sums/{self._num_groups}", torch.device("cuda", 0)
            group = with_fast_sums(plain, lambda group: self._open(group, process_group), self.gather, key, device)
        return None if group is None else TracedGroup(group, self.tracer)

    def limit_waits(self, timeout_s: float) -> None:
        """From now on, collectives fail if a rank does not come for so long. For when all is loaded, as ranks load at
        different speeds."""
        for process_group in self._process_groups:
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), process_group)

    def _open(self, plain: Group, process_group: Any) -> OneShotGroup:
        """The ranks meet in the store here, and one that does not come must not hold up the start."""
        assert self._store is not None, "there are several ranks"
        self._store.set_timeout(timedelta(seconds=_MEETING_TIMEOUT_S))
        try:
            return open_one_shot(plain, process_group, torch.device("cuda", 0))
        finally:
            self._store.set_timeout(timedelta(seconds=START_TIMEOUT_S))

    def _options(self) -> Any:
        """Of a process group. NCCL's kernels go before others that wait, such as copies between tiers, since a
        forward goes on only after them.

        What NCCL does when a rank is lost stays torch's default: after the timeout, a thread of torch ends the process,
        which its parent notices. Waiting on the host for each collective instead would leave the device idle, and is
        impossible in captured steps. Collectives of captured steps have no timeout; the leader's watch of silent ranks
        ends them (workers/process/round_channel.py).
        """
        if not self._uses_nccl:
            return None
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        options._timeout = timedelta(seconds=START_TIMEOUT_S)
        return options


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host, int(port)


def _device_id(spec: WorkerSpec) -> str:
    """Tells the devices of a group apart. Two ranks on one GPU cannot use NCCL, so they get gloo (meant for tests)."""
    if spec.device == "cuda":
        return str(torch.cuda.get_device_properties(0).uuid)
    return f"cpu-{spec.rank}"


def _register_gloo(host: str) -> None:
    """A gloo group that listens on the address in the spec, and no longer than the ranks need to connect.

    By default it takes the interface that the machine's hostname resolves to, and has no argument for another
    (init_process_group drops gloo's options). It listens for good and keeps every stray connection: the rank would die
    when it has no descriptor left.
    """

    gloo: Any = ProcessGroupGloo  # torch's stub lacks the options

    def create(store: Store, rank: int, size: int, timeout: timedelta) -> ProcessGroupGloo:
        known_fds = _listening_fds()
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=host)]
        options._timeout = timeout
        process_group: ProcessGroupGloo = gloo(store, rank, size, options)
        for fd in _listening_fds() - known_fds:
            _close_under(fd)
        return process_group

    dist.Backend.register_backend(_GLOO_ON_HOST, create, devices=["cpu", "cuda"])


def _listening_fds() -> set[int]:
    """Descriptors of this process's sockets that accept connections."""
    return {fd for fd in map(int, os.listdir("/dev/fd")) if _is_listening(fd)}


def _is_listening(fd: int) -> bool:
    try:
        seen = socket.socket(fileno=fd)
    except OSError:  # no socket, or closed since
        return False
    try:
        return seen.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) != 0
    finally:
        seen.detach()


def _close_under(fd: int) -> None:
    """Closes what a descriptor stands for, and leaves the number to its owner, which does not notice."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, fd)
    os.close(nothing)

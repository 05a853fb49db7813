"""Whether the parts of a running deployment answer. The process table knows only which have ended; a process that is
stopped, or hangs, has not."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from childproc.wires import open_blocking_channel
from cluster.process_id import PartId, ProcessId
from cluster.processes.status import ProcessStatus, State, TierUse
from echelon.pb import scheduler_pb2, scheduler_pb2_grpc, worker_pb2
from echelon.pb.process_pb2 import ProcessIdentity

_INTERVAL_S = 1.0
_TIMEOUT_S = 2.0
_USED_LIMIT_S, _USED_POLL_S = 60.0, 0.1  # a gateway that does not answer connects later
_SILENT_S = 5.0  # longer than a question and its timeout: on a busy machine one may go unanswered
_UNREACHED_S = 3.0  # the scheduler connects again to a group that lives in less
_STUCK_S = 10.0  # a control process that has not answered for so long is of no use
_WITHOUT_DRAFTS = "requests are decoded without drafts"
_WITHOUT_TIER = "prefixes that it holds are computed again"


@dataclass(frozen=True, slots=True)
class _Heard:
    status: scheduler_pb2.SchedulerStatus
    at_s: float


class Vitals:
    """What was last heard, and what follows for the deployment. Pure; not thread-safe."""

    def __init__(self, asked: Sequence[ProcessId], now: float) -> None:
        """`asked`: the processes that are."""
        self._asked = {process.name: process for process in asked}
        self._heard_s = dict.fromkeys(self._asked, now)
        self._heard_status: dict[str, _Heard] = {}  # by scheduler

    def add(self, process: ProcessId, now: float) -> None:
        """One more process is asked."""
        self._asked[process.name] = process
        self._heard_s[process.name] = now

    def remove(self, name: str) -> None:
        for known in (self._asked, self._heard_s, self._heard_status):
            known.pop(name, None)

    def asks(self, name: str) -> bool:
        return name in self._asked

    def num_requests(self, scheduler: str, *, since_s: float) -> int | None:
        """That wait or run there, as last heard; None: nothing was heard since then."""
        heard = self._heard_status.get(scheduler)
        if heard is None or heard.at_s < since_s:
            return None
        return heard.status.num_requests_running + heard.status.num_requests_waiting

    def on_answer(self, name: str, now: float) -> None:
        if name in self._asked:
            self._heard_s[name] = now

    def on_status(self, name: str, status: scheduler_pb2.SchedulerStatus, now: float) -> None:
        """What a scheduler says of itself and of its groups."""
        if name in self._asked:
            self._heard_status[name] = _Heard(status, now)

    def verdict(self, now: float) -> tuple[State, str]:
        """READY, or what is worse and why. One replica and one gateway that answer are enough to serve."""
        gateways = [name for name, process in self._asked.items() if process.role == "gateway"]
        silent = [name for name in self._silent(now) if name in gateways]
        if silent and len(silent) == len(gateways):
            return State.NOT_RESPONDING, "; ".join(self._silence_of(name, now) for name in self._silent(now))
        replicas = [self._replica(name, now) for name, process in self._asked.items() if process.role == "scheduler"]
        silences = [self._silence_of(name, now) for name in silent]
        reasons = "; ".join([*silences, *(reason for _, reason in replicas if reason)])
        if all(state is State.NOT_RESPONDING for state, _ in replicas):
            return State.NOT_RESPONDING, reasons
        return (State.DEGRADED, reasons) if reasons else (State.READY, "")

    def _replica(self, scheduler: str, now: float) -> tuple[State, str]:
        """What is wrong with one replica."""
        if scheduler in self._silent(now):
            return State.NOT_RESPONDING, self._silence_of(scheduler, now)
        heard = self._heard_status.get(scheduler)
        if heard is None:
            return State.READY, ""
        number = self._asked[scheduler].replica
        num_replicas = sum(process.role == "scheduler" for process in self._asked.values())
        replica = f"replica {number}, " if num_replicas > 1 else ""
        status, age_s = heard.status, now - heard.at_s
        if not status.ready or status.target_silent_s:
            reason = f": {status.not_ready_reason}" if status.target_lost else ""
            silence = f"{replica}target group: no answer for {status.target_silent_s + age_s:.0f} s{reason}"
            return State.NOT_RESPONDING, silence
        slower = [replica + reason for reason in (*_silent_draft(status, age_s), *_paused_tiers(status))]
        return (State.DEGRADED, "; ".join(slower)) if slower else (State.READY, "")

    def lost(self, now: float) -> dict[PartId, str]:
        """The parts that live and are of no use, with what is known of each."""
        lost = {
            process.part: f"has not answered for {now - self._heard_s[process.name]:.0f} s"
            for process in self._asked.values()
            if now - self._heard_s[process.name] > _STUCK_S
        }
        for scheduler, heard in self._heard_status.items():
            if self._asked[scheduler].part not in lost and now - heard.at_s <= _SILENT_S:
                lost |= _unreached_groups(heard.status, self._asked[scheduler].replica)
        return lost

    def tiers(self) -> tuple[TierUse, ...]:
        return tuple(
            _use_of(tier, self._asked[scheduler].replica)
            for scheduler, heard in self._heard_status.items()
            for tier in heard.status.tiers
        )

    def mark(self, processes: tuple[ProcessStatus, ...], now: float) -> tuple[ProcessStatus, ...]:
        """The processes, with those that do not answer shown as such."""
        silent = self._silent(now)
        return tuple(
            replace(process, state=State.NOT_RESPONDING)
            if process.name in silent and process.state is State.READY
            else process
            for process in processes
        )

    def _silent(self, now: float) -> list[str]:
        return [name for name, heard_s in self._heard_s.items() if now - heard_s > _SILENT_S]

    def _silence_of(self, name: str, now: float) -> str:
        return f"{name} has not answered for {now - self._heard_s[name]:.0f} s"


def _unreached_groups(status: scheduler_pb2.SchedulerStatus, replica: int) -> dict[PartId, str]:
    """Those to which the scheduler has lost its stream."""
    groups: dict[PartId, str] = {}
    if status.target_lost and status.target_silent_s > _UNREACHED_S:
        reason = f"the scheduler cannot reach it: {status.not_ready_reason}"
        groups[PartId(role="target", replica=replica)] = reason
    if status.draft_lost and status.draft_silent_s > _UNREACHED_S:
        reason = f"the scheduler cannot reach it: {status.draft_not_ready_reason}"
        groups[PartId(role="draft", replica=replica)] = reason
    return groups


def _silent_draft(status: scheduler_pb2.SchedulerStatus, age_s: float) -> Iterator[str]:
    """`age_s`: of the status."""
    if status.draft_silent_s:
        reason = f": {status.draft_not_ready_reason}" if status.draft_not_ready_reason else ""
        silent_s = status.draft_silent_s + age_s
        yield f"draft group: no answer for {silent_s:.0f} s{reason}; {_WITHOUT_DRAFTS}"


def _paused_tiers(status: scheduler_pb2.SchedulerStatus) -> Iterator[str]:
    for tier in status.tiers:
        if tier.paused:
            name = f"{tier.tier} tier of the {_engine_name(tier.engine)}'s KV cache"
            yield f"{name}: paused after errors, the last one: {tier.last_error}; {_WITHOUT_TIER}"


def _use_of(tier: scheduler_pb2.TierStatus, replica: int) -> TierUse:
    return TierUse(
        replica=replica,
        engine=_engine_name(tier.engine),
        tier=tier.tier,
        used_bytes=tier.num_used_blocks * tier.block_bytes,
        capacity_bytes=tier.num_blocks * tier.block_bytes,
        num_stored=tier.stored_blocks_total,
        num_fetched=tier.fetched_blocks_total,
        num_failed=tier.failed_blocks_total,
        num_damaged=tier.damaged_blocks_total,
        num_evicted=tier.evicted_blocks_total,
        saved_s=tier.avoided_seconds_total - tier.waited_seconds_total,
        paused=tier.paused,
        last_error=tier.last_error,
    )


def _engine_name(role: worker_pb2.EngineRole.ValueType) -> str:
    return worker_pb2.EngineRole.Name(role).removeprefix("ENGINE_ROLE_").lower()


class VitalsWatch:
    """Asks schedulers and gateway every second, from a thread each, until `stop`."""

    def __init__(
        self,
        asked: Sequence[ProcessId],
        address_of: Callable[[str], str],
        identity: ProcessIdentity | None = None,
    ) -> None:
        """`asked`: the schedulers and, if there is one, the gateway. `address_of`: where a process serves, by its name;
        empty while it does not."""
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._address_of = address_of
        self._identity = identity  # for schedulers: gateways tell everyone their health
        self._vitals = Vitals(asked, time.monotonic())
        for process in asked:
            self._start(process)

    def add(self, process: ProcessId) -> None:
        with self._lock:
            self._vitals.add(process, time.monotonic())
        self._start(process)

    def remove(self, name: str) -> None:
        """Its thread ends with its address."""
        with self._lock:
            self._vitals.remove(name)

    def num_requests(self, scheduler: str, *, since_s: float) -> int | None:
        """That wait or run there, as last heard; None: nothing was heard since then."""
        with self._lock:
            return self._vitals.num_requests(scheduler, since_s=since_s)

    def stop(self) -> None:
        self._stopped.set()

    def judge(self, processes: tuple[ProcessStatus, ...]) -> tuple[State, str, tuple[ProcessStatus, ...]]:
        """State, reason, and the processes as they are to be shown."""
        now = time.monotonic()
        with self._lock:
            return *self._vitals.verdict(now), self._vitals.mark(processes, now)

    def lost(self) -> dict[PartId, str]:
        """The parts that live and are of no use, with what is known of each."""
        with self._lock:
            return self._vitals.lost(time.monotonic())

    def on_start(self, name: str) -> None:
        """A process was started again: what is known of the one before does not count."""
        with self._lock:
            self._vitals.on_answer(name, time.monotonic())

    def tiers(self) -> tuple[TierUse, ...]:
        with self._lock:
            return self._vitals.tiers()

    def _start(self, process: ProcessId) -> None:
        ask: Ask = _ask_scheduler if process.role == "scheduler" else _ask_gateway
        name = f"vitals of {process.name}"
        threading.Thread(target=self._watch, args=(process.name, ask), name=name, daemon=True).start()

    def _is_asked(self, name: str) -> bool:
        with self._lock:
            return self._vitals.asks(name) and not self._stopped.is_set()

    def _watch(self, name: str, ask: "Ask") -> None:
        while self._is_asked(name) and not self._stopped.wait(_INTERVAL_S):
            if address := self._address_of(name):
                self._ask_at(address, name, ask)

    def _ask_at(self, address: str, name: str, ask: "Ask") -> None:
        """As long as the process is there."""
        identity = self._identity if ask is _ask_scheduler else None
        with open_blocking_channel(address, identity=identity) as channel:
            while self._is_asked(name) and self._address_of(name) == address and not self._stopped.wait(_INTERVAL_S):
                try:
                    answer = ask(channel)
                except grpc.RpcError:
                    continue  # the time since the last answer tells
                with self._lock:
                    self._vitals.on_answer(name, time.monotonic())
                    if answer is not None:
                        self._vitals.on_status(name, answer, time.monotonic())


Ask = Callable[[grpc.Channel], scheduler_pb2.SchedulerStatus | None]


def _ask_scheduler(channel: grpc.Channel) -> scheduler_pb2.SchedulerStatus:
    stub = scheduler_pb2_grpc.SchedulerStub(channel)
    return stub.GetSchedulerStatus(scheduler_pb2.GetSchedulerStatusRequest(), timeout=_TIMEOUT_S)


def _ask_gateway(channel: grpc.Channel) -> None:
    health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=_TIMEOUT_S)


def wait_until_used(
    scheduler_address: str, gateways: Sequence[str], address_of: Callable[[str], str], stopped: threading.Event
) -> str:
    """Until every gateway that answers sends requests to the scheduler, whose replica others may make way for. The name
    of one that does not in time; empty: none."""
    deadline, unused = time.monotonic() + _USED_LIMIT_S, ""
    for gateway in gateways:
        while (address := address_of(gateway)) and not _uses_scheduler(address, scheduler_address):
            if time.monotonic() >= deadline or stopped.wait(_USED_POLL_S):
                unused = gateway
                break
    return unused


def _uses_scheduler(gateway_address: str, scheduler_address: str) -> bool:
    """Whether a gateway would send requests to a scheduler now."""
    request = health_pb2.HealthCheckRequest(service=scheduler_address)
    with open_blocking_channel(gateway_address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=_TIMEOUT_S)
        except grpc.RpcError:
            return False  # it does not know it yet
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

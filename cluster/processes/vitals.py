"""Whether the parts of a running deployment answer. The process table knows only which have ended; a process that is
stopped, or hangs, has not."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import grpc

from childproc.wires import open_blocking_channel
from cluster.processes.status import ProcessStatus, State, TierUse
from echelon.pb import inference_pb2, inference_pb2_grpc, scheduler_pb2, scheduler_pb2_grpc, worker_pb2

_INTERVAL_S = 2.0
_TIMEOUT_S = 2.0
_SILENT_S = 5.0  # longer than a question and its timeout: on a busy machine one may go unanswered
_WITHOUT_DRAFTS = "requests are decoded without drafts"
_WITHOUT_TIER = "prefixes that it holds are computed again"


class Vitals:
    """What was last heard, and what follows for the deployment. Pure; not thread-safe."""

    def __init__(self, names: tuple[str, ...], now: float) -> None:
        """`names`: of the processes that are asked."""
        self._heard_s = dict.fromkeys(names, now)
        self._status: scheduler_pb2.SchedulerStatus | None = None
        self._status_s = now

    def on_answer(self, name: str, now: float) -> None:
        self._heard_s[name] = now

    def on_status(self, status: scheduler_pb2.SchedulerStatus, now: float) -> None:
        """What the scheduler says of itself and of its groups."""
        self._status, self._status_s = status, now

    def verdict(self, now: float) -> tuple[State, str]:
        """READY, or what is worse and why."""
        silent = [f"{name} has not answered for {now - self._heard_s[name]:.0f} s" for name in self._silent(now)]
        if silent:
            return State.NOT_RESPONDING, "; ".join(silent)
        status = self._status
        if status is None:
            return State.READY, ""
        age_s = now - self._status_s
        if not status.ready or status.target_silent_s:
            reason = f": {status.not_ready_reason}" if status.not_ready_reason else ""
            return State.NOT_RESPONDING, f"target group: no answer for {status.target_silent_s + age_s:.0f} s{reason}"
        slower = [*_silent_draft(status, age_s), *_paused_tiers(status)]
        return (State.DEGRADED, "; ".join(slower)) if slower else (State.READY, "")

    def tiers(self) -> tuple[TierUse, ...]:
        return () if self._status is None else tuple(map(_use_of, self._status.tiers))

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


def _use_of(tier: scheduler_pb2.TierStatus) -> TierUse:
    return TierUse(
        engine=_engine_name(tier.engine),
        tier=tier.tier,
        used_bytes=tier.num_used_blocks * tier.block_bytes,
        capacity_bytes=tier.num_blocks * tier.block_bytes,
        num_stored=tier.stored_blocks_total,
        num_fetched=tier.fetched_blocks_total,
        num_failed=tier.failed_blocks_total,
        num_evicted=tier.evicted_blocks_total,
        paused=tier.paused,
        last_error=tier.last_error,
    )


def _engine_name(role: worker_pb2.EngineRole.ValueType) -> str:
    return worker_pb2.EngineRole.Name(role).removeprefix("ENGINE_ROLE_").lower()


class VitalsWatch:
    """Asks scheduler and gateway every two seconds, from a thread each, until `stop`."""

    def __init__(self, scheduler: ProcessStatus, gateway: ProcessStatus) -> None:
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._vitals = Vitals((scheduler.name, gateway.name), time.monotonic())
        for process, ask in ((scheduler, _ask_scheduler), (gateway, _ask_gateway)):
            threading.Thread(
                target=self._watch, args=(process, ask), name=f"vitals of {process.name}", daemon=True
            ).start()

    def stop(self) -> None:
        self._stopped.set()

    def judge(self, processes: tuple[ProcessStatus, ...]) -> tuple[State, str, tuple[ProcessStatus, ...]]:
        """State, reason, and the processes as they are to be shown."""
        now = time.monotonic()
        with self._lock:
            return *self._vitals.verdict(now), self._vitals.mark(processes, now)

    def tiers(self) -> tuple[TierUse, ...]:
        with self._lock:
            return self._vitals.tiers()

    def _watch(self, process: ProcessStatus, ask: "Ask") -> None:
        with open_blocking_channel(process.address) as channel:
            while not self._stopped.wait(_INTERVAL_S):
                try:
                    answer = ask(channel)
                except grpc.RpcError:
                    continue  # the time since the last answer tells
                with self._lock:
                    self._vitals.on_answer(process.name, time.monotonic())
                    if answer is not None:
                        self._vitals.on_status(answer, time.monotonic())


Ask = Callable[[grpc.Channel], scheduler_pb2.SchedulerStatus | None]


def _ask_scheduler(channel: grpc.Channel) -> scheduler_pb2.SchedulerStatus:
    stub = scheduler_pb2_grpc.SchedulerStub(channel)
    return stub.GetSchedulerStatus(scheduler_pb2.GetSchedulerStatusRequest(), timeout=_TIMEOUT_S)


def _ask_gateway(channel: grpc.Channel) -> None:
    inference_pb2_grpc.InferenceStub(channel).GetModelInfo(inference_pb2.GetModelInfoRequest(), timeout=_TIMEOUT_S)

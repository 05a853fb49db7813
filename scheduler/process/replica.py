"""Drives the core: tells it what happened, sends the rounds that it plans, and delivers its outputs."""

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from math import inf
from typing import Any, TypeGuard

from grpc import StatusCode

from echelon.pb import inference_pb2, process_pb2, scheduler_pb2, worker_pb2
from scheduler.config import SpeculationConfig
from scheduler.core import SchedulerCore
from scheduler.engines.engine import EngineView
from scheduler.process.group_client import GroupClient, GroupEvents, Role, group_client
from scheduler.process.outbox import Outbox
from scheduler.process.recorder import RoundRecorder
from scheduler.requests.outputs import Chunk, Failed

logger = logging.getLogger(__name__)

_TARGET, _DRAFT = worker_pb2.ENGINE_ROLE_TARGET, worker_pb2.ENGINE_ROLE_DRAFT
_UNREADY_S = 4.0  # a target that is silent for longer makes health NOT_SERVING; not measured
_MIN_SILENCE_S = 2.0  # shorter silences are not reported; not measured


class Replica:
    """The running scheduler of one replica. It lives on one event loop, and nothing here blocks."""

    def __init__(
        self,
        core: SchedulerCore,
        spec: process_pb2.SchedulerSpec,
        *,
        on_ready: Callable[[bool], None],
        on_failure: Callable[[Exception], None],
    ) -> None:
        self._core = core
        self._on_failure = on_failure
        self._on_ready = on_ready
        self._gateways: list[Outbox] = []
        self._outboxes: dict[str, Outbox] = {}  # by request
        self._pump_is_due = False
        self._deadline: asyncio.TimerHandle | None = None
        self._release: asyncio.TimerHandle | None = None  # timer of the first seq that is held for drafts
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._pumped = asyncio.Event()
        self.ready = False
        self._away_since = {_TARGET: self._now(), _DRAFT: self._now()}  # groups that are not connected, and since when
        self._num_losses = {_TARGET: 0, _DRAFT: 0}
        self._is_colocated = spec.draft.address == spec.target.address
        self.recorder = RoundRecorder(core.status, is_colocated=self._is_colocated)
        events = GroupEvents(
            connected=self._target_up,
            result=self._target_result,
            moved=partial(self._moved, _TARGET),
            disk=partial(self._disk_contents, _TARGET),
            lost=self._target_lost,
            patience_s=lambda: self._patience_s(_TARGET, _DRAFT),
        )
        self.target = group_client(spec, _TARGET, events)
        self.draft: GroupClient | None = None
        if spec.HasField("draft") and SpeculationConfig.from_spec(spec.speculation).uses_draft_model:
            events = GroupEvents(
                connected=self._draft_up,
                result=self._draft_result,
                moved=partial(self._moved, _DRAFT),
                disk=partial(self._disk_contents, _DRAFT),
                lost=self._draft_lost,
                patience_s=lambda: self._patience_s(_DRAFT, _TARGET),
            )
            self.draft = group_client(spec, _DRAFT, events)

    # -- from gateways ------------------------------------------------------------------------------------------------

    def connect(self, outbox: Outbox) -> None:
        """A gateway is there. It hears what the target has cached."""
        self._gateways.append(outbox)
        outbox.look_at_cache(self._core.last_target)

    def submit(self, submit: scheduler_pb2.Submit, outbox: Outbox) -> None:
        former = self._outboxes.get(submit.request_id)
        if submit.HasField("resume_from") and former and former.tenants[submit.request_id] == submit.tenant:
            self._core.cancel(submit.request_id, self._now())
            self._deliver()  # what is left of it, to the stream that has ended
        refusal = self._refusal(submit) or self._core.add(submit, self._now())
        if refusal is not None:
            outbox.put(refusal)
            return
        self._outboxes[submit.request_id] = outbox
        outbox.tenants[submit.request_id] = submit.tenant
        self._idle.clear()
        self._arm_deadline()
        self._pump_soon()

    def cancel(self, request_id: str) -> None:
        self._core.cancel(request_id, self._now())
        self._pump_soon()

    def adjust(self, request_id: str, params: inference_pb2.Speculation) -> None:
        self._core.adjust(request_id, params)
        self._pump_soon()

    def drop(self, outbox: Outbox) -> None:
        """The gateway is gone, and so are its requests."""
        self._gateways.remove(outbox)
        outbox.look_at_cache(None)
        for request_id in list(outbox.tenants):
            self.cancel(request_id)

    def status(self) -> scheduler_pb2.SchedulerStatus:
        status = self._core.status()
        status.target_silent_s = self._silent_s(_TARGET, _DRAFT)
        status.ready = self.ready and not self._draining and status.target_silent_s < _UNREADY_S
        status.accepts_requests = self._core.accepts_requests and not self._draining
        status.target_lost = _TARGET in self._away_since
        status.target_losses_total, status.draft_losses_total = self._num_losses[_TARGET], self._num_losses[_DRAFT]
        if self.draft is not None:
            status.draft_silent_s = self._silent_s(_DRAFT, _TARGET)
            status.draft_ready = not status.draft_silent_s
            if _DRAFT in self._away_since:
                status.draft_lost = True
                status.draft_not_ready_reason = self.draft.last_error or "connecting"
        if not self.ready:
            status.not_ready_reason = f"{self.target.name}: {self.target.last_error or 'connecting'}"
        elif status.target_silent_s >= _UNREADY_S:
            status.not_ready_reason = f"{self.target.name}: does not answer"
        elif self._draining:
            status.not_ready_reason = "shutting down"
        return status

    async def drain(self, grace_s: float) -> None:
        """Take no new requests and wait for the running ones; then put what host memory holds of KV on disk. All of
        that within `grace_s`."""
        self._draining = True
        self._on_ready(False)
        logger.info("draining: %d requests run", self._core.num_requests)
        try:
            async with asyncio.timeout(grace_s):
                await self._idle.wait()
                await self._write_tiers()
        except TimeoutError:
            left = f"{self._core.num_requests} requests" if self._core.num_requests else "writes to disk"
            logger.warning("%s did not finish within %g s", left, grace_s)

    async def _write_tiers(self) -> None:
        """Put what host memory holds of KV on disk, so that the next start finds it."""
        for _, tiers in self._core.tiers:
            tiers.write_all()
        self._pump_soon()
        while not all(tiers.has_written(self._now()) for _, tiers in self._core.tiers):
            self._pumped.clear()
            await self._pumped.wait()

    def _refusal(self, submit: scheduler_pb2.Submit) -> Failed | None:
        if self._draining:
            reason = "this scheduler is shutting down"
        elif not self._core.accepts_requests:
            reason = f"{self.target.name}: {self.target.last_error or 'not connected yet'}"
        elif submit.request_id in self._outboxes:
            reason = f"request_id {submit.request_id!r} has not ended yet"
            return Failed.of(submit.request_id, StatusCode.ALREADY_EXISTS, reason)
        else:
            return None
        return Failed.of(submit.request_id, StatusCode.UNAVAILABLE, reason)

    def on_update(self, update: process_pb2.ProcessUpdate) -> None:
        """The parent says what has changed."""
        if not update.HasField("group"):
            return
        news, is_target = update.group, update.group.role == _TARGET
        group = self.target if is_target else self.draft
        if group is not None and news.HasField("endpoint"):
            group.redirect(news.endpoint)
        elif is_target:
            self._core.give_up_target(f"{self.target.name}: {news.given_up}")
            self._pump_soon()

    # -- from worker groups -------------------------------------------------------------------------------------------

    def _target_up(self, info: worker_pb2.EngineInfo, incarnation: int) -> None:
        self._core.connect_target(info, incarnation)
        del self._away_since[_TARGET]
        self.ready = True
        self._on_ready(not self._draining)
        self._pump_soon()

    def _target_result(self, result: worker_pb2.RoundResult) -> None:
        self.recorder.received(_TARGET, result)
        self._core.on_target_result(result, self._now())
        self._pump()

    def _target_lost(self, reason: str) -> None:
        self.ready = False
        self._on_ready(False)
        self._note_loss(_TARGET)
        has_died = not self.target.was_taken_over
        self._core.disconnect_target(f"{self.target.name}: {reason}", self._now(), has_died=has_died)
        self._pump_soon()

    def _draft_up(self, info: worker_pb2.EngineInfo, incarnation: int) -> None:
        self._core.connect_draft(info, incarnation, shares_process=self._is_colocated)
        del self._away_since[_DRAFT]
        self._pump_soon()

    def _draft_result(self, result: worker_pb2.RoundResult) -> None:
        self.recorder.received(_DRAFT, result)
        self._core.on_draft_result(result, self._now())
        self._pump()

    def _draft_lost(self, reason: str) -> None:
        self._note_loss(_DRAFT)
        self._core.disconnect_draft()
        self._pump_soon()

    def _moved(self, role: Role, result: worker_pb2.MoveResult) -> None:
        self.recorder.moved(role, result)
        self._core.tiers_of(role).on_moved(result, self._now())
        self._pump_soon()

    def _disk_contents(self, role: Role, contents: worker_pb2.DiskContents) -> None:
        self._core.tiers_of(role).on_disk_contents(contents)
        self._pump_soon()

    def _note_loss(self, role: Role) -> None:
        self.recorder.lost(role)
        self._num_losses[role] += 1
        self._away_since[role] = min(self._now(), self._late_since(role), self._idle_silence(role))

    def _patience_s(self, role: Role, other: Role) -> float:
        """How long the oldest round of an engine may take. In a shared process it may wait for the other's."""
        engine, neighbour = self._core.engines[role], self._core.engines[other]
        patience_s = inf if engine is None else engine.lost_s
        return patience_s + neighbour.lost_s if self._is_colocated and _is_busy(neighbour) else patience_s

    def _silent_s(self, role: Role, other: Role) -> float:
        """For how long a group has been disconnected or has taken longer than usual to answer; 0 if it answers in time
        or was asked only now."""
        if role in self._away_since:
            return self._now() - self._away_since[role]
        if (since := self._idle_silence(role)) < inf:
            return self._now() - since
        since = self._late_since(role)
        if self._is_colocated and _is_busy(self._core.engines[other]):
            since = max(since, self._late_since(other))  # one of them answers, and the other has to wait for it
        silent_s = self._now() - since
        return silent_s if silent_s >= _MIN_SILENCE_S else 0.0

    def _idle_silence(self, role: Role) -> float:
        """Since when an idle group has not answered; inf if it does."""
        group = self.target if role == _TARGET else self.draft
        return inf if group is None or group.silent_since is None else group.silent_since

    def _late_since(self, role: Role) -> float:
        """When the oldest round of an engine could have begun, if it is late; otherwise inf."""
        engine = self._core.engines[role]
        return engine.waiting_since() if engine is not None and engine.late_at() <= self._now() else inf

    # -- driving ------------------------------------------------------------------------------------------------------

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _soon(self, callback: Callable[[], None]) -> None:
        asyncio.get_running_loop().call_soon(self._run, callback)

    def _run(self, callback: Callable[[], None]) -> None:
        """A callback of the loop. There an error would only be logged, and the state after it would be broken."""
        try:
            callback()
        except Exception as error:  # noqa: BLE001  # the edge of the event loop; the process ends with it
            self._on_failure(error)

    def _pump_soon(self) -> None:
        """Plan once for everything that arrives in this turn of the loop."""
        if not self._pump_is_due:
            self._pump_is_due = True
            self._soon(self._pump)

    def _pump(self) -> None:
        """The main cycle of a scheduler: send every round that the core wants now, then deliver its outputs."""
        self._pump_is_due = False
        is_going = True
        while is_going:
            now = self._now()
            self._order_moves(now)
            drafting = self._core.plan_draft(now) if self.draft is not None else None
            verifying = self._core.plan_target(now)
            self._order_moves(now)
            self._send(self.draft, _DRAFT, drafting)
            self._send(self.target, _TARGET, verifying)
            is_going = drafting is not None or verifying is not None
        self._pumped.set()
        self._arm_release()
        self._soon(self._deliver)  # after the tasks that send the rounds

    def _send(self, group: GroupClient | None, role: Role, message: worker_pb2.Round | None) -> None:
        if group is not None and message is not None:
            self.recorder.sent(role, message)
            group.send(message)

    def _order_moves(self, now: float) -> None:
        """Those planned with rounds before these are sent, so that the workers begin them at once."""
        for role, order in self._core.order_moves(now):
            group = self.target if role == _TARGET else self.draft
            if group is not None:
                self.recorder.ordered(role, order)
                group.send_move(order)

    def _deliver(self) -> None:
        for output in self._core.take_outputs():
            outbox = self._outboxes[output.request_id]
            outbox.put(output)
            if not isinstance(output, Chunk):
                del self._outboxes[output.request_id]
                del outbox.tenants[output.request_id]
        for outbox in self._gateways:
            outbox.look_at_cache(self._core.last_target)
        if not self._outboxes:
            self._idle.set()

    def _arm_release(self) -> None:
        self._release = self._set_timer(self._release, self._core.next_release(), self._pump)

    def _arm_deadline(self) -> None:
        self._deadline = self._set_timer(self._deadline, self._core.next_deadline(), self._expire)

    def _set_timer(
        self, former: asyncio.TimerHandle | None, at: float | None, callback: Callable[[], None]
    ) -> asyncio.TimerHandle | None:
        if former is not None:
            former.cancel()
        return None if at is None else asyncio.get_running_loop().call_at(at, self._run, callback)

    def _expire(self) -> None:
        self._core.expire(self._now())
        self._arm_deadline()
        self._pump_soon()


def _is_busy(engine: EngineView[Any] | None) -> TypeGuard[EngineView[Any]]:
    return engine is not None and bool(engine.in_flight)

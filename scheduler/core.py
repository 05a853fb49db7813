"""What runs next. A plain synchronous class: no clock, no I/O, no threads.

The shell tells it what happened (`add`, `cancel`, `on_target_result`, ...). After every event the shell asks for the
next rounds (`plan_draft`, `plan_target`) until there are none. While the engines work on those, it takes the output to
deliver (`take_outputs`). Times are seconds of one monotonic clock.
"""

import logging
from math import inf
from typing import Any

from grpc import StatusCode

from checkpoint.token_table import TokenTable
from echelon.pb import inference_pb2, scheduler_pb2, worker_pb2
from scheduler.config import SchedulerConfig
from scheduler.drafting.speculation import Speculation
from scheduler.engines.attention import longest_seq, no_longer_fits
from scheduler.engines.engine import EngineView
from scheduler.engines.idle_meter import Idleness
from scheduler.errors import UnexpectedAnswerError
from scheduler.kv_cache.tiers import Tiers
from scheduler.requests.admission import build_request
from scheduler.requests.checks import InvalidRequestError
from scheduler.requests.deadlines import Deadlines
from scheduler.requests.delivery import Delivery, Fresh
from scheduler.requests.draft_tally import DraftTally
from scheduler.requests.outputs import Failed, Output
from scheduler.requests.request import Request, Seq, SeqStatus
from scheduler.requests.resuming import replay
from scheduler.requests.stopping import Finish
from scheduler.target.planner import TargetPlanner
from scheduler.target.report import report_target
from scheduler.target.row import TargetRow
from scheduler.target.state import condemned

logger = logging.getLogger(__name__)


class SchedulerCore:
    """Continuous batching over one target engine and, if there is one, a draft engine."""

    def __init__(self, config: SchedulerConfig, table: TokenTable) -> None:
        self._config = config
        self._table = table
        self._speculation = Speculation(config.speculation)
        self._target = TargetPlanner(config, self._speculation)
        self._requests: dict[str, Request] = {}
        self._num_arrived = 0
        self._deadlines = Deadlines()
        self.last_target: EngineView[TargetRow] | None = None  # also while it is away; None: it will not come back
        self._delivery = Delivery(table)
        self._num_generated = 0
        self._speculated = DraftTally()
        self._totals = scheduler_pb2.SchedulerStatus()
        self._idleness = Idleness()

    # -- engines ------------------------------------------------------------------------------------------------------

    def connect_target(self, info: worker_pb2.EngineInfo, incarnation: int) -> None:
        """Requests that the target had before it was lost are computed again, as far as there is room for them."""
        engine: EngineView[TargetRow] = self._new_engine(info, incarnation)
        self.last_target = engine
        self._target.attach(engine)
        for request in [other for other in self._requests.values() if other.max_len > engine.longest(other)]:
            self._fail(request, StatusCode.RESOURCE_EXHAUSTED, no_longer_fits(request, engine))

    def connect_draft(self, info: worker_pb2.EngineInfo, incarnation: int, *, shares_process: bool = False) -> None:
        """Speculation starts, or resumes, for every seq. `shares_process`: the draft runs in the target's process."""
        self._speculation.attach(self._new_engine(info, incarnation), shares_process=shares_process)

    def disconnect_target(self, reason: str, now: float, *, has_died: bool = True) -> None:
        """All it held is lost. Requests wait if it is started again, and one may be to blame if it `has_died`."""
        for request in self._target.detach(now, has_died=has_died):
            self._fail(request, StatusCode.INTERNAL, f"{condemned(request)}: {reason}")
        if not self._config.keeps_requests:
            self.give_up_target(reason)

    def give_up_target(self, reason: str) -> None:
        """The target will not come back: every request fails."""
        self.last_target = None
        for request in list(self._requests.values()):
            self._fail(request, StatusCode.UNAVAILABLE, reason)

    @property
    def accepts_requests(self) -> bool:
        """Whether a request that comes now is queued: the target is there, or will be."""
        return self.last_target is not None

    def disconnect_draft(self) -> None:
        """The draft engine is gone: requests continue without drafts."""
        self._speculation.detach()

    def _new_engine(self, info: worker_pb2.EngineInfo, incarnation: int) -> EngineView[Any]:
        return EngineView(
            info,
            incarnation,
            enable_prefix_caching=self._config.enable_prefix_caching,
            tiers=self._config.tiers,
        )

    # -- requests -----------------------------------------------------------------------------------------------------

    def add(self, submit: scheduler_pb2.Submit, now: float) -> Failed | None:
        """Queue a request, or return why it was refused."""
        try:
            return self._add(submit, now)
        except InvalidRequestError as error:
            return Failed.of(submit.request_id, StatusCode.INVALID_ARGUMENT, str(error))

    def _add(self, submit: scheduler_pb2.Submit, now: float) -> Failed | None:
        request_id = submit.request_id
        engine = self.last_target
        if engine is None:
            return Failed.of(request_id, StatusCode.UNAVAILABLE, "the target group is not connected")
        if request_id in self._requests:
            return Failed.of(request_id, StatusCode.ALREADY_EXISTS, f"request_id {request_id!r} is already running")
        num_queued, max_queue = self._target.num_queued, self._config.max_queue
        if num_queued >= max_queue and not submit.was_accepted:
            full = f"the queue is full: {num_queued} requests wait (max_queue {max_queue})"
            return Failed.of(request_id, StatusCode.RESOURCE_EXHAUSTED, f"{full}; try again later")
        request = build_request(
            submit,
            config=self._config,
            max_model_len=min(self._config.max_model_len, longest_seq(submit, engine)),
            vocab_size=engine.info.vocab_size,
            table=self._table,
            block_size=engine.info.block_size,
            number=self._num_arrived,
            now=now,
        )
        ended = replay(submit, request, engine.info.vocab_size, engine.approximations)
        self._num_arrived += 1
        self._requests[request_id] = request
        self._deadlines.add(request)
        self._totals.prompt_tokens_total += request.num_prompt_tokens
        self._speculation.add(self._target.add(request), submit.speculation)
        if request.seqs[0].num_outputs:
            self._start_siblings(request)
        for seq, finish in ended:
            self._finish(seq, finish, now, Fresh(seq, seq.num_outputs, [], None))
        return None

    def cancel(self, request_id: str, now: float) -> None:
        """End a request because its client asked. Unknown ids (a request that has just finished, say) are ignored."""
        request = self._requests.get(request_id)
        if request is None:
            return
        aborted = Finish(reason=inference_pb2.FINISH_REASON_ABORT)
        for seq in request.seqs:
            if seq.status is not SeqStatus.FINISHED:
                seq.output.end()
                self._finish(seq, aborted, now, Fresh(seq, seq.num_outputs, [], None))

    def adjust(self, request_id: str, params: inference_pb2.Speculation) -> None:
        """Change how a running request speculates, from its next rows on. Unknown ids are ignored, as in `cancel`."""
        request = self._requests.get(request_id)
        for seq in request.seqs if request is not None else ():
            if seq.status is not SeqStatus.FINISHED:
                self._speculation.adjust(seq, params)

    def expire(self, now: float) -> None:
        """Fail the requests whose deadline has passed."""
        for request in self._deadlines.take_expired(now):
            allowed = request.deadline_s - request.arrived_s if request.deadline_s is not None else 0.0
            self._fail(request, StatusCode.DEADLINE_EXCEEDED, f"not finished within {allowed:.3f} s")

    def next_deadline(self) -> float | None:
        """When `expire` is worth calling again."""
        return self._deadlines.next()

    def next_release(self) -> float | None:
        """When to plan again even if nothing happens: by then drafts, or blocks from other tiers, were waited for long
        enough."""
        idle_since = self._target_idle_since
        release = min((tiers.next_deadline() for _, tiers in self.tiers), default=inf)
        if idle_since is not None:  # otherwise the round in flight comes back first
            release = min(release, self._speculation.stops_waiting_at(idle_since))
        return release if release < inf else None

    @property
    def _target_idle_since(self) -> float | None:
        return None if self._target.engine is None else self._target.engine.idle_since

    @property
    def engines(self) -> dict["worker_pb2.EngineRole.ValueType", EngineView[Any] | None]:
        """What is known of the groups; None where one is not connected."""
        draft = self._speculation.drafter.engine
        return {worker_pb2.ENGINE_ROLE_TARGET: self._target.engine, worker_pb2.ENGINE_ROLE_DRAFT: draft}

    @property
    def num_requests(self) -> int:
        return len(self._requests)

    # -- the draft engine ---------------------------------------------------------------------------------------------

    def plan_draft(self, now: float) -> worker_pb2.Round | None:
        running, idle_since = self._target.foremost, self._target_idle_since
        message = self._speculation.plan_draft(running, now, target_idle_since=idle_since)
        self._totals.draft_rounds_total += message is not None
        self._measure_idleness(now)
        return message

    def on_draft_result(self, result: worker_pb2.RoundResult, now: float) -> None:
        self._speculation.on_draft_result(result, now, target_idle_since=self._target_idle_since)

    # -- the target engine --------------------------------------------------------------------------------------------

    def plan_target(self, now: float) -> worker_pb2.Round | None:
        """The next round for the target, None while it has enough to do or nothing can run."""
        message = self._target.plan(now)
        self._totals.target_rounds_total += message is not None
        self._measure_idleness(now)
        return message

    def _measure_idleness(self, now: float) -> None:
        """Note that the engines may have become busy or idle."""
        waits = self._speculation.target_waits or self._speculation.next_release is not None
        draft_engine = self._speculation.drafter.engine
        self._idleness.update_target(now, self._target.engine, is_wanted=waits)
        is_idle = draft_engine is not None and not draft_engine.in_flight
        self._idleness.update_draft(now, is_idle=is_idle and self._speculation.speculates(self._target.foremost))

    def on_target_result(self, result: worker_pb2.RoundResult, now: float) -> None:
        """Commit the results of a round."""
        record = self._target.complete(result, now)
        self._speculation.observe_target(record)
        for row, answer in record.answered:
            if row.seq.status is not SeqStatus.FINISHED:
                self._on_row(row, answer, now)

    def _on_row(self, row: TargetRow, answer: worker_pb2.RowResult, now: float) -> None:
        seq = row.seq
        if answer.non_finite:
            self._on_non_finite(row)
            return
        if answer.grammar_error:
            self._fail(seq.request, StatusCode.INVALID_ARGUMENT, f"structured_output: {answer.grammar_error}")
            return
        if seq.request.prompt_logprobs:
            self._delivery.take_prompt_logprobs(seq.request.prompt_logprobs, answer)
        num_computed = row.end + (answer.num_accepted_tokens if row.drafts else 0)
        token_ids = list(answer.token_ids)
        if not token_ids:
            self._target.publish(row, num_computed)
            return
        offset = seq.num_outputs
        finish = seq.commit(token_ids)
        if finish is not None:
            del token_ids[seq.num_outputs - offset :]
        self._count(row, answer, len(token_ids), now)
        self._speculation.on_commit(seq, token_ids)
        self._target.publish(row, min(num_computed, len(seq.token_ids)))
        fresh = Fresh(seq, offset, token_ids, answer)
        if finish is None:
            self._delivery.put(fresh)
        else:
            self._finish(seq, finish, now, fresh)

    def _count(self, row: TargetRow, answer: worker_pb2.RowResult, num_taken: int, now: float) -> None:
        """`num_taken` tokens were committed for the row's seq."""
        request = row.seq.request
        self._num_generated += num_taken
        num_verified = answer.num_verified_tokens if row.drafts else 0
        for tally in (request.speculation, self._speculated):
            tally.add(num_verified, min(answer.num_accepted_tokens, num_taken))
        if row.drafts:
            self._speculation.on_verdict(row.seq, answer.num_accepted_tokens, num_verified)
        request.note_token(now)
        if len(request.seqs) > 1:
            self._start_siblings(request)

    def _start_siblings(self, request: Request) -> None:
        """The first sample has computed the prompt, so the others find it in the cache."""
        for seq in request.seqs[1:]:
            if seq.status is SeqStatus.HELD:
                self._target.enqueue(seq)

    # -- tiers of the KV cache ----------------------------------------------------------------------------------------

    def order_moves(self, now: float) -> list[tuple["worker_pb2.EngineRole.ValueType", worker_pb2.MoveOrder]]:
        """The moves to order from the groups now. Call it before planning rounds, so that blocks are stored before they
        are evicted, and after it, so that what a plan wants comes at once."""
        return [(role, order) for role, tiers in self.tiers for order in tiers.orders(now)]

    def tiers_of(self, role: "worker_pb2.EngineRole.ValueType") -> Tiers:
        """For what a group says of its moves. Raises UnexpectedAnswerError if its engine has no tiers."""
        engine = self.engines[role]
        if engine is None or engine.tiers is None:
            raise UnexpectedAnswerError("an engine without tiers moved blocks")
        return engine.tiers

    @property
    def tiers(self) -> list[tuple["worker_pb2.EngineRole.ValueType", Tiers]]:
        return [(role, engine.tiers) for role, engine in self.engines.items() if engine is not None and engine.tiers]

    # -- ends ---------------------------------------------------------------------------------------------------------

    def _finish(self, seq: Seq, finish: Finish, now: float, last: Fresh) -> None:
        request = seq.request
        self._target.release(seq)
        self._speculation.finish(seq)
        seq.finish = finish
        self._start_siblings(request)
        self._delivery.put(last)
        if all(s.status is SeqStatus.FINISHED for s in request.seqs):
            self._forget(request)
            self._delivery.put(request.completion(now))

    def _fail(self, request: Request, code: StatusCode, message: str) -> None:
        for seq in request.seqs:
            if seq.status is not SeqStatus.FINISHED:
                self._target.release(seq)
                self._speculation.finish(seq)
        self._forget(request)
        self._delivery.put(Failed.of(request.request_id, code, message))

    def _on_non_finite(self, row: TargetRow) -> None:
        seq = row.seq
        self._target.unpublish(row)
        self._totals.non_finite_rows_total += 1
        position = len(seq.token_ids)
        logger.error("request %s: non-finite logits at position %d", seq.request.request_id, position)
        self._fail(seq.request, StatusCode.INTERNAL, f"non-finite logits at position {position}")

    def _forget(self, request: Request) -> None:
        del self._requests[request.request_id]
        request.close()
        self._target.forget(request)

    # -- what comes out -----------------------------------------------------------------------------------------------

    def take_outputs(self) -> list[Output]:
        """The output to deliver since the last call, in order."""
        return self._delivery.take()

    # -- status -------------------------------------------------------------------------------------------------------

    def status(self) -> scheduler_pb2.SchedulerStatus:
        """Counters and gauges; the shell adds whether the groups answer."""
        status = scheduler_pb2.SchedulerStatus()
        status.CopyFrom(self._totals)
        status.generation_tokens_total = self._num_generated
        status.speculation_total.CopyFrom(self._speculated.message())
        report_target(self._target, status)
        status.num_requests_waiting = len(self._requests) - status.num_requests_running
        self._idleness.report(status)
        status.tiers.extend(report for role, tiers in self.tiers for report in tiers.report(role))
        self._speculation.report(status)
        return status

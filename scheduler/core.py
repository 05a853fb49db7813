"""What runs next. A plain synchronous class: no clock, no I/O, no threads.

The shell tells it what happened (`add`, `cancel`, `on_target_result`, ...), asks it after every event for the next
rounds (`plan_draft`, `plan_target`) until it has none, and then, while engines work on those, takes what is to be
delivered (`take_outputs`). Times are seconds of one monotonic clock.
"""

import logging
from bisect import insort
from heapq import heappop, heappush
from operator import attrgetter
from typing import NamedTuple

from grpc import StatusCode

from echelon.pb import inference_pb2, sampling_pb2, scheduler_pb2, worker_pb2
from scheduler.config import SchedulerConfig
from scheduler.detokenizer import TokenTable
from scheduler.engine import Engine, PlannedRow
from scheduler.prefill import Arrivals, Prompt, RoundCost, share_prefill
from scheduler.queue import WaitingQueue
from scheduler.request import Chunk, Failed, InvalidRequestError, Output, Request, build_request
from scheduler.seq import Seat, Seq, SeqStatus
from scheduler.speculation import Drafter
from scheduler.stopping import Finish

__all__ = ["SchedulerCore"]

logger = logging.getLogger(__name__)

_ABORT = Finish(reason=inference_pb2.FINISH_REASON_ABORT)
_by_order = attrgetter("order")


def _failed(request_id: str, code: StatusCode, message: str) -> Failed:
    return Failed(request_id=request_id, code=code.value[0], message=message)


class _Fresh(NamedTuple):
    """Tokens that were committed and are not yet a chunk."""

    seq: Seq
    offset: int  # output tokens before them
    token_ids: list[int]
    answer: worker_pb2.RowResult | None  # with their log-probabilities, and perhaps those of tokens behind the end


class SchedulerCore:
    """Continuous batching over one target engine and, if there is one, a draft engine."""

    def __init__(self, config: SchedulerConfig, table: TokenTable) -> None:
        self._config = config
        self._table = table
        self._target: Engine | None = None
        self._drafter = Drafter()
        self._requests: dict[str, Request] = {}
        self._running: list[Seq] = []  # oldest first
        self._waiting = WaitingQueue()
        self._num_queued = 0  # requests that have never run
        self._num_arrived = 0
        self._deadlines: list[tuple[float, int, Request]] = []  # a heap; finished requests stay until they surface
        self._arrivals = Arrivals()
        self._cost = RoundCost()
        self._refusal: tuple[Seq, int] | None = None  # the seq that found too few free blocks, and how many there were
        self._outputs: list[Output | _Fresh] = []
        self._num_generated = 0
        self._num_accepted = 0
        self._totals = scheduler_pb2.SchedulerStatus()

    # -- engines ------------------------------------------------------------------------------------------------------

    def connect_target(self, info: worker_pb2.EngineInfo, incarnation: int) -> None:
        self._target = self._new_engine(info, incarnation)
        self._cost = RoundCost()

    def connect_draft(self, info: worker_pb2.EngineInfo, incarnation: int) -> None:
        """Speculation starts, or resumes, for every seq."""
        self._drafter.attach(self._new_engine(info, incarnation))

    def disconnect_target(self, reason: str) -> None:
        """The target is gone with all that it held: every request fails."""
        for request in list(self._requests.values()):
            self._fail(request, StatusCode.UNAVAILABLE, reason)
        self._target = None
        self._refusal = None

    def disconnect_draft(self) -> None:
        """The draft engine is gone: requests go on without drafts."""
        self._drafter.detach(self._running)

    def _max_model_len(self, engine: Engine) -> int:
        """One seq of this length fits whatever else goes on, so nobody is preempted for ever."""
        info = engine.info
        return min(self._config.max_model_len, info.max_model_len, info.num_blocks * info.block_size)

    def _new_engine(self, info: worker_pb2.EngineInfo, incarnation: int) -> Engine:
        return Engine(info, incarnation, enable_prefix_caching=self._config.enable_prefix_caching)

    # -- requests -----------------------------------------------------------------------------------------------------

    def add(self, submit: scheduler_pb2.Submit, now: float) -> Failed | None:
        """Queue a request, or say why not."""
        try:
            return self._add(submit, now)
        except InvalidRequestError as error:
            return _failed(submit.request_id, StatusCode.INVALID_ARGUMENT, str(error))

    def _add(self, submit: scheduler_pb2.Submit, now: float) -> Failed | None:
        request_id = submit.request_id
        if self._target is None:
            return _failed(request_id, StatusCode.UNAVAILABLE, "the target group is not connected")
        if request_id in self._requests:
            return _failed(request_id, StatusCode.ALREADY_EXISTS, f"request_id {request_id!r} is already running")
        if self._num_queued >= self._config.max_queue:
            full = f"the queue is full: {self._num_queued} requests wait (max_queue {self._config.max_queue})"
            return _failed(request_id, StatusCode.RESOURCE_EXHAUSTED, f"{full}; try again later")
        request = build_request(
            submit,
            config=self._config,
            max_model_len=self._max_model_len(self._target),
            table=self._table,
            block_size=self._target.info.block_size,
            number=self._num_arrived,
            now=now,
        )
        self._num_arrived += 1
        self._num_queued += 1
        self._requests[request_id] = request
        if request.deadline_s is not None:
            heappush(self._deadlines, (request.deadline_s, self._num_arrived, request))
        self._arrivals.add(request.num_prompt_tokens, now)
        self._totals.prompt_tokens_total += request.num_prompt_tokens
        self._waiting.push(request.seqs[0])
        return None

    def cancel(self, request_id: str, now: float) -> None:
        """End a request at its client's wish. Unknown ids (finished a moment ago, say) are ignored."""
        request = self._requests.get(request_id)
        if request is None:
            return
        for seq in request.seqs:
            if seq.status is not SeqStatus.FINISHED:
                seq.output.end()
                self._finish(seq, _ABORT, now, _Fresh(seq, seq.num_outputs, [], None))

    def expire(self, now: float) -> None:
        """Fail the requests whose time is up."""
        while self._deadlines and self._deadlines[0][0] <= now:
            request = heappop(self._deadlines)[2]
            if request.is_finished:
                continue
            allowed = request.deadline_s - request.arrived_s if request.deadline_s is not None else 0.0
            self._fail(request, StatusCode.DEADLINE_EXCEEDED, f"not finished within {allowed:.3f} s")

    def next_deadline(self) -> float | None:
        """When `expire` is worth calling again."""
        while self._deadlines and self._deadlines[0][2].is_finished:
            heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    @property
    def num_requests(self) -> int:
        return len(self._requests)

    # -- the draft engine ---------------------------------------------------------------------------------------------

    def plan_draft(self) -> worker_pb2.Round | None:
        message = self._drafter.plan(self._running)
        self._totals.draft_rounds_total += message is not None
        return message

    def on_draft_result(self, result: worker_pb2.RoundResult) -> None:
        self._totals.draft_tokens_total += self._drafter.on_result(result)

    # -- the target engine: planning ----------------------------------------------------------------------------------

    def plan_target(self, now: float) -> worker_pb2.Round | None:
        """The next round for the target, None while it has enough to do or nothing can run."""
        engine = self._target
        if engine is None or not (self._running or self._waiting) or not self._may_queue(engine):
            return None
        rows: dict[Seq, PlannedRow] = {}
        num_preemptions = self._totals.num_preemptions_total
        self._plan_decodes(engine, rows)
        if self._totals.num_preemptions_total == num_preemptions:
            self._admit(engine, now)
        self._plan_prefills(engine, rows, now)
        self._plan_drafts(engine, rows)
        if not rows:
            return None
        for row in rows.values():
            self._mark_in_flight(row)
        self._totals.target_rounds_total += 1
        return engine.launch(list(rows.values()))

    def _may_queue(self, engine: Engine) -> bool:
        if self._drafter.is_drafting:
            return False
        if not engine.in_flight:
            return True
        # A second round goes behind one that decodes (prefill.py says why), and none while seqs speculate:
        # they draft between rounds.
        speculating = self._drafter.num_seated > 0
        return (
            len(engine.in_flight) < self._config.max_rounds_in_flight
            and not speculating
            and not engine.in_flight[-1].is_prefill
        )

    def _plan_decodes(self, engine: Engine, rows: dict[Seq, PlannedRow]) -> None:
        for seq in list(self._running):
            seat = seq.target
            if seat is None or seq.is_verifying:
                continue
            length = len(seq.token_ids) + seq.num_pending
            if length - seat.num_computed != 1 or length >= seq.max_len:
                continue
            if self._make_room(engine, seq, seat, rows):
                rows[seq] = PlannedRow(seq=seq, seat=seat, start=seat.num_computed, chunk_len=1)

    def _make_room(self, engine: Engine, seq: Seq, seat: Seat, rows: dict[Seq, PlannedRow]) -> bool:
        """A block for the seq's next token, taken from the youngest seq if need be (possibly itself)."""
        while not engine.grow(seat, seat.num_computed + 1):
            victim = self._running[-1]
            self._preempt(engine, victim)
            rows.pop(victim, None)
            if victim is seq:
                return False
        return True

    def _preempt(self, engine: Engine, seq: Seq) -> None:
        assert seq.target is not None, "a running seq has a seat"
        engine.release(seq.target)
        seq.target = None
        self._drafter.release(seq)
        self._running.remove(seq)
        self._waiting.push(seq)
        self._totals.num_preemptions_total += 1

    def _admit(self, engine: Engine, now: float) -> None:
        limit = min(self._config.max_num_seqs, self._budget(engine))
        while (seq := self._waiting.first()) is not None:
            # A preempted seq with a row on its way comes back with the token that the row commits.
            if seq.num_rows_in_flight or engine.num_free_slots == 0 or len(self._running) >= limit:
                return
            if self._running and self._refusal == (seq, engine.blocks.num_free):
                return
            if not self._seat(engine, seq):
                self._refusal = (seq, engine.blocks.num_free)
                return
            self._waiting.remove(seq)
            seq.status = SeqStatus.RUNNING
            insort(self._running, seq, key=_by_order)
            if seq.request.admitted_s is None:
                seq.request.admitted_s = now
                self._num_queued -= 1

    def _seat(self, engine: Engine, seq: Seq) -> bool:
        """A slot and the blocks of its known prefix, if there is room for the first chunk behind it too."""
        blocks = engine.blocks
        reuse = not (seq.sampling.HasField("prompt_logprobs") and seq.request.wants_prompt_logprobs)
        found = engine.find_prefix(seq) if reuse else []
        num_cached = len(found) * blocks.block_size
        first_chunk = min(len(seq.token_ids) - num_cached, self._budget(engine))
        # A few blocks in reserve, so that the newcomer is not preempted by the next decode steps.
        watermark = 1 + len(self._running) // 8 if self._running else 0
        needed = blocks.num_blocks_for(first_chunk) + blocks.num_idle_among(found) + watermark
        if needed > blocks.num_free and self._running:
            return False
        blocks.hold(found)
        seq.target = Seat(slot=engine.take_slot(), block_ids=found, num_computed=num_cached, num_published=len(found))
        seq.num_reused = num_cached
        if seq.request.admitted_s is None:
            seq.request.num_cached_tokens = num_cached
        if reuse:
            self._totals.prefix_cache_queries += len(seq.token_ids)
            self._totals.prefix_cache_hits += num_cached
        return True

    def _plan_prefills(self, engine: Engine, rows: dict[Seq, PlannedRow], now: float) -> None:
        prefilling = [seq for seq in self._running if seq not in rows and seq.may_step]
        if not prefilling:
            return
        budget = self._budget(engine) - len(rows)
        num_drafts = sum(len(seq.drafts) for seq in rows)
        shares = share_prefill(
            [Prompt(seq.num_uncomputed, seq.num_tokens_ahead - seq.num_reused) for seq in prefilling],
            budget - min(num_drafts, budget // 2),
            shortest=self._arrivals.shortest(now),
            knee=self._cost.knee,
        )
        for seq, share in zip(prefilling, shares, strict=True):
            seat = seq.target
            if seat is None or share == 0 or not self._make_room(engine, seq, seat, rows):
                continue
            chunk_len = min(share, engine.room_for(seat) - seat.num_computed)
            engine.grow(seat, seat.num_computed + chunk_len)
            rows[seq] = PlannedRow(seq=seq, seat=seat, start=seat.num_computed, chunk_len=chunk_len)

    def _plan_drafts(self, engine: Engine, rows: dict[Seq, PlannedRow]) -> None:
        """Add the drafts at hand to decode rows, as far as tokens and free blocks go: they preempt nobody."""
        budget = self._budget(engine) - sum(row.chunk_len for row in rows.values())
        for seq, row in rows.items():
            if not seq.drafts:
                continue
            room = engine.room_for(row.seat) - row.start - 1
            drafts = seq.drafts[: max(0, min(budget, room))]
            seq.drafts = []
            if drafts and engine.grow(row.seat, row.start + 1 + len(drafts)):
                row.drafts = drafts
                budget -= len(drafts)

    def _mark_in_flight(self, row: PlannedRow) -> None:
        seq = row.seq
        seq.num_rows_in_flight += 1
        if row.drafts:
            seq.is_verifying = True
        elif row.start + row.chunk_len == seq.num_tokens_ahead:
            row.num_pending = 1
            seq.num_pending += 1

    def _budget(self, engine: Engine) -> int:
        return min(self._config.max_num_batched_tokens, engine.info.max_num_batched_tokens)

    # -- the target engine: results -----------------------------------------------------------------------------------

    def on_target_result(self, result: worker_pb2.RoundResult, now: float) -> None:
        """Commit what a round has computed."""
        assert self._target is not None, "a result of an engine that is not connected"
        record = self._target.land(result)
        self._cost.observe(record.num_tokens, result.run_ns)
        for row, answer in zip(record.rows, result.rows, strict=True):
            seq = row.seq
            seq.num_rows_in_flight -= 1
            seq.num_pending -= row.num_pending
            if row.drafts:
                seq.is_verifying = False
            if seq.status is not SeqStatus.FINISHED:
                self._on_row(row, answer, now)

    def _on_row(self, row: PlannedRow, answer: worker_pb2.RowResult, now: float) -> None:
        seq = row.seq
        if answer.non_finite:
            self._on_non_finite(row)
            return
        if seq.request.prompt_logprobs:
            self._take_prompt_logprobs(seq.request, answer)
        num_accepted = answer.num_accepted_tokens if row.drafts else 0
        num_computed = row.start + row.chunk_len + num_accepted
        if num_accepted and seq.target is row.seat:
            row.seat.num_computed += num_accepted
        token_ids = list(answer.token_ids)
        if not token_ids:
            self._publish(row, num_computed)
            return
        offset = seq.num_outputs
        finish = self._commit(seq, token_ids)
        if finish is not None:
            del token_ids[seq.num_outputs - offset :]
        self._count(row, answer, len(token_ids), now)
        self._publish(row, min(num_computed, len(seq.token_ids)))
        fresh = _Fresh(seq, offset, token_ids, answer)
        if finish is None:
            self._outputs.append(fresh)
        else:
            self._finish(seq, finish, now, fresh)

    def _commit(self, seq: Seq, token_ids: list[int]) -> Finish | None:
        """Tokens join the history, up to the one that ends the seq."""
        for token_id in token_ids:
            seq.token_ids.append(token_id)
            finish = seq.output.push(token_id)
            if finish is not None:
                return finish
        return None

    def _count(self, row: PlannedRow, answer: worker_pb2.RowResult, num_taken: int, now: float) -> None:
        """`num_taken` tokens were committed for the row's seq."""
        request = row.seq.request
        request.num_rounds += 1
        self._num_generated += num_taken
        if row.drafts:
            num_accepted = min(answer.num_accepted_tokens, num_taken)
            self._num_accepted += num_accepted
            request.count_verdict(answer.num_verified_tokens, num_accepted)
        if request.first_token_s is None:
            request.first_token_s = now
        if len(request.seqs) > 1:
            self._start_siblings(request)

    def _publish(self, row: PlannedRow, num_tokens: int) -> None:
        if self._target is not None and row.seq.target is row.seat:
            self._target.publish(row.seq, row.seat, num_tokens)

    def _take_prompt_logprobs(self, request: Request, answer: worker_pb2.RowResult) -> None:
        entries = request.prompt_logprobs
        for position, entry in enumerate(answer.prompt_logprobs, start=answer.prompt_logprobs_start):
            if 1 <= position <= len(entries):
                self._add_text(entry)
                entries[position - 1] = entry

    def _add_text(self, entry: sampling_pb2.PositionLogprobs) -> None:
        for candidate in (entry.chosen, *entry.top):
            candidate.text = self._table.text_of(candidate.token_id)

    def _start_siblings(self, request: Request) -> None:
        """The first sample has computed the prompt: the others find it in the cache."""
        for seq in request.seqs[1:]:
            if seq.status is SeqStatus.HELD:
                self._waiting.push(seq)

    # -- ends ---------------------------------------------------------------------------------------------------------

    def _finish(self, seq: Seq, finish: Finish, now: float, last: _Fresh) -> None:
        request = seq.request
        self._release(seq)
        seq.finish = finish
        self._start_siblings(request)
        self._outputs.append(last)
        if all(s.status is SeqStatus.FINISHED for s in request.seqs):
            self._forget(request)
            self._outputs.append(request.completion(now))

    def _fail(self, request: Request, code: StatusCode, message: str) -> None:
        for seq in request.seqs:
            if seq.status is not SeqStatus.FINISHED:
                self._release(seq)
        self._forget(request)
        self._outputs.append(_failed(request.request_id, code, message))

    def _on_non_finite(self, row: PlannedRow) -> None:
        seq = row.seq
        if self._target is not None and seq.target is row.seat:
            self._target.blocks.forget(row.seat.block_ids[: row.seat.num_published])
        position = len(seq.token_ids)
        logger.error("request %s: non-finite logits at position %d", seq.request.request_id, position)
        self._fail(seq.request, StatusCode.INTERNAL, f"non-finite logits at position {position}")

    def _release(self, seq: Seq) -> None:
        """Slots and blocks are free behind the rounds already sent; the queue forgets the seq."""
        if seq.status is SeqStatus.WAITING:
            self._waiting.remove(seq)
        elif seq.status is SeqStatus.RUNNING:
            self._running.remove(seq)
        self._drafter.release(seq)
        if seq.target is not None and self._target is not None:
            self._target.release(seq.target)
            seq.target = None
        seq.status = SeqStatus.FINISHED

    def _forget(self, request: Request) -> None:
        del self._requests[request.request_id]
        request.is_finished = True
        self._num_queued -= request.admitted_s is None

    # -- what comes out -----------------------------------------------------------------------------------------------

    def take_outputs(self) -> list[Output]:
        """What is to be delivered since the last call, in order."""
        outputs: list[Output] = []
        for output in self._outputs:
            if not isinstance(output, _Fresh):
                outputs.append(output)
                continue
            chunk = self._chunk(output)
            if chunk.token_ids or chunk.text:
                outputs.append(chunk)
        self._outputs.clear()
        return outputs

    def _chunk(self, fresh: _Fresh) -> Chunk:
        logprobs = [] if fresh.answer is None else list(fresh.answer.logprobs)[: len(fresh.token_ids)]
        for entry in logprobs:
            self._add_text(entry)
        return Chunk(
            request_id=fresh.seq.request.request_id,
            index=fresh.seq.index,
            offset=fresh.offset,
            token_ids=fresh.token_ids,
            text=fresh.seq.output.take_text(),
            logprobs=logprobs,
        )

    # -- status -------------------------------------------------------------------------------------------------------

    def status(self) -> scheduler_pb2.SchedulerStatus:
        """Counters and gauges; whether the groups answer is for the shell to add."""
        status = scheduler_pb2.SchedulerStatus()
        status.CopyFrom(self._totals)
        status.generation_tokens_total = self._num_generated
        status.accepted_tokens_total = self._num_accepted
        num_running = len({seq.request.request_id for seq in self._running})
        status.num_requests_running = num_running
        status.num_requests_waiting = len(self._requests) - num_running
        if self._target is not None:
            status.num_blocks = self._target.blocks.num_blocks
            status.num_free_blocks = self._target.blocks.num_free
        if self._drafter.engine is not None:
            status.num_draft_blocks = self._drafter.engine.blocks.num_blocks
            status.num_free_draft_blocks = self._drafter.engine.blocks.num_free
        return status

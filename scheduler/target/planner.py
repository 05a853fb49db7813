"""Which seqs the target computes next: continuous batching with chunked prefill, preemption and prefix reuse."""

from bisect import insort
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from operator import attrgetter

from echelon.pb import worker_pb2
from scheduler.config import SchedulerConfig
from scheduler.drafting.speculation import Speculation
from scheduler.engines.engine import EngineView, InFlight, PlannedRow, UnexpectedAnswerError
from scheduler.engines.seat import Seat
from scheduler.requests.queue import WaitingQueue
from scheduler.requests.request import Request, Seq, SeqStatus
from scheduler.target.prefill import Arrivals, Prompt, RoundCost, share_prefill

_by_order = attrgetter("order")


def _may_decode(seq: Seq) -> bool:
    """The seq has one token to compute, its last, and may commit another."""
    seat = seq.target
    return seat is not None and seq.may_step and seq.num_tokens_ahead - seat.num_computed == 1


class TargetPlanner:
    """The seqs that run and those that wait, and the rounds that they become.

    A round holds a row for each seq that decodes, then chunks of prompts (prefill.py), and the drafts that are at
    hand for as many tokens as are left. When a seq finds no block for its next token, the youngest running seq gives
    back its own and waits, before all that arrived later, to be computed anew from its history.
    """

    def __init__(self, config: SchedulerConfig, speculation: Speculation) -> None:
        self._config = config
        self._speculation = speculation
        self.engine: EngineView | None = None
        self.running: list[Seq] = []  # oldest first
        self._waiting = WaitingQueue()
        self._arrivals = Arrivals()
        self._cost = RoundCost()
        self._refusal: tuple[Seq, int] | None = None  # the seq that found too few free blocks, and how many there were
        self.num_queued = 0  # requests that have never run
        self.num_preemptions = 0
        self.num_tokens_looked_up = 0  # in the prefix cache
        self.num_tokens_found = 0

    def attach(self, engine: EngineView) -> None:
        self.engine = engine
        self._cost = RoundCost()

    def detach(self) -> None:
        """The engine is gone; no seq may be left."""
        assert not self.running, "seqs run on an engine that is gone"
        self.engine = None
        self._refusal = None

    def add(self, request: Request) -> None:
        """Queue a request's first seq; its siblings follow when that has computed the prompt (`enqueue`)."""
        self.num_queued += 1
        self._arrivals.add(request.num_prompt_tokens, request.arrived_s)
        self.enqueue(request.seqs[0])

    def enqueue(self, seq: Seq) -> None:
        self._waiting.push(seq)

    def forget(self, request: Request) -> None:
        """The request is over."""
        self.num_queued -= request.admitted_s is None

    def release(self, seq: Seq) -> None:
        """The seq is over: slots and blocks are free behind the rounds already sent."""
        if seq.status is SeqStatus.WAITING:
            self._waiting.remove(seq)
        elif seq.status is SeqStatus.RUNNING:
            self.running.remove(seq)
        if seq.target is not None and self.engine is not None:
            self.engine.release(seq.target)
            seq.target = None
        seq.status = SeqStatus.FINISHED

    def land(self, result: worker_pb2.RoundResult, now: float) -> InFlight:
        """The round that this result answers. Raises UnexpectedAnswerError."""
        if self.engine is None:
            raise UnexpectedAnswerError("a result came from an engine that is not connected")
        record = self.engine.land(result, now)
        self._cost.observe(record.num_tokens, result.run_ns)
        if not record.is_prefill:
            self._speculation.observe_target(
                num_seqs=len(record.rows),
                num_tokens=record.num_tokens,
                num_context=sum(row.start for row in record.rows),
                run_s=record.wall_s,
            )
        return record

    def plan(self, now: float) -> worker_pb2.Round | None:
        """The next round for the target, None while it has enough to do or nothing can run."""
        engine = self.engine
        if engine is None or not (self.running or self._waiting) or not self._may_queue(engine):
            return None
        rows: dict[Seq, PlannedRow] = {}
        num_preemptions = self.num_preemptions
        drafts = self._choose_drafts(now)
        self._plan_decodes(engine, rows, drafts)
        if self.num_preemptions == num_preemptions and self._admit(engine, now) and not rows:
            # Who was to wait for drafts would now wait for the newcomers' prompts.
            drafts = self._choose_drafts(now)
            self._plan_decodes(engine, rows, drafts)
        self._plan_prefills(engine, rows, now, sum(map(len, drafts.values())))
        self._plan_drafts(engine, rows, drafts)
        if not rows:
            return None
        for row in rows.values():
            self._mark_in_flight(row)
        return engine.launch(list(rows.values()), now)

    def _may_queue(self, engine: EngineView) -> bool:
        if self._speculation.target_waits:
            return False
        if not engine.in_flight:
            return True
        # A second round goes behind one that decodes (prefill.py says why), and none while drafts may come: what is
        # verified next depends on the verdict.
        return (
            len(engine.in_flight) < self._config.max_rounds_in_flight
            and not engine.in_flight[-1].is_prefill
            and not self._speculation.expects_drafts(self.running)
        )

    def _choose_drafts(self, now: float) -> dict[Seq, Sequence[int]]:
        """Drafts to verify for each seq that decodes in this round; a seq that waits for drafts is left out."""
        decoding = [seq for seq in self.running if _may_decode(seq)]
        num_prefilling = sum(seq.num_uncomputed for seq in self.running if seq.may_step) - len(decoding)
        return self._speculation.choose(decoding, now, num_other_tokens=num_prefilling, num_waiting=self.num_queued)

    def _plan_decodes(self, engine: EngineView, rows: dict[Seq, PlannedRow], seqs: Iterable[Seq]) -> None:
        for seq in seqs:
            seat = seq.target
            if seat is not None and self._make_room(engine, seq, seat, rows):
                rows[seq] = PlannedRow(seq=seq, seat=seat, start=seat.num_computed, chunk_len=1)

    def _make_room(self, engine: EngineView, seq: Seq, seat: Seat, rows: dict[Seq, PlannedRow]) -> bool:
        """A block for the seq's next token, taken from the youngest seq if need be (possibly itself)."""
        while not engine.grow(seat, seat.num_computed + 1):
            victim = self.running[-1]
            self._preempt(engine, victim)
            rows.pop(victim, None)
            if victim is seq:
                return False
        return True

    def _preempt(self, engine: EngineView, seq: Seq) -> None:
        assert seq.target is not None, "a running seq has a seat"
        engine.release(seq.target)
        seq.target = None
        self._speculation.release(seq)
        self.running.remove(seq)
        self._waiting.push(seq)
        self.num_preemptions += 1

    def _admit(self, engine: EngineView, now: float) -> bool:
        """Seqs that wait begin to run, as many as there is room for; whether any did."""
        num_running = len(self.running)
        limit = min(self._config.max_num_seqs, self._budget(engine))
        while (seq := self._waiting.first()) is not None:
            # A preempted seq with a row on its way comes back with the token that the row commits.
            if seq.num_rows_in_flight or engine.num_free_slots == 0 or len(self.running) >= limit:
                break
            if self.running and self._refusal == (seq, engine.blocks.num_free):
                break
            if not self._seat(engine, seq):
                self._refusal = (seq, engine.blocks.num_free)
                break
            self._waiting.remove(seq)
            seq.status = SeqStatus.RUNNING
            insort(self.running, seq, key=_by_order)
            if seq.request.admitted_s is None:
                seq.request.admitted_s = now
                self.num_queued -= 1
        return len(self.running) > num_running

    def _seat(self, engine: EngineView, seq: Seq) -> bool:
        """A slot and the blocks of its known prefix, if there is room for the first chunk behind it too."""
        blocks = engine.blocks
        reuse = not (seq.sampling.HasField("prompt_logprobs") and seq.request.wants_prompt_logprobs)
        found = engine.find_prefix(seq) if reuse else []
        num_cached = len(found) * blocks.block_size
        first_chunk = min(len(seq.token_ids) - num_cached, self._budget(engine))
        # A few blocks in reserve, so that the newcomer is not preempted by the next decode steps.
        watermark = 1 + len(self.running) // 8 if self.running else 0
        needed = blocks.num_blocks_for(first_chunk) + blocks.num_idle_among(found) + watermark
        if needed > blocks.num_free and self.running:
            return False
        blocks.hold(found)
        seq.target = Seat(slot=engine.take_slot(), block_ids=found, num_computed=num_cached, num_published=len(found))
        seq.num_reused = num_cached
        if seq.request.admitted_s is None:
            seq.request.num_cached_tokens = num_cached
        if reuse:
            self.num_tokens_looked_up += len(seq.token_ids)
            self.num_tokens_found += num_cached
        return True

    def _plan_prefills(self, engine: EngineView, rows: dict[Seq, PlannedRow], now: float, num_drafts: int) -> None:
        prefilling = [
            seq for seq in self.running if seq not in rows and seq.may_step and not self._speculation.holds(seq)
        ]
        if not prefilling:
            return
        budget = self._budget(engine) - len(rows)
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

    def _plan_drafts(
        self, engine: EngineView, rows: dict[Seq, PlannedRow], chosen: Mapping[Seq, Sequence[int]]
    ) -> None:
        """Add the chosen drafts to decode rows, as far as tokens and free blocks go: they preempt nobody."""
        budget = self._budget(engine) - sum(row.chunk_len for row in rows.values())
        for seq, row in rows.items():
            wanted = chosen.get(seq)
            if not wanted:
                continue
            room = engine.room_for(row.seat) - row.start - 1
            # Padding of the draft's vocabulary may reach beyond the target's.
            known = list(takewhile(lambda token_id: token_id < engine.info.vocab_size, wanted))
            drafts = known[: max(0, min(budget, room))]
            if drafts and engine.grow(row.seat, row.start + 1 + len(drafts)):
                row.drafts = drafts
                budget -= len(drafts)

    def _mark_in_flight(self, row: PlannedRow) -> None:
        seq = row.seq
        seq.num_rows_in_flight += 1
        if row.drafts:
            seq.num_verifying = len(row.drafts)
        elif row.start + row.chunk_len == seq.num_tokens_ahead:
            row.num_pending = 1
            seq.num_pending += 1

    def _budget(self, engine: EngineView) -> int:
        return min(self._config.max_num_batched_tokens, engine.info.max_num_batched_tokens)

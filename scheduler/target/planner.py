"""Which seqs the target computes next: continuous batching with chunked prefill, preemption and prefix reuse."""

from bisect import insort
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from operator import attrgetter

from echelon.pb import worker_pb2
from scheduler.config import SchedulerConfig
from scheduler.engines.engine import EngineView, InFlight, NoRoomError, PlannedRow
from scheduler.engines.seat import Seat
from scheduler.errors import UnexpectedAnswerError
from scheduler.requests.queue import WaitingQueue
from scheduler.requests.request import CachedTokens, Request, Seq, SeqStatus
from scheduler.target.draft_supply import DraftSupply
from scheduler.target.prefill import Arrivals, Prompt, share_prefill
from scheduler.target.state import TargetState

_by_order = attrgetter("seq.order")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """Of the planner."""

    seqs_per_reserve: int = 8  # a newcomer leaves one block free, plus one per this many running seqs; not measured
    draft_share: int = 2  # drafts may take at most the token budget divided by this from prompts; not measured


_TUNING = Tuning()


class TargetPlanner:
    """The running and the waiting seqs, and the rounds planned from them.

    A round holds a row for each seq that decodes, then chunks of prompts (prefill.py). The tokens left go to the drafts
    at hand. When there is no free block for a seq's next token, the youngest running seq is preempted: it returns its
    blocks and waits, ahead of all that arrived later, to be recomputed from its history.
    """

    def __init__(self, config: SchedulerConfig, drafts: DraftSupply) -> None:
        self._config = config
        self._drafts = drafts
        self.engine: EngineView | None = None
        self._states: dict[Seq, TargetState] = {}  # of all seqs that have not ended
        self.running: list[TargetState] = []  # oldest first
        self._waiting = WaitingQueue()
        self._arrivals = Arrivals()
        self._fetching: list[TargetState] = []  # those that wait for blocks from other tiers
        self._refusal: tuple[Seq, int] | None = None  # the seq that found too few free blocks, and how many there were
        self.num_queued = 0  # requests that have never run
        self.num_preemptions = 0
        self.num_tokens_looked_up = 0  # in the prefix cache
        self.tokens_found = CachedTokens()  # of them

    def attach(self, engine: EngineView) -> None:
        self.engine = engine

    def detach(self) -> None:
        """The engine is gone; no seq may be left on it."""
        assert not self.running, "seqs run on an engine that is gone"
        self.engine = None
        self._refusal = None

    def add(self, request: Request) -> list[TargetState]:
        """Queue a request's first seq. Its siblings follow when that seq has computed the prompt (`enqueue`). Returns
        the states of all of them."""
        states = [TargetState(seq=seq) for seq in request.seqs]
        self._states.update((state.seq, state) for state in states)
        self.num_queued += 1
        self._arrivals.add(request.num_prompt_tokens, request.arrived_s)
        self.enqueue(request.seqs[0])
        return states

    def enqueue(self, seq: Seq) -> None:
        seq.status = SeqStatus.WAITING
        self._waiting.push(seq)

    def forget(self, request: Request) -> None:
        """The request has ended."""
        self.num_queued -= request.admitted_s is None

    def release(self, seq: Seq) -> None:
        """The seq has ended. Its slots and blocks are free after the rounds already sent."""
        state = self._states.pop(seq)
        if seq.status is SeqStatus.WAITING:
            self._waiting.remove(seq)
        elif seq.status is SeqStatus.RUNNING:
            self.running.remove(state)
        elif seq.status is SeqStatus.FETCHING:
            self._fetching.remove(state)
        self._leave_fetch(state)
        if state.seat is not None and self.engine is not None:
            self.engine.release(state.seat)
            state.seat = None
        seq.status = SeqStatus.FINISHED

    def land(self, result: worker_pb2.RoundResult, now: float) -> InFlight:
        """The round that this result answers; nothing is committed yet. Raises UnexpectedAnswerError."""
        if self.engine is None:
            raise UnexpectedAnswerError("a result came from an engine that is not connected")
        record = self.engine.land(result, now)
        for row, answer in record.answered:
            state = self._states.get(row.seq)
            if state is not None:
                state.land(row, answer.num_accepted_tokens if row.drafts else 0)
        return record

    def publish(self, row: PlannedRow, num_tokens: int) -> None:
        """The first `num_tokens` tokens of the row's seq are committed: let other seqs find their KV."""
        if self.engine is not None and not row.seat.is_released:
            self.engine.publish(row.seq, row.seat, num_tokens)

    def unpublish(self, row: PlannedRow) -> None:
        """Let no seq find what the row's seat holds."""
        if self.engine is not None and not row.seat.is_released:
            self.engine.unpublish(row.seat)

    def plan(self, now: float) -> worker_pb2.Round | None:
        """The next round for the target, None while it has enough to do or nothing can run."""
        engine = self.engine
        if engine is None:
            return None
        engine.expire_fetches(now)
        self._end_fetches()
        if not (self.running or self._waiting) or not self._may_queue(engine):
            return None
        rows: dict[TargetState, PlannedRow] = {}
        num_preemptions = self.num_preemptions
        drafts = self._choose_drafts(now)
        self._plan_decodes(engine, rows, drafts)
        if self.num_preemptions == num_preemptions and self._admit(engine, now) and not rows:
            # Seqs that should wait for drafts would now wait for the newcomers' prompts.
            drafts = self._choose_drafts(now)
            self._plan_decodes(engine, rows, drafts)
        self._plan_prefills(engine, rows, now, sum(map(len, drafts.values())))
        self._plan_drafts(engine, rows, drafts)
        if not rows:
            return None
        for state, row in rows.items():
            state.send(row)
        return engine.launch(list(rows.values()), now)

    def _may_queue(self, engine: EngineView) -> bool:
        if self._drafts.target_waits:
            return False
        if not engine.in_flight:
            return True
        # A second round may be queued after one that only decodes (prefill.py says why), but not while drafts may come:
        # the verdict decides what is verified next.
        return (
            len(engine.in_flight) < self._config.max_rounds_in_flight
            and not engine.in_flight[-1].is_prefill
            and not self._drafts.expects_drafts(self.running)
        )

    def _choose_drafts(self, now: float) -> dict[TargetState, Sequence[int]]:
        """Drafts to verify for each seq that decodes in this round. A seq that waits for drafts is left out."""
        decoding = [state for state in self.running if state.may_decode]
        num_prefilling = sum(state.num_uncomputed for state in self.running if state.may_step) - len(decoding)
        return self._drafts.choose(decoding, now, num_other_tokens=num_prefilling, num_waiting=self.num_queued)

    def _plan_decodes(
        self, engine: EngineView, rows: dict[TargetState, PlannedRow], states: Iterable[TargetState]
    ) -> None:
        for state in states:
            seat = state.seat
            if seat is not None and self._make_room(engine, state, seat, rows):
                rows[state] = PlannedRow(seq=state.seq, seat=seat, start=seat.num_computed, chunk_len=1)

    def _make_room(
        self, engine: EngineView, state: TargetState, seat: Seat, rows: dict[TargetState, PlannedRow]
    ) -> bool:
        """Take a block for the seq's next token: if necessary one that was fetched for a seq that does not run yet, or
        one of the youngest seq (possibly the seq itself)."""
        while not engine.grow(seat, seat.num_computed + 1):
            if self._let_go(self._fetching + self._others_holding(state)):
                continue
            victim = self.running[-1]
            self._preempt(engine, victim)
            rows.pop(victim, None)
            if victim is state:
                return False
        return True

    def _preempt(self, engine: EngineView, state: TargetState) -> None:
        assert state.seat is not None, "a running seq has a seat"
        engine.release(state.seat)
        state.seat = None
        state.has_fetched = False
        self._drafts.release(state.seq)
        self.running.remove(state)
        self.enqueue(state.seq)
        self.num_preemptions += 1

    def _admit(self, engine: EngineView, now: float) -> bool:
        """Start as many waiting seqs as there is room for. Returns whether any started."""
        num_running = len(self.running)
        limit = min(self._config.max_num_seqs, self._budget(engine))
        while (seq := self._waiting.first()) is not None:
            state = self._states[seq]
            # A preempted seq with a row in flight comes back with the token that the row commits.
            if state.num_rows_in_flight or engine.num_free_slots == 0 or len(self.running) >= limit:
                break
            if self.running and self._refusal == (seq, engine.blocks.num_free):
                break
            try:
                if self._fetch(engine, state, now):
                    continue
                self._seat(engine, state)
            except NoRoomError:
                if self._let_go(self._others_holding(state)):
                    continue
                self._refusal = (seq, engine.blocks.num_free)
                break
            self._waiting.remove(seq)
            seq.status = SeqStatus.RUNNING
            insort(self.running, state, key=_by_order)
            if seq.request.admitted_s is None:
                seq.request.admitted_s = now
                self.num_queued -= 1
        return len(self.running) > num_running

    def _fetch(self, engine: EngineView, state: TargetState, now: float) -> bool:
        """Begin to bring more of the seq's prefix to the device, if that pays. Returns whether the seq waits for it;
        others may start meanwhile. Raises NoRoomError."""
        if state.has_fetched or not state.may_reuse:
            return False
        num_spare = self._reserve() + 1  # for the first chunk after it
        fetch = engine.fetch(state.seq, now, num_spare=num_spare, takes_part=not self.running)
        state.has_fetched = True
        state.fetch = fetch
        if fetch is None or fetch.is_over:  # over: nothing of it can come, so no answer would end the wait
            self._leave_fetch(state)
            return False
        self._waiting.remove(state.seq)
        state.seq.status = SeqStatus.FETCHING
        self._fetching.append(state)
        self._drafts.prefetch(state.seq, now)
        return True

    def _end_fetches(self) -> None:
        """Seqs whose blocks have come, or will not come, wait for a slot like others."""
        for state in [state for state in self._fetching if state.fetch is None or state.fetch.is_over]:
            self._fetching.remove(state)
            self.enqueue(state.seq)

    def _leave_fetch(self, state: TargetState) -> None:
        if state.fetch is not None and self.engine is not None and self.engine.tiers is not None:
            self.engine.tiers.fetching.leave(state.fetch)
        state.fetch = None

    def _others_holding(self, state: TargetState) -> list[TargetState]:
        """Waiting seqs whose blocks have been fetched and are kept for them."""
        if self.engine is None or self.engine.tiers is None:
            return []
        waiting = [self._states[seq] for seq in self._waiting]
        return [other for other in waiting if other is not state and other.fetch is not None]

    def _let_go(self, states: list[TargetState]) -> bool:
        """Blocks that were fetched for these seqs may be evicted, since another finds too few. Returns whether there
        are any."""
        holding = [state for state in states if state.fetch is not None]
        for state in holding:
            self._leave_fetch(state)
            state.has_fetched = False
        return bool(holding)

    def _reserve(self) -> int:
        """Blocks to keep free, so that the next decode steps do not preempt a newcomer."""
        return 1 + len(self.running) // _TUNING.seqs_per_reserve if self.running else 0

    def _seat(self, engine: EngineView, state: TargetState) -> None:
        """Take a slot and the blocks of the known prefix. Raises NoRoomError if there is none for the first chunk after
        it."""
        seq, blocks = state.seq, engine.blocks
        reuse = state.may_reuse
        found = engine.find_prefix(seq) if reuse else []
        num_cached = len(found) * blocks.block_size
        first_chunk = min(len(seq.token_ids) - num_cached, self._budget(engine))
        needed = blocks.num_blocks_for(first_chunk) + blocks.num_idle_among(found) + self._reserve()
        if needed > blocks.num_free and (self.running or self._others_holding(state)):
            raise NoRoomError
        engine.take_prefix(seq, found)
        state.seat = Seat(slot=engine.take_slot(), block_ids=found, num_computed=num_cached, num_published=len(found))
        state.num_reused = num_cached
        cached = state.cached_tokens(num_cached, blocks.block_size)
        if seq.request.admitted_s is None:
            seq.request.cached = cached
        self._leave_fetch(state)
        if reuse:
            self.num_tokens_looked_up += len(seq.token_ids)
            self.tokens_found += cached

    def _plan_prefills(
        self, engine: EngineView, rows: dict[TargetState, PlannedRow], now: float, num_drafts: int
    ) -> None:
        prefilling = [
            state for state in self.running if state not in rows and state.may_step and not self._drafts.holds(state)
        ]
        if not prefilling:
            return
        budget = self._budget(engine) - len(rows)
        shares = share_prefill(
            [Prompt(state.num_uncomputed, state.num_tokens_ahead - state.num_reused) for state in prefilling],
            budget - min(num_drafts, budget // _TUNING.draft_share),
            shortest=self._arrivals.shortest(now),
            knee=engine.cost.knee,
        )
        for state, share in zip(prefilling, shares, strict=True):
            seat = state.seat
            if seat is None or share == 0 or not self._make_room(engine, state, seat, rows):
                continue
            chunk_len = min(share, engine.room_for(seat) - seat.num_computed)
            engine.grow(seat, seat.num_computed + chunk_len)
            rows[state] = PlannedRow(seq=state.seq, seat=seat, start=seat.num_computed, chunk_len=chunk_len)

    def _plan_drafts(
        self, engine: EngineView, rows: dict[TargetState, PlannedRow], chosen: Mapping[TargetState, Sequence[int]]
    ) -> None:
        """Add the chosen drafts to decode rows, as far as tokens and free blocks allow; drafts preempt no seq."""
        budget = self._budget(engine) - sum(row.chunk_len for row in rows.values())
        for state, row in rows.items():
            wanted = chosen.get(state)
            if not wanted:
                continue
            room = engine.room_for(row.seat) - row.start - 1
            # Padding of the draft's vocabulary may reach beyond the target's.
            known = list(takewhile(lambda token_id: token_id < engine.info.vocab_size, wanted))
            drafts = known[: max(0, min(budget, room))]
            if drafts and engine.grow(row.seat, row.start + 1 + len(drafts)):
                row.drafts = drafts
                budget -= len(drafts)

    def _budget(self, engine: EngineView) -> int:
        return min(self._config.max_num_batched_tokens, engine.info.max_num_batched_tokens)

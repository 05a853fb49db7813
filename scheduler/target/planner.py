"""Which seqs the target computes next: continuous batching with chunked prefill, preemption and prefix reuse."""

from bisect import insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter

from echelon.pb import worker_pb2
from scheduler.config import SchedulerConfig
from scheduler.engines.engine import EngineView, InFlight, NoRoomError
from scheduler.engines.slot import Slot
from scheduler.errors import UnexpectedAnswerError
from scheduler.requests.queue import WaitingQueue
from scheduler.requests.request import CachedTokens, Request, Seq, SeqStatus
from scheduler.target.background import BackgroundShare
from scheduler.target.draft_rows import add_drafts
from scheduler.target.draft_supply import DraftSupply
from scheduler.target.fetches import leave_fetch, let_go
from scheduler.target.prefill import Arrivals, share_prompts
from scheduler.target.row import TargetRow
from scheduler.target.state import TargetState

_by_order = attrgetter("seq.order")
_Rows = dict[TargetState, TargetRow]


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
    blocks and waits, ahead of all that arrived later, to be recomputed from its history. Background seqs count as
    younger than all others, and are also preempted where another seq finds no slot or too few blocks to start.
    """

    def __init__(self, config: SchedulerConfig, drafts: DraftSupply) -> None:
        self._config = config
        self._drafts = drafts
        self.engine: EngineView[TargetRow] | None = None
        self._states: dict[Seq, TargetState] = {}  # of all seqs that have not ended
        self.running: list[TargetState] = []  # oldest first, background last
        self._waiting = WaitingQueue()
        self._arrivals = Arrivals()
        self._share = BackgroundShare(config.max_live_slowdown)
        self._fetching: list[TargetState] = []  # those that wait for blocks from other tiers
        self._refusal: tuple[Seq, int] | None = None  # the seq that found too few free blocks, and how many there were
        self.num_queued = 0  # requests that have never run, apart from background ones
        self.num_preemptions = 0
        self.num_tokens_looked_up = 0  # in the prefix cache
        self.tokens_found = CachedTokens()  # of them

    def attach(self, engine: EngineView[TargetRow]) -> None:
        self.engine = engine

    def detach(self, now: float, *, has_died: bool) -> set[Request]:
        """The engine is gone, and its seqs wait. Returns the requests that were computed each time this happened."""
        self.engine = None
        self._refusal = None
        for state in self.running + self._fetching:
            self._drafts.release(state.seq)
            self.enqueue(state.seq)
        self.running, self._fetching = [], []
        for state in self._states.values():
            state.forget_engine(now, has_died=has_died)
        return {state.seq.request for state in self._states.values() if state.is_condemned}

    def add(self, request: Request) -> list[TargetState]:
        """Queue a request's first seq. Its siblings follow when that seq has computed the prompt (`enqueue`). Returns
        the states of all of them."""
        states = [TargetState(seq=seq) for seq in request.seqs]
        self._states.update((state.seq, state) for state in states)
        self.num_queued += not request.is_background
        if not request.is_background:
            self._arrivals.add(request.num_prompt_tokens, request.arrived_s)
        self.enqueue(request.seqs[0])
        return states

    def enqueue(self, seq: Seq) -> None:
        seq.status = SeqStatus.WAITING
        self._waiting.push(seq)

    def forget(self, request: Request) -> None:
        """The request has ended."""
        self.num_queued -= request.admitted_s is None and not request.is_background

    def release(self, seq: Seq) -> None:
        """The seq has ended. Its slots and blocks are free after the rounds already sent."""
        state = self._states.pop(seq)
        if seq.status is SeqStatus.WAITING:
            self._waiting.remove(seq)
        elif seq.status is SeqStatus.RUNNING:
            self.running.remove(state)
        elif seq.status is SeqStatus.FETCHING:
            self._fetching.remove(state)
        leave_fetch(self.engine, state)
        if state.slot is not None and self.engine is not None:
            self.engine.release(state.slot)
            state.slot = None
        seq.status = SeqStatus.FINISHED

    def complete(self, result: worker_pb2.RoundResult, now: float) -> InFlight[TargetRow]:
        """The round that this result answers; nothing is committed yet. Raises UnexpectedAnswerError."""
        if self.engine is None:
            raise UnexpectedAnswerError("a result came from an engine that is not connected")
        record = self.engine.complete(result, now)
        for row, answer in record.answered:
            state = self._states.get(row.seq)
            if state is not None:
                state.complete(row, answer.num_accepted_tokens if row.drafts else 0)
        return record

    def publish(self, row: TargetRow, num_tokens: int) -> None:
        """The first `num_tokens` tokens of the row's seq are committed: let other seqs find their KV."""
        if self.engine is not None and not row.slot.is_released:
            self.engine.publish(row.seq, row.slot, num_tokens)

    def unpublish(self, row: TargetRow) -> None:
        """Let no seq find what the row's slot holds."""
        if self.engine is not None and not row.slot.is_released:
            self.engine.unpublish(row.slot)

    def plan(self, now: float) -> worker_pb2.Round | None:
        """The next round for the target, None while it has enough to do or nothing can run."""
        engine = self.engine
        if engine is None:
            return None
        engine.expire_fetches(now)
        self._end_fetches()
        if not (self.running or self._waiting) or not self._may_queue(engine):
            return None
        rows: _Rows = {}
        num_preemptions = self.num_preemptions
        drafts = self._choose_drafts(now)
        self._plan_decodes(engine, rows, drafts)
        if self.num_preemptions == num_preemptions and self._admit(engine, now, rows) and not rows:
            # Seqs that should wait for drafts would now wait for the newcomers' prompts.
            drafts = self._choose_drafts(now)
            self._plan_decodes(engine, rows, drafts)
        budget = self._budget(engine) - len(rows)
        budget -= min(sum(map(len, drafts.values())), budget // _TUNING.draft_share)
        self._plan_prefills(engine, rows, self.foremost, now, budget)
        add_drafts(engine, rows, drafts, budget=self._budget(engine))
        self._plan_background(engine, rows, now)
        if not rows:
            return None
        for state, row in rows.items():
            state.send(row)
        return engine.launch(list(rows.values()), now)

    @property
    def foremost(self) -> list[TargetState]:
        """The running seqs that others do not go before: all but background ones, or all if there are no others."""
        if not self.running or self.running[0].is_background or not self.running[-1].is_background:
            return self.running
        return [state for state in self.running if not state.is_background]

    def _plan_background(self, engine: EngineView[TargetRow], rows: _Rows, now: float) -> None:
        """Rows of background seqs beside others, as few as these hardly notice. They have no drafts."""
        background = self.running[len(self.foremost) :]
        self._drafts.let_go(background)
        if not background or not rows:
            return  # others that wait for drafts, or for a round in flight, would wait for a whole round more
        num_others = sum(row.num_tokens for row in rows.values())
        granted = min(self._share.grant(num_others, engine.cost), self._budget(engine) - num_others)
        decoding = [state for state in background if state.may_decode]
        self._plan_decodes(engine, rows, list(self._share.in_turns(decoding))[:granted])
        self._plan_prefills(engine, rows, background, now, granted - sum(state in rows for state in decoding))
        self._share.spend(num_others, sum(row.num_tokens for row in rows.values()) - num_others, engine.cost)

    def _may_queue(self, engine: EngineView[TargetRow]) -> bool:
        if self._drafts.target_waits:
            return False
        if not engine.in_flight:
            return True
        # A second round may be queued after one that only decodes (prefill.py says why), but not while drafts may come:
        # the verdict decides what is verified next.
        return (
            len(engine.in_flight) < self._config.max_rounds_in_flight
            and not engine.in_flight[-1].is_prefill
            and not self._drafts.expects_drafts(self.foremost)
        )

    def _choose_drafts(self, now: float) -> dict[TargetState, Sequence[int]]:
        """Drafts to verify for each seq that decodes in this round. A seq that waits for drafts is left out."""
        running = self.foremost
        decoding = [state for state in running if state.may_decode]
        num_prefilling = sum(state.num_uncomputed for state in running if state.may_step) - len(decoding)
        return self._drafts.choose(decoding, now, num_other_tokens=num_prefilling, num_waiting=self.num_queued)

    def _plan_decodes(self, engine: EngineView[TargetRow], rows: _Rows, states: Iterable[TargetState]) -> None:
        for state in states:
            slot = state.slot
            if slot is not None and self._make_room(engine, state, slot, rows):
                rows[state] = TargetRow(seq=state.seq, slot=slot, start=slot.num_computed, chunk_len=1)

    def _make_room(self, engine: EngineView[TargetRow], state: TargetState, slot: Slot, rows: _Rows) -> bool:
        """Take a block for the seq's next token: if necessary one that was fetched for a seq that does not run yet, or
        one of the youngest seq (possibly the seq itself). Returns False if there is none, or none yet."""
        while not engine.grow(slot, slot.num_computed + 1):
            if let_go(self.engine, self._fetching + self._others_holding(state)):
                continue
            if engine.num_blocks_to_come:
                return False
            victim = self.running[-1]
            self._preempt(engine, victim)
            rows.pop(victim, None)
            if victim is state:
                return False
        return True

    def _make_way(self, engine: EngineView[TargetRow], seq: Seq, rows: _Rows) -> bool:
        """Preempt a background seq for one that is none. Returns whether there was any."""
        victim = self.running[-1] if self.running else None
        if victim is None or seq.request.is_background or not victim.is_background:
            return False
        self._preempt(engine, victim)
        rows.pop(victim, None)
        return True

    def _preempt(self, engine: EngineView[TargetRow], state: TargetState) -> None:
        assert state.slot is not None, "a running seq has a slot"
        engine.release(state.slot)
        state.slot = None
        state.has_fetched = False
        self._drafts.release(state.seq)
        self.running.remove(state)
        self.enqueue(state.seq)
        self.num_preemptions += 1

    def _admit(self, engine: EngineView[TargetRow], now: float, rows: _Rows) -> bool:
        """Start as many waiting seqs as there is room for. Returns whether any started."""
        if engine.is_settling(now):
            return False
        num_running = len(self.running)
        limit = min(self._config.max_num_seqs, self._budget(engine))
        while (seq := self._waiting.first(other.seq for other in self.running)) is not None:
            state = self._states[seq]
            # A preempted seq with a row in flight comes back with the token that the row commits.
            is_full = engine.num_free_slots == 0 or len(self.running) >= limit
            if state.num_rows_in_flight or (is_full and not self._make_way(engine, seq, rows)):
                break
            is_refused = bool(self.running) and self._refusal == (seq, engine.blocks.num_free)
            if is_refused or (state.is_suspect and any(other.is_suspect for other in self.running)):
                break
            try:
                if self._fetch(engine, state, now):
                    continue
                cached = self._give_slot(engine, state)
            except NoRoomError:
                if let_go(self.engine, self._others_holding(state)) or self._make_way(engine, seq, rows):
                    continue
                self._refusal = (seq, engine.blocks.num_free)
                break
            self._waiting.start(seq)
            seq.status = SeqStatus.RUNNING
            insort(self.running, state, key=_by_order)
            self.num_queued -= seq.request.admit(seq, now, cached) and not seq.request.is_background
        return len(self.running) > num_running

    def _fetch(self, engine: EngineView[TargetRow], state: TargetState, now: float) -> bool:
        """Begin to bring more of the seq's prefix to the device, if that pays. Returns whether the seq waits for it;
        others may start meanwhile. Raises NoRoomError."""
        if state.has_fetched or not state.may_reuse or engine.spilling.takes(state.seq):
            return False
        num_spare = self._reserve() + 1  # for the first chunk after it
        fetch = engine.fetch(state.seq, now, num_spare=num_spare, takes_part=not self.running)
        state.has_fetched = True
        state.fetch = fetch
        if fetch is None or fetch.is_over:  # over: nothing of it can come, so no answer would end the wait
            leave_fetch(self.engine, state)
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

    def _others_holding(self, state: TargetState) -> list[TargetState]:
        """Waiting seqs whose blocks have been fetched and are kept for them."""
        waiting = map(self._states.__getitem__, self._waiting if self.engine and self.engine.tiers else ())
        return [other for other in waiting if other is not state and other.fetch is not None]

    def _reserve(self) -> int:
        """Blocks to keep free, so that the next decode steps do not preempt a newcomer."""
        return 1 + len(self.running) // _TUNING.seqs_per_reserve if self.running else 0

    def _give_slot(self, engine: EngineView[TargetRow], state: TargetState) -> CachedTokens:
        """Take a slot and the blocks of the known prefix. Returns what the prefix saves.

        Raises NoRoomError if there is no room for the first chunk after it."""
        seq, blocks = state.seq, engine.blocks
        reuse = state.may_reuse
        in_host, found = engine.find_start(seq, reuse=reuse)
        num_cached = (len(in_host) + len(found)) * blocks.block_size
        budget = min(self._budget(engine), engine.prompt_budget)
        first_chunk = engine.spilling.first_chunk(seq, min(len(seq.token_ids) - num_cached, budget))
        needed = blocks.num_blocks_for(first_chunk) + blocks.num_idle_among(found) + self._reserve()
        if needed > blocks.num_free and (self.running or engine.num_blocks_to_come or self._others_holding(state)):
            raise NoRoomError
        state.slot = engine.begin(seq, found, in_host)
        state.num_reused = num_cached
        cached = state.cached_tokens(num_cached, blocks.block_size)
        leave_fetch(self.engine, state)
        if reuse:
            self.num_tokens_looked_up += len(seq.token_ids)
            self.tokens_found += cached
        return cached

    def _plan_prefills(
        self, engine: EngineView[TargetRow], rows: _Rows, states: Sequence[TargetState], now: float, budget: int
    ) -> None:
        """Chunks of the prompts of these seqs, of `budget` tokens at most."""
        may_run = [state for state in states if state.slot is not None and state.may_step and state not in rows]
        prefilling = [state for state in may_run if not self._drafts.holds(state)]
        if not prefilling or budget <= 0:
            return
        if prefilling[0].is_background:
            budget = self._share.prompt_budget(budget, engine.cost.knee)
        shares = share_prompts(
            prefilling, min(budget, engine.prompt_budget), shortest=self._arrivals.shortest(now), knee=engine.cost.knee
        )
        for state, share in zip(prefilling, shares, strict=True):
            slot = state.slot
            if slot is None or share == 0 or not self._make_room(engine, state, slot, rows):
                continue
            chunk_len = min(share, engine.room_for(slot) - slot.num_computed)
            if chunk_len < share // 2 and engine.num_blocks_to_come:
                continue  # a moment later there is room for more of it
            engine.grow(slot, slot.num_computed + chunk_len)
            rows[state] = TargetRow(seq=state.seq, slot=slot, start=slot.num_computed, chunk_len=chunk_len)

    def _budget(self, engine: EngineView[TargetRow]) -> int:
        return min(self._config.max_num_batched_tokens, engine.info.max_num_batched_tokens)

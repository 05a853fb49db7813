"""A scheduler core whose engines and messages take simulated time: the pipeline as it would run, without a real clock.

Everything happens at scripted times, so a repeated run is the same. A message takes `delay_s()` each way; messages of
one engine keep their order, those of two engines overtake each other. A target round takes `target_s(tokens)`, a step
of a draft round `draft_s(rows)`.
"""

from collections import deque
from collections.abc import Callable
from functools import partial
from heapq import heappop, heappush
from itertools import count
from typing import Any

from echelon.pb import worker_pb2
from tests.helpers.fake_group import FakeEngine
from tests.helpers.scheduler_sim import Simulation

OnResult = Callable[[worker_pb2.RoundResult], None]


class _Lane:
    """One engine: rounds arrive, wait for their turn and run, and their results travel back."""

    def __init__(self, engine: FakeEngine, seconds: Callable[[worker_pb2.Round], float]) -> None:
        self.engine = engine
        self.seconds = seconds
        self.waiting: deque[worker_pb2.Round] = deque()
        self.is_busy = False
        self.last_arrival = 0.0
        self.last_answer = 0.0
        self.busy_s = 0.0
        self.life = 0  # number of the connection: results of an earlier one are dropped


class TimedSimulation(Simulation):
    """Use `run_timed` instead of `run`."""

    def __init__(
        self,
        *,
        target_s: Callable[[int], float] = lambda num_tokens: 0.1,
        draft_s: Callable[[int], float] = lambda num_rows: 0.009,
        delay_s: Callable[[], float] = lambda: 0.0004,
        may_wait: bool = False,
        looks_up: bool = False,
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        self._delay_s = delay_s
        self._looks_up = looks_up  # drafts may come from lookup instead of the draft model
        self.may_wait = may_wait  # the target may be idle although no seq is held: the serial pipeline
        self.num_in_flight = 0  # target rounds
        self._said: float | None = None  # when a waiting target has to continue at the latest
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._number = count()
        self.target_lane = _Lane(self.target, lambda message: target_s(_num_tokens(message)))
        assert self.draft is not None, "a timed simulation has a draft engine"
        self.draft_lane = _Lane(
            self.draft, lambda message: draft_s(len(message.rows)) * (_num_steps(message) + _chunk_steps(message))
        )

    def at(self, time: float, event: Callable[[], None]) -> None:
        heappush(self._events, (time, next(self._number), event))

    def run_timed(self) -> None:
        """Runs until nothing is left to happen."""
        self._send()
        while self._step():
            pass
        assert self.core.num_requests == 0, f"stuck with {self.core.num_requests} requests at {self.now}"

    def lose_draft(self) -> None:
        self.core.disconnect_draft()
        self.draft_lane.life += 1
        self.draft_lane.waiting.clear()
        self.draft_lane.is_busy = False

    def bring_draft_back(self) -> None:
        assert self.draft is not None
        self.draft.reset()
        self.draft_lane.last_arrival = self.draft_lane.last_answer = self.now
        self.core.connect_draft(self.draft.info, self.draft.incarnation)

    def _step(self) -> bool:
        release = self.core.next_release()
        if self._events and (release is None or self._events[0][0] <= release):
            self.now, _, event = heappop(self._events)
            event()
        elif release is not None:
            assert release > self.now, "a seq is held although its time is up"
            self.now = release
        else:
            return False
        self._send()
        return True

    def _check_drafts(self, message: worker_pb2.Round) -> None:
        """Checks that every verified draft is what the draft model chooses after exactly this history. A draft of an
        abandoned chain would nearly always differ."""
        assert self.draft is not None
        seqs = {slot: (seq.history, seq.sampling, seq.num_prompt) for slot, seq in self.target.slots.items()}
        # A preempted seq may come back with drafts, since what it had computed was still cached.
        seqs |= {seq.slot: (list(seq.token_ids), seq.sampling, seq.num_prompt_tokens) for seq in message.init_seqs}
        for row in message.rows:
            if not row.draft_token_ids:
                continue
            history, sampling, num_prompt = seqs[row.slot]
            assert row.draft_base_len == len(history), "drafts follow the history as it is"
            history = list(history)
            for token_id in row.draft_token_ids:
                expected = self.draft.model.choose_after(history, sampling, num_prompt)
                assert token_id == expected, "a draft of an old epoch"
                history.append(token_id)

    def _send(self) -> None:
        self.plan()
        self._travel(self.draft_rounds, self.draft_lane, self._on_draft_result)
        self._travel(self.target_rounds, self.target_lane, self._on_target_result)
        self._check_waiting()

    def _check_waiting(self) -> None:
        """Checks that the target is idle only while a seq is held, and no longer than announced when the wait began."""
        release = self.core.next_release()
        if self.num_in_flight or not self.core.num_requests or self.core.status().num_requests_waiting:
            self._said = None
            return
        assert self.may_wait or release is not None, "the target waits although nobody is held"
        if self._said is None:
            self._said = release
        assert self._said is None or self.now <= self._said, "a seq is held for longer than was said"

    def _travel(
        self,
        rounds: deque[worker_pb2.Round],
        lane: _Lane,
        on_result: OnResult,
    ) -> None:
        while rounds:
            message = rounds.popleft()
            lane.last_arrival = max(lane.last_arrival, self.now + self._delay_s())
            self.num_in_flight += lane is self.target_lane
            self.at(lane.last_arrival, self._of_this_life(lane, partial(self._arrive, message, lane, on_result)))

    def _of_this_life(self, lane: _Lane, event: Callable[[], None]) -> Callable[[], None]:
        life = lane.life
        return lambda: event() if lane.life == life else None

    def _arrive(self, message: worker_pb2.Round, lane: _Lane, on_result: OnResult) -> None:
        lane.waiting.append(message)
        if not lane.is_busy:
            self._begin(lane, on_result)

    def _begin(self, lane: _Lane, on_result: OnResult) -> None:
        message = lane.waiting.popleft()
        lane.engine.overtake(message, lane.waiting)
        run_s = lane.seconds(message)
        lane.is_busy = True
        lane.busy_s += run_s
        self.at(self.now + run_s, self._of_this_life(lane, partial(self._end, message, lane, run_s, on_result)))

    def _end(self, message: worker_pb2.Round, lane: _Lane, run_s: float, on_result: OnResult) -> None:
        if lane is self.target_lane and not self._looks_up:
            self._check_drafts(message)
        result = lane.engine.run(message)
        result.run_ns = int(1e9 * run_s)
        lane.last_answer = max(lane.last_answer, self.now + self._delay_s())
        self.at(lane.last_answer, self._of_this_life(lane, partial(on_result, result)))
        lane.is_busy = False
        if lane.waiting:
            self._begin(lane, on_result)

    def _on_draft_result(self, result: worker_pb2.RoundResult) -> None:
        self.core.on_draft_result(result, self.now)

    def _on_target_result(self, result: worker_pb2.RoundResult) -> None:
        self.num_in_flight -= 1
        self.core.on_target_result(result, self.now)
        self.take(self.core.take_outputs())


def _num_tokens(message: worker_pb2.Round) -> int:
    return sum(row.chunk_len + len(row.draft_token_ids) for row in message.rows)


def _num_steps(message: worker_pb2.Round) -> int:
    return max((row.num_draft_tokens for row in message.rows), default=0)


def _chunk_steps(message: worker_pb2.Round) -> float:
    """The steps that catching up costs: one for every so many tokens."""
    return sum(row.chunk_len for row in message.rows if not row.num_draft_tokens) / 64

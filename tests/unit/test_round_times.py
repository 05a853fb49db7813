"""Which time the scheduler attributes to a round."""

import pytest

from echelon.pb.worker_pb2 import EngineInfo, RoundResult
from scheduler.engines.engine import EngineView


class Rounds:
    """Sends rounds without rows: only their times matter."""

    def __init__(self) -> None:
        info = EngineInfo(num_slots=1, num_blocks=4, block_size=4, max_model_len=16, max_num_batched_tokens=16)
        self._engine = EngineView(info, 1, enable_prefix_caching=False)
        self._ids: list[int] = []

    def send(self, at_s: float) -> None:
        self._ids.append(self._engine.launch([], at_s).round_id)

    def answer(self, at_s: float, *, queue_s: float, run_s: float) -> float:
        """Answers the oldest round; returns its time."""
        result = RoundResult(round_id=self._ids.pop(0), queue_ns=round(queue_s * 1e9), run_ns=round(run_s * 1e9))
        return self._engine.complete(result, at_s).wall_s


def test_the_time_of_both_messages_counts() -> None:
    rounds = Rounds()
    rounds.send(1.0)
    assert rounds.answer(1.5, queue_s=0.0, run_s=0.4) == pytest.approx(0.5)


def test_a_queued_round_begins_with_the_answer_to_the_one_before() -> None:
    rounds = Rounds()
    rounds.send(1.0)
    rounds.send(1.1)
    rounds.answer(2.0, queue_s=0.0, run_s=0.9)
    assert rounds.answer(2.75, queue_s=0.8, run_s=0.7) == pytest.approx(0.75)


def test_time_of_another_engines_round_does_not_count() -> None:
    """Target and draft take turns in one process."""
    rounds = Rounds()
    rounds.send(1.0)
    assert rounds.answer(4.0, queue_s=2.75, run_s=0.125) == pytest.approx(0.25)

"""What `status` says about live processes: whether they answer, and if not, since when."""

import pytest

from cluster.process_id import ProcessId
from cluster.processes.status import ProcessStatus, State, TierUse
from cluster.processes.vitals import Vitals
from echelon.pb.scheduler_pb2 import SchedulerStatus, TierStatus
from echelon.pb.worker_pb2 import ENGINE_ROLE_DRAFT, ENGINE_ROLE_TARGET

NAMES = ("scheduler-0", "gateway-0")


@pytest.fixture
def vitals() -> Vitals:
    return Vitals(NAMES, 100.0)


def test_what_answers_is_ready(vitals: Vitals) -> None:
    for now in range(100, 200, 2):
        for name in NAMES:
            vitals.on_answer(name, now)
        vitals.on_status(SchedulerStatus(ready=True, draft_ready=True), now)
        assert vitals.verdict(now) == (State.READY, "")


def test_one_unanswered_question_is_no_silence(vitals: Vitals) -> None:
    assert vitals.verdict(104.5)[0] is State.READY


@pytest.mark.parametrize("silent", NAMES)
def test_a_stopped_process_is_named_with_the_time_of_its_silence(vitals: Vitals, silent: str) -> None:
    (other,) = set(NAMES) - {silent}
    vitals.on_answer(other, 150.0)
    assert vitals.verdict(150.0) == (State.NOT_RESPONDING, f"{silent} has not answered for 50 s")
    processes = (
        ProcessStatus(id=ProcessId(role="scheduler"), state=State.READY),
        ProcessStatus(id=ProcessId(role="gateway"), state=State.READY),
    )
    shown = {process.name: process.state for process in vitals.mark(processes, 150.0)}
    assert shown == {silent: State.NOT_RESPONDING, other: State.READY}
    vitals.on_answer(silent, 151.0)
    assert vitals.verdict(151.0) == (State.READY, "")


@pytest.mark.parametrize(
    ("status", "state", "reason"),
    [
        (
            SchedulerStatus(ready=True, target_silent_s=12.0, draft_ready=True),
            State.NOT_RESPONDING,
            "target group: no answer for 13 s",
        ),
        (
            SchedulerStatus(not_ready_reason="target group: does not answer", target_silent_s=30.0),
            State.NOT_RESPONDING,
            "target group: no answer for 31 s: target group: does not answer",
        ),
        (
            SchedulerStatus(ready=True, draft_silent_s=150.0, draft_not_ready_reason="UNAVAILABLE"),
            State.DEGRADED,
            "draft group: no answer for 151 s: UNAVAILABLE; requests are decoded without drafts",
        ),
        (
            SchedulerStatus(
                ready=True,
                draft_silent_s=150.0,
                tiers=[
                    TierStatus(engine=ENGINE_ROLE_TARGET, tier="disk", last_error="an old one"),
                    TierStatus(engine=ENGINE_ROLE_DRAFT, tier="disk", paused=True, last_error="no space left"),
                ],
            ),
            State.DEGRADED,
            "draft group: no answer for 151 s; requests are decoded without drafts; disk tier of the draft's KV cache: "
            "paused after errors, the last one: no space left; prefixes that it holds are computed again",
        ),
    ],
)
def test_the_scheduler_tells_of_its_groups(vitals: Vitals, status: SchedulerStatus, state: State, reason: str) -> None:
    for name in NAMES:
        vitals.on_answer(name, 200.0)
    vitals.on_status(status, 199.0)
    assert vitals.verdict(200.0) == (state, reason)


def test_a_deployment_without_a_draft_is_ready(vitals: Vitals) -> None:
    vitals.on_status(SchedulerStatus(ready=True), 100.0)
    assert vitals.verdict(101.0) == (State.READY, "")


def test_the_tiers_are_those_that_the_scheduler_told_of_last(vitals: Vitals) -> None:
    assert vitals.tiers() == ()
    host = TierStatus(engine=ENGINE_ROLE_TARGET, tier="host", num_blocks=8, num_used_blocks=3, block_bytes=1000)
    host.stored_blocks_total, host.fetched_blocks_total, host.failed_blocks_total = 7, 5, 1
    host.evicted_blocks_total = 4
    vitals.on_status(SchedulerStatus(ready=True, tiers=[host]), 100.0)
    assert vitals.tiers() == (
        TierUse(
            engine="target",
            tier="host",
            used_bytes=3000,
            capacity_bytes=8000,
            num_stored=7,
            num_fetched=5,
            num_failed=1,
            num_evicted=4,
            paused=False,
            last_error="",
        ),
    )

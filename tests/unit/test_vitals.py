"""What `status` says about live processes: whether they answer, and if not, since when."""

from typing import Any

import pytest

from cluster.process_id import PartId, ProcessId
from cluster.processes.status import ProcessStatus, State, TierUse
from cluster.processes.vitals import Vitals
from echelon.pb.scheduler_pb2 import SchedulerStatus, TierStatus
from echelon.pb.worker_pb2 import ENGINE_ROLE_DRAFT, ENGINE_ROLE_TARGET

ASKED = (ProcessId(role="scheduler"), ProcessId(role="gateway"))
SCHEDULER = ASKED[0].name
NAMES = tuple(process.name for process in ASKED)


@pytest.fixture
def vitals() -> Vitals:
    return Vitals(ASKED, 100.0)


def test_processes_that_answer_are_ready(vitals: Vitals) -> None:
    for now in range(100, 200, 2):
        for name in NAMES:
            vitals.on_answer(name, now)
        vitals.on_status(SCHEDULER, SchedulerStatus(ready=True, draft_ready=True), now)
        assert vitals.verdict(now) == (State.READY, "")


def test_one_unanswered_question_is_not_silence(vitals: Vitals) -> None:
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
            SchedulerStatus(target_lost=True, not_ready_reason="target group: does not answer", target_silent_s=30.0),
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
def test_the_scheduler_reports_on_its_groups(
    vitals: Vitals, status: SchedulerStatus, state: State, reason: str
) -> None:
    for name in NAMES:
        vitals.on_answer(name, 200.0)
    vitals.on_status(SCHEDULER, status, 199.0)
    assert vitals.verdict(200.0) == (state, reason)


def test_a_deployment_without_a_draft_is_ready(vitals: Vitals) -> None:
    vitals.on_status(SCHEDULER, SchedulerStatus(ready=True), 100.0)
    assert vitals.verdict(101.0) == (State.READY, "")


def test_tiers_are_those_of_the_schedulers_last_report(vitals: Vitals) -> None:
    assert vitals.tiers() == ()
    host = TierStatus(engine=ENGINE_ROLE_TARGET, tier="host", num_blocks=8, num_used_blocks=3, block_bytes=1000)
    host.stored_blocks_total, host.fetched_blocks_total, host.failed_blocks_total = 7, 5, 1
    host.evicted_blocks_total, host.damaged_blocks_total = 4, 1
    host.avoided_seconds_total, host.waited_seconds_total = 5.0, 1.5
    vitals.on_status(SCHEDULER, SchedulerStatus(ready=True, tiers=[host]), 100.0)
    assert vitals.tiers() == (
        TierUse(
            engine="target",
            tier="host",
            used_bytes=3000,
            capacity_bytes=8000,
            num_stored=7,
            num_fetched=5,
            num_failed=1,
            num_damaged=1,
            num_evicted=4,
            saved_s=3.5,
            paused=False,
            last_error="",
        ),
    )


def test_a_group_is_lost_when_the_scheduler_cannot_connect_to_it_again(vitals: Vitals) -> None:
    def lost(**status: Any) -> dict[PartId, str]:
        vitals.on_answer("scheduler-0", 100.0)
        vitals.on_status(SCHEDULER, SchedulerStatus(**status), 100.0)
        return vitals.lost(101.0)

    assert lost(ready=True, target_silent_s=9.0) == {}, "it is slow, but connected"
    reason = {"not_ready_reason": "target group: UNAVAILABLE"}
    assert lost(target_lost=True, target_silent_s=0.5, **reason) == {}, "it may only have dropped the stream"
    assert lost(target_lost=True, target_silent_s=3.5, **reason) == {
        PartId(role="target"): "the scheduler cannot reach it: target group: UNAVAILABLE"
    }
    assert list(lost(ready=True, draft_lost=True, draft_silent_s=15.0)) == [PartId(role="draft")]
    assert vitals.lost(106.0) == {}, "what a scheduler said that no longer answers"


def test_a_process_that_never_answers_is_lost(vitals: Vitals) -> None:
    vitals.on_answer("gateway-0", 111.0)
    assert vitals.lost(109.0) == {}
    assert vitals.lost(111.0) == {PartId(role="scheduler"): "has not answered for 11 s"}


def test_one_replica_that_answers_is_enough(vitals: Vitals) -> None:
    schedulers = [ProcessId(role="scheduler", replica=replica) for replica in range(2)]
    two = Vitals((*schedulers, ProcessId(role="gateway")), 100.0)
    for process in (*schedulers, ProcessId(role="gateway")):
        two.on_answer(process.name, 200.0)
    tier = TierStatus(engine=ENGINE_ROLE_TARGET, tier="host")
    for process in schedulers:
        two.on_status(process.name, SchedulerStatus(ready=True, tiers=[tier]), 200.0)
    assert two.verdict(201.0) == (State.READY, "")
    assert [tier.replica for tier in two.tiers()] == [0, 1]
    two.on_status("scheduler-1", SchedulerStatus(target_silent_s=4.0), 200.0)
    assert two.verdict(200.0) == (State.DEGRADED, "replica 1, target group: no answer for 4 s")
    two.on_status("scheduler-1", SchedulerStatus(target_lost=True, target_silent_s=4.0), 200.0)
    assert list(two.lost(200.0)) == [PartId(role="target", replica=1)]
    two.on_answer("gateway-0", 210.0)
    two.on_answer("scheduler-1", 210.0)
    assert two.verdict(210.0)[0] is State.NOT_RESPONDING, "the other one is silent"
    assert "scheduler-0 has not answered for 10 s; replica 1, target group" in two.verdict(210.0)[1]


def test_one_gateway_that_answers_is_enough() -> None:
    gateways = [ProcessId(role="gateway", replica=number) for number in range(2)]
    vitals = Vitals([*gateways, ProcessId(role="scheduler")], 100.0)
    vitals.on_answer("gateway-0", 110.0)
    vitals.on_answer("scheduler-0", 110.0)
    assert vitals.verdict(110.0) == (State.DEGRADED, "gateway-1 has not answered for 10 s")
    assert vitals.verdict(120.0)[0] is State.NOT_RESPONDING


def test_replicas_come_and_go(vitals: Vitals) -> None:
    second = ProcessId(role="scheduler", replica=1)
    vitals.on_status(second.name, SchedulerStatus(num_requests_running=1), 100.0)
    assert vitals.num_requests(second.name, since_s=0.0) is None, "nobody asks it yet"
    vitals.add(second, 120.0)
    for name in NAMES:
        vitals.on_answer(name, 125.0)
    assert vitals.verdict(125.0) == (State.READY, "")
    vitals.on_status(second.name, SchedulerStatus(ready=True, num_requests_running=1, num_requests_waiting=2), 126.0)
    assert vitals.num_requests(second.name, since_s=125.0) == 3
    assert vitals.num_requests(second.name, since_s=127.0) is None
    assert vitals.verdict(128.0) == (State.DEGRADED, "scheduler-1 has not answered for 8 s")
    vitals.remove(second.name)
    vitals.on_answer(second.name, 128.0)
    assert vitals.verdict(128.0) == (State.READY, "")
    assert not vitals.asks(second.name)

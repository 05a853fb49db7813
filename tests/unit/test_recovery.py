"""What is started again, when, and when no more."""

from math import inf

import pytest

from cluster.process_id import PartId
from cluster.processes.recovery import Recovery, Tuning

TARGET, DRAFT = PartId(role="target"), PartId(role="draft")
SCHEDULER, GATEWAY = PartId(role="scheduler"), PartId(role="gateway")
PARTS = (TARGET, DRAFT, SCHEDULER, GATEWAY)
TUNING = Tuning(second_delay_s=1.0, most_delay_s=4.0, stable_s=10.0, settle_s=5.0, most_failed_starts=3)


@pytest.fixture
def recovery() -> Recovery:
    needs = {SCHEDULER: (TARGET,)}
    return Recovery(PARTS, 0.0, can_start=(TARGET, DRAFT, SCHEDULER), needs=needs, tuning=TUNING)


def test_a_part_that_was_stable_is_started_at_once(recovery: Recovery) -> None:
    assert recovery.take_due(50.0) == []
    assert recovery.next_due() == inf
    recovery.on_lost(DRAFT, "draft-0.0: was killed by SIGKILL", 100.0)
    assert recovery.next_due() == 100.0
    assert recovery.take_due(100.0) == [DRAFT]
    assert recovery.take_due(200.0) == [], "it is being started"
    recovery.on_up(DRAFT, 107.5)
    assert [(event.part, event.text) for event in recovery.events] == [
        ("draft-0", "lost: draft-0.0: was killed by SIGKILL"),
        ("draft-0", "is started again"),
        ("draft-0", "is up again, 7.5 s after it was lost"),
    ]


def test_a_part_that_keeps_dying_waits_longer_each_time(recovery: Recovery) -> None:
    now, delays = 100.0, []
    for _ in range(5):
        recovery.on_lost(TARGET, "it died", now)
        delays.append(recovery.next_due() - now)
        now = recovery.next_due()
        assert recovery.take_due(now) == [TARGET]
        recovery.on_up(TARGET, now)
        now += 2.0
    assert delays == [0.0, 1.0, 2.0, 4.0, 4.0]
    recovery.on_lost(TARGET, "it died", now + 10.0)
    assert recovery.next_due() == now + 10.0, "it was up for long enough"


def test_starts_that_fail_are_repeated_and_then_given_up(recovery: Recovery) -> None:
    recovery.on_lost(TARGET, "it died", 100.0)
    for number in range(3):
        assert not recovery.is_given_up(TARGET)
        assert recovery.take_due(recovery.next_due()) == [TARGET], number
        recovery.on_failed_start(TARGET, "no memory", 100.0 + number)
    assert recovery.is_given_up(TARGET)
    assert recovery.next_due() == inf
    assert recovery.events[-1].text == "is given up: 3 starts in a row failed"


def test_a_part_that_cannot_be_started_is_given_up_at_once(recovery: Recovery) -> None:
    recovery.on_lost(GATEWAY, "it died", 1.0)
    assert recovery.is_given_up(GATEWAY)
    assert recovery.take_due(inf) == []


def test_the_scheduler_waits_for_the_target(recovery: Recovery) -> None:
    recovery.on_lost(SCHEDULER, "it died", 100.0)
    recovery.on_lost(TARGET, "it died", 100.0)
    assert recovery.take_due(100.0) == [TARGET]
    assert recovery.take_due(200.0) == []
    recovery.on_up(TARGET, 201.0)
    assert recovery.take_due(201.0) == [SCHEDULER]


def test_news_of_a_part_that_is_not_up_change_nothing(recovery: Recovery) -> None:
    recovery.on_lost(TARGET, "rank 1 died", 100.0)
    recovery.on_lost(TARGET, "rank 0 follows it", 100.1)
    recovery.take_due(100.1)
    recovery.on_lost(TARGET, "the scheduler cannot reach it", 101.0)
    assert [event.text for event in recovery.events] == ["lost: rank 1 died", "is started again"]


def test_silence_means_nothing_while_a_part_settles(recovery: Recovery) -> None:
    recovery.on_lost(TARGET, "it died", 100.0)
    recovery.take_due(100.0)
    assert not recovery.is_settled(TARGET, 200.0)
    recovery.on_up(TARGET, 200.0)
    assert not recovery.is_settled(TARGET, 204.0)
    assert recovery.is_settled(TARGET, 205.0)


def test_parts_come_and_go(recovery: Recovery) -> None:
    more = PartId(role="target", replica=1)
    recovery.add(more, 50.0, can_start=True)
    recovery.on_lost(more, "it died", 100.0)
    assert recovery.take_due(100.0) == [more]
    recovery.remove(more)
    assert recovery.next_due() == inf
    recovery.on_up(more, 101.0)
    recovery.on_lost(more, "it was ended", 102.0)
    recovery.on_failed_start(more, "it was ended", 103.0)
    assert not recovery.is_up(more)
    assert not recovery.is_given_up(more)
    assert [event.text for event in recovery.events] == ["lost: it died", "is started again"]


def test_a_part_without_a_place_is_looked_after_until_there_is_one(recovery: Recovery) -> None:
    recovery.on_lost(TARGET, "node a is lost", 100.0)
    for number in range(10):
        now = recovery.next_due()
        assert now == 100.0 + 3.0 * number, "it is no failed start, so it is never given up"
        assert recovery.take_due(now) == [TARGET]
        recovery.on_no_place(TARGET, "node a is lost; there is no other node", now)
        assert recovery.has_no_place(TARGET)
        assert not recovery.is_up(TARGET)
    recovery.take_due(130.0)
    recovery.on_up(TARGET, 131.0)
    assert not recovery.has_no_place(TARGET)
    assert [event.text for event in recovery.events] == [
        "lost: node a is lost",
        "is started again",
        "has no place: node a is lost; there is no other node",
        "is up again, 31.0 s after it was lost",
    ]

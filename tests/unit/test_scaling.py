"""How many replicas the load asks for, and what is done about it."""

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import pytest

from cluster.deployment.settings import ScalingSettings
from cluster.errors import StartError
from cluster.on_ray.scaler import Load, Scaler
from cluster.processes.scaling import Scaling


def scaling(target: int = 4, *, up_s: float = 5.0, down_s: float = 20.0, least: int = 1, most: int = 4) -> Scaling:
    settings = ScalingSettings(target_ongoing_requests=target, upscale_delay_s=up_s, downscale_delay_s=down_s)
    return Scaling(settings, least=least, most=most)


def follow(policy: Scaling, load: Iterable[tuple[int, int]]) -> list[int]:
    """How many replicas there are after each second. `load`: numbers of requests, and for how many seconds."""
    now, number, seen = 0.0, 1, []
    for num_requests, seconds in load:
        for _ in range(seconds):
            number = policy.wanted(number, num_requests, now)
            seen.append(number)
            now += 1.0
    return seen


def test_replicas_are_added_once_more_were_needed_all_the_time() -> None:
    assert follow(scaling(), [(4, 10), (9, 10)]) == [1] * 15 + [3] * 5
    assert follow(scaling(), [(4, 10), (99, 10)])[-1] == 4, "no more than there may be"
    assert follow(scaling(up_s=0.0), [(4, 1), (5, 1)]) == [1, 2]


def test_a_peak_adds_none() -> None:
    assert set(follow(scaling(), [(4, 10), (16, 4), (4, 10), (16, 4), (4, 10)])) == {1}


def test_no_more_are_added_than_were_needed_throughout() -> None:
    assert follow(scaling(), [(8, 5), (16, 4), (8, 10)])[-1] == 2


def test_replicas_are_removed_once_fewer_would_have_done_all_the_time() -> None:
    seen = follow(scaling(), [(12, 10), (0, 30)])
    assert seen[9] == 3
    assert seen.index(1, 6) == 10 + 20, "20 s after they were needed no more"


def test_a_pause_between_peaks_removes_none() -> None:
    assert set(follow(scaling(), [(12, 10), *[(0, 15), (12, 3)] * 4])[6:]) == {3}


def test_a_load_on_the_edge_does_not_flap() -> None:
    seen = follow(scaling(), [(8, 1), (9, 1)] * 60)
    assert seen == sorted(seen)
    assert seen[-1] == 2


def test_the_fewest_stay() -> None:
    assert scaling(least=2).wanted(1, 0, 0.0) == 1, "not known long enough"
    policy = scaling(least=2, up_s=0.0)
    assert policy.wanted(1, 0, 0.0) == 2
    assert [policy.wanted(3, 0, float(now)) for now in (10, 30)] == [3, 2]


@dataclass
class Replicas:
    """Starts take until the test lets them end."""

    num_replicas: int = 1
    num_requests: int | None = 0
    failure: Exception | None = None
    notes: list[str] = field(default_factory=list)
    changes: list[int] = field(default_factory=list)
    asked: threading.Event = field(default_factory=threading.Event)
    may_end: threading.Event = field(default_factory=threading.Event)
    given_up: threading.Event = field(default_factory=threading.Event)

    def change(self, number: int) -> None:
        self.changes.append(number)
        self.asked.set()
        while not self.may_end.wait(0.01):
            if self.given_up.is_set():
                raise StartError("the load needs it no more")
        if self.failure is not None:
            raise self.failure
        self.num_replicas = number

    def look(self) -> Load:
        return Load(num_replicas=self.num_replicas, num_requests=self.num_requests)

    def scaler(self, look: Callable[[], Load] | None = None) -> Scaler:
        return Scaler(
            scaling(up_s=0.0, down_s=0.0),
            look=look or self.look,
            change=self.change,
            give_up=self.given_up.set,
            note=self.notes.append,
        )


def eventually(holds: Callable[[], bool]) -> None:
    waiting = threading.Event()
    for _ in range(3000):
        if holds():
            return
        waiting.wait(0.01)
    pytest.fail("it did not happen within 30 s")


def test_what_does_not_serve_yet_is_given_up_when_the_load_goes() -> None:
    replicas = Replicas(num_requests=12)
    scaler = replicas.scaler()
    assert replicas.asked.wait(30)
    replicas.num_requests = None  # nothing is heard: nothing is done
    replicas.num_requests = 1
    assert replicas.given_up.wait(30)
    eventually(lambda: len(replicas.notes) == 2)
    scaler.stop()
    assert replicas.changes == [3]
    assert replicas.num_replicas == 1
    assert replicas.notes == ["1 -> 3 replicas, for 12 requests", "there are no 3 replicas: the load needs it no more"]


def test_replicas_follow_the_load_up_and_down() -> None:
    replicas = Replicas(num_requests=12)
    replicas.may_end.set()
    scaler = replicas.scaler()
    eventually(lambda: replicas.num_replicas == 3)
    replicas.num_requests = 0
    eventually(lambda: replicas.num_replicas == 1)
    scaler.stop()
    assert replicas.changes == [3, 1]


@pytest.mark.parametrize("failure", [StartError("no device is free"), KeyError("nobody thought of this")])
def test_a_change_that_fails_is_not_tried_at_once_again(failure: Exception) -> None:
    replicas = Replicas(num_requests=12, failure=failure)
    replicas.may_end.set()
    scaler = replicas.scaler()
    eventually(lambda: len(replicas.notes) == 2)
    eventually(lambda: not replicas.given_up.wait(3.0))
    scaler.stop()
    assert replicas.changes == [3]


def test_a_look_that_breaks_is_not_the_last() -> None:
    replicas, loads = Replicas(), [Load(num_replicas=1, num_requests=12)] * 3
    scaler = replicas.scaler(loads.pop)  # which fails from the fourth on
    assert replicas.asked.wait(30)
    eventually(lambda: not loads)
    loads += [Load(num_replicas=1, num_requests=0)] * 100
    assert replicas.given_up.wait(30)
    scaler.stop()


def test_stopping_gives_up_what_is_being_started() -> None:
    replicas = Replicas(num_requests=12)
    scaler = replicas.scaler()
    assert replicas.asked.wait(30)
    scaler.stop()
    assert replicas.given_up.is_set()
    assert replicas.num_replicas == 1

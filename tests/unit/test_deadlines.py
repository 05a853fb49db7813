"""Which requests run out of time, and which are still remembered for that."""

import gc
import random

from scheduler.requests.deadlines import Deadlines
from scheduler.requests.request import Request


def request_until(deadline_s: float | None) -> Request:
    return Request(
        request_id="r",
        tenant="",
        is_background=False,
        is_budgeted=False,
        num_prompt_tokens=1,
        arrived_s=0.0,
        deadline_s=deadline_s,
        seed=0,
    )


def num_requests_in_memory() -> int:
    return sum(isinstance(each, Request) for each in gc.get_objects())


def test_requests_expire_in_the_order_of_their_deadlines() -> None:
    rng, deadlines = random.Random(0), Deadlines()
    requests = [request_until(float(rng.randrange(100))) for _ in range(500)]
    for request in [*requests, request_until(None)]:
        deadlines.add(request)
        if rng.random() < 0.5:
            rng.choice(requests).close()
    left = sorted(request.deadline_s or 0.0 for request in requests if not request.is_finished)
    assert deadlines.next() == left[0]
    expired = deadlines.take_expired(50.0)
    assert [request.deadline_s for request in expired] == [deadline_s for deadline_s in left if deadline_s <= 50.0]
    assert deadlines.next() == next(deadline_s for deadline_s in left if deadline_s > 50.0)


def test_finished_requests_with_far_deadlines_are_not_kept() -> None:
    """One that runs and has an earlier deadline hides them from the top of the heap."""
    num_before, deadlines = num_requests_in_memory(), Deadlines()
    running = request_until(10.0)
    deadlines.add(running)
    for _ in range(1000):
        request = request_until(1e6)
        deadlines.add(request)
        request.close()
    assert num_requests_in_memory() < num_before + 200
    assert deadlines.take_expired(10.0) == [running]

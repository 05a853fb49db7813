"""Much work at once leaves the event loop time for others."""

import asyncio
from collections.abc import Callable

from gateway.doors.turns import Turns


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


async def test_work_that_comes_at_once_is_done_in_order_and_in_several_passes_of_the_loop() -> None:
    clock, done = Clock(), []

    def work(number: int) -> Callable[[], None]:
        def do() -> None:
            clock.now_s += 0.0015
            done.append(number)

        return do

    turns = Turns(clock)
    assert [turns.take(work(number)) for number in range(5)] == [True, True, False, False, False]
    passes = []
    while len(done) < 5:
        await asyncio.sleep(0)
        passes.append(list(done))
    assert passes == [[0, 1, 2, 3], [0, 1, 2, 3, 4]]
    await asyncio.sleep(0)
    assert turns.take(work(5)), "a new turn has begun"

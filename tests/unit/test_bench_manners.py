"""What bench.manners takes for fair, and when it complains."""

import pytest

from bench.manners import ALLOWED, Run, excess, fair_cores


@pytest.mark.parametrize(
    ("wanted", "threads", "num_busy", "fair"),
    [
        (2.0, 2, 0, 2.0),
        (1.0, 1, 1, 1.0),  # there is a core for each
        (2.0, 2, 1, 4 / 3),
        (2.0, 2, 2, 1.0),
        (1.0, 2, 1, 1.0),  # half a core for each thread is less than a fair share
        (1.2, 2, 2, 1.0),
        (0.4, 2, 2, 0.4),
    ],
)
def test_cores_are_shared_max_min_fairly(wanted: float, threads: int, num_busy: int, fair: float) -> None:
    assert fair_cores(wanted, threads=threads, num_busy=num_busy, num_cores=2) == pytest.approx(fair)


def run(tokens_per_s: float, tokens_per_cpu_s: float, other_cores: float = 0.0) -> Run:
    return Run(tokens_per_s, tokens_per_cpu_s, cores=1.0, busy_cores=1.0, other_cores=other_cores)


def test_half_the_cores_and_half_the_speed_is_fair() -> None:
    assert excess([run(40, 20)], [run(20, 20)], 0.5) == pytest.approx(1.0)


def test_threads_that_spin_are_noticed_on_a_quiet_machine_and_beside_others() -> None:
    assert excess([run(48, 24)], [run(3.7, 2)], 0.5) > ALLOWED
    assert excess([run(48, 24, 0.5)], [run(30, 2, 0.5)], 0.5) > ALLOWED


def test_what_others_take_is_not_held_against_us() -> None:
    assert excess([run(48, 24, 0.0)], [run(2, 23, 1.9)], 0.5) == pytest.approx(24 / 23)

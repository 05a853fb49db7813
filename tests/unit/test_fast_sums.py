"""One-shot sums, with threads for ranks and plain memory for that which GPUs map; torch's kernel is the only fake."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from workers import one_shot
from workers.collectives import Group
from workers.one_shot import OneShotGroup, can_keep_bits
from workers.process.fast_sums import with_fast_sums

SIZE = 2
CPU = torch.device("cpu")
SHARED_BYTES = 1 << 20


class Machine:
    """What the ranks share."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(SIZE, timeout=30)
        self.given: list[object] = [None] * SIZE
        self.memory = torch.zeros(SIZE, SHARED_BYTES, dtype=torch.uint8)

    def exchange(self, rank: int, value: object) -> list[object]:
        self.given[rank] = value
        self.barrier.wait()
        everyone = list(self.given)
        self.barrier.wait()
        return everyone


class Plain:
    size = SIZE

    def __init__(self, machine: Machine, rank: int) -> None:
        self._machine = machine
        self.rank = rank
        self.num_sums = 0

    def all_reduce(self, x: Tensor) -> Tensor:
        self.num_sums += 1
        return self.all_gather(x).sum(dim=0, dtype=x.dtype)

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.stack([each for each in self._machine.exchange(self.rank, x) if isinstance(each, Tensor)])

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        return self.all_gather(x)[source]


def one_shot_of(machine: Machine, group: Group) -> OneShotGroup:
    def add(part: Tensor) -> Tensor:
        machine.barrier.wait()
        parts = [memory[: part.nbytes].view(part.dtype) for memory in machine.memory]
        total = sum(parts[1:], parts[0])
        machine.barrier.wait()
        return total

    return OneShotGroup(group, machine.memory[group.rank], add)


def on_ranks(work: Callable[[Machine, Plain], object]) -> list[object]:
    machine = Machine()
    with ThreadPoolExecutor(SIZE) as threads:
        return list(threads.map(lambda rank: work(machine, Plain(machine, rank)), range(SIZE)))


def chosen(machine: Machine, plain: Plain, open_group: Callable[[Group], OneShotGroup]) -> Group | None:
    def gather(key: str, value: str) -> list[str]:
        return [str(each) for each in machine.exchange(plain.rank, value)]

    return with_fast_sums(plain, open_group, gather, "sums", CPU)


def test_small_sums_take_one_launch_and_large_ones_do_not() -> None:
    def work(machine: Machine, plain: Plain) -> None:
        group = chosen(machine, plain, lambda group: one_shot_of(machine, group))
        assert isinstance(group, OneShotGroup)
        num_before = plain.num_sums
        for x in (torch.arange(8.0), torch.ones(3, 4, dtype=torch.bfloat16).repeat(1, 2)):
            assert torch.equal(group.all_reduce(x + plain.rank), 2 * x + 1)
        assert plain.num_sums == num_before
        others = [torch.ones(100_000), torch.ones(3), torch.ones(8, dtype=torch.float16), torch.ones(0)]
        for x in others:  # too many, not whole 16 bytes, of another dtype, none
            assert torch.equal(group.all_reduce(x + plain.rank), 2 * x + 1)
        assert plain.num_sums == num_before + len(others)
        assert group.broadcast(torch.tensor([plain.rank]), 1).item() == 1

    on_ranks(work)


def failing_on(rank: int, machine: Machine, group: Group) -> OneShotGroup:
    if group.rank == rank:
        raise RuntimeError("no peer access")
    return one_shot_of(machine, group)


def wrong_on(rank: int, machine: Machine, group: Group) -> OneShotGroup:
    right = one_shot_of(machine, group)
    if group.rank != rank:
        return right
    return OneShotGroup(group, machine.memory[rank], lambda part: right.all_reduce(part) + 1)


def differing(machine: Machine, group: Group) -> OneShotGroup:
    """As if each rank began to add with its own part: right for whole numbers."""
    right = one_shot_of(machine, group)

    def add(part: Tensor) -> Tensor:
        total = right.all_reduce(part)
        return torch.where(total == total.round(), total, total * (1 + group.rank * 2.0**-20))

    return OneShotGroup(group, machine.memory[group.rank], add)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("fault", [failing_on, wrong_on])
def test_no_rank_uses_them_if_they_fail_on_one(fault: Callable[[int, Machine, Group], OneShotGroup], rank: int) -> None:
    def work(machine: Machine, plain: Plain) -> bool:
        return chosen(machine, plain, lambda group: fault(rank, machine, group)) is plain

    assert on_ranks(work) == [True, True]


def test_no_rank_uses_them_if_their_bits_differ() -> None:
    def work(machine: Machine, plain: Plain) -> bool:
        return chosen(machine, plain, lambda group: differing(machine, group)) is plain

    assert on_ranks(work) == [True, True]


def test_they_are_not_used_where_a_row_would_get_other_bits_in_a_large_batch() -> None:
    assert can_keep_bits(2, ordered_sum=True)
    assert can_keep_bits(8, ordered_sum=False)
    assert not can_keep_bits(4, ordered_sum=True)
    assert not can_keep_bits(3, ordered_sum=False)


def test_a_machine_without_the_kernel_goes_on_without_it() -> None:
    """Here the real opening raises."""

    def work(machine: Machine, plain: Plain) -> bool:
        return chosen(machine, plain, lambda group: one_shot.open_one_shot(group, None, torch.device("cuda"))) is plain

    assert on_ranks(work) == [True, True]


def test_they_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ECHELON_ONE_SHOT", "off")
    assert not one_shot.is_allowed()
    monkeypatch.setenv("ECHELON_ONE_SHOT", "no")
    with pytest.raises(ValueError, match="must be auto or off"):
        one_shot.is_allowed()

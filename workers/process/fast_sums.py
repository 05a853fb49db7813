"""Decides at start whether a group of GPUs sums small tensors in one launch (workers/one_shot.py)."""

import logging
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from workers.collectives import Group
from workers.one_shot import OneShotGroup

logger = logging.getLogger(__name__)

_NUMBERS = (8, 4096, 40_000)  # of the tensors that are compared

Gather = Callable[[str, str], list[str]]  # key, own value -> those of all ranks


def with_fast_sums(
    plain: Group | None, open_group: Callable[[Group], OneShotGroup], gather: Gather, key: str, device: torch.device
) -> Group | None:
    """The group with one-shot sums if they can be had and are right on all ranks, otherwise `plain`. All ranks call it;
    one outside of the group has None. Each step begins only if all ranks have come through the one before, so that
    none waits for another that has given up."""
    opened: list[OneShotGroup] = []
    sums: list[Tensor] = []

    def open_it(group: Group) -> None:
        opened.append(open_group(group))

    def add(group: Group) -> None:
        sums.extend(opened[0].all_reduce(x).cpu() for x in _probes(group.rank, device))

    def compare(group: Group) -> None:
        _compare(group, sums, device)

    for number, step in enumerate((open_it, add, compare)):
        problems = gather(f"{key}/{number}", "" if plain is None else _problem_of(step, plain))
        if any(problems):
            logger.warning("small sums go through NCCL, as large ones do: %s", next(filter(None, problems)))
            return plain
    return plain if plain is None else opened[0]


def _problem_of(step: Callable[[Group], None], group: Group) -> str:
    try:
        step(group)
    except Exception as err:  # noqa: BLE001  # whatever it is, there are sums without it
        return f"{type(err).__name__}: {err}"
    return ""


def _probes(rank: int, device: torch.device) -> Iterator[Tensor]:
    """In turn whole numbers of few bits, which have the same sum in every order, and others."""
    generator = torch.Generator().manual_seed(rank)
    for dtype in (torch.bfloat16, torch.float32):
        for number in _NUMBERS:
            yield torch.randint(-8, 9, (number,), generator=generator).to(device, dtype)
            yield torch.randn(number, generator=generator).to(device, dtype)


def _compare(plain: Group, sums: list[Tensor], device: torch.device) -> None:
    """Raises ValueError if a sum of whole numbers is wrong, or if ranks have different bits of another."""
    wrong = []
    for index, (found, x) in enumerate(zip(sums, _probes(plain.rank, device), strict=True)):
        expected = plain.all_gather(found.to(device)) if index % 2 else plain.all_reduce(x)
        if not torch.equal(expected.cpu(), found.expand_as(expected)):
            wrong.append(f"{found.numel()} numbers of {found.dtype}")
    if wrong:  # only now, since the other ranks make the same calls
        raise ValueError(f"sums of {wrong[0]} differ")

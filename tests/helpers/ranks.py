"""Runs a function on several gloo ranks, each in its own process with one thread."""

import multiprocessing
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = timedelta(seconds=60)

RankFunction = Callable[..., Any]  # (process_group, *args) -> any picklable result


def run_on_ranks(function: RankFunction, size: int, folder: Path, *args: Any) -> list[Any]:
    """Returns what `function(process_group, *args)` gave on each rank. `function` must be importable (a module of
    tests.helpers); an exception on any rank ends all ranks and is raised here. The ranks exchange files in `folder`."""
    start_ranks(_run_rank, size, size, folder, function, args)
    return [torch.load(_result_file(folder, rank), weights_only=False) for rank in range(size)]


def start_ranks(run: Callable[..., None], size: int, *args: Any) -> None:
    """Calls `run(rank, *args)` in a process for each rank. Returns when all have ended; raises if one fails."""
    multiprocessing.set_forkserver_preload(["torch", __name__])  # one process imports it for all
    mp.start_processes(run, args=args, nprocs=size, start_method="forkserver")


def _run_rank(rank: int, size: int, folder: Path, function: RankFunction, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    group = dist.group.WORLD
    assert group is not None, "init_process_group made the default group"
    result = function(group, *args)
    torch.save(result, _result_file(folder, rank))
    dist.barrier()
    dist.destroy_process_group()


def _result_file(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.pt"

"""A rank on a GPU of its own that sums small tensors with another, as a worker does."""

import logging
import os
from pathlib import Path

import torch
import torch.distributed as dist

from echelon.pb.process_pb2 import WorkerSpec
from tests.helpers.cohorts import join_cohort
from workers.captured.captured_step import capture_on

HOST = "127.0.0.1"


class _Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def sum_on_a_gpu(rank: int, folder: Path) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = str(rank)  # before torch looks for devices
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    meeting = dist.FileStore(str(folder / "meeting"), 2)
    spec = WorkerSpec(rank=rank, world_size=2, host=HOST, device="cuda", collective_timeout_s=60.0)
    cohort = join_cohort(spec, meeting)
    reasons = _Messages()
    logging.getLogger("workers.process.fast_sums").addHandler(reasons)
    group = cohort.group(2, ordered_sum=True)
    assert reasons.texts == []
    assert group is not None
    x, total = torch.zeros(4096, device=device), torch.zeros(4096, device=device)

    def add() -> None:
        total.copy_(group.all_reduce(x + rank))

    replay = capture_on(device)(add)
    for value in range(100):
        x.fill_(value)
        replay()
        assert torch.equal(total, torch.full_like(total, 2 * value + 1)), f"a sum in a graph is wrong at {value}"
    if rank == 0:  # it serves the store
        meeting.get("over")
    else:
        meeting.set("over", "")

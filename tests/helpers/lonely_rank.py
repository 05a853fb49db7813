"""A rank that waits in a collective to which the other one never comes."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from echelon.pb.process_pb2 import WorkerSpec
from tests.helpers.cohorts import join_cohort

HOST = "127.0.0.1"


def wait_alone(rank: int, folder: Path) -> None:
    """Of two ranks. Returns when rank 0 has got an error."""
    torch.set_num_threads(1)
    meeting = dist.FileStore(str(folder / "meeting"), 2)
    spec = WorkerSpec(rank=rank, world_size=2, host=HOST, device="cpu")
    cohort = join_cohort(spec, meeting)
    group = cohort.group(2, ordered_sum=False)
    assert group is not None
    cohort.limit_waits(1.0)
    if rank == 0:
        with pytest.raises(RuntimeError, match=r"[Tt]imed out|[Tt]imeout"):
            group.all_reduce(torch.ones(1))
        meeting.set("over", "")
    else:
        meeting.get("over")

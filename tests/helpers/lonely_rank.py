"""A rank that waits in a collective to which the other one never comes."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from echelon.pb.process_pb2 import WorkerSpec
from workers.process.cohort import Cohort

HOST = "127.0.0.1"


def wait_alone(rank: int, folder: Path) -> None:
    """Of two ranks. Returns when rank 0 has got an error."""
    torch.set_num_threads(1)
    meeting = dist.FileStore(str(folder / "meeting"), 2)
    spec = WorkerSpec(rank=rank, world_size=2, host=HOST, device="cpu")
    if rank == 0:
        cohort = Cohort.open(spec)
        meeting.set("address", cohort.store_address)
    else:
        port = int(meeting.get("address").decode().rpartition(":")[2])
        cohort = Cohort(rank, 2, TCPStore(HOST, port, is_master=False, wait_for_workers=False))
    cohort.join(spec)
    group = cohort.group(2, ordered_sum=False)
    assert group is not None
    cohort.limit_waits(1.0)
    if rank == 0:
        with pytest.raises(RuntimeError, match=r"[Tt]imed out|[Tt]imeout"):
            group.all_reduce(torch.ones(1))
        meeting.set("over", "")
    else:
        meeting.get("over")

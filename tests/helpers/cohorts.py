"""Cohorts of ranks that a test starts by itself, without a parent that tells them the address of the store."""

import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from echelon.pb.process_pb2 import WorkerSpec
from workers.process.cohort import Cohort


def join_cohort(spec: WorkerSpec, meeting: dist.Store) -> Cohort:
    """The cohort of this rank, joined. meeting: of all its ranks, where rank 0 leaves the address."""
    if spec.rank == 0:
        cohort = Cohort.open(spec)
        meeting.set("address", cohort.store_address)
    else:
        port = int(meeting.get("address").decode().rpartition(":")[2])
        store = TCPStore(spec.host, port, is_master=False, wait_for_workers=False)
        cohort = Cohort(spec.rank, spec.world_size, store)
    cohort.join(spec)
    return cohort

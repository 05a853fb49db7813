"""Which process of a deployment is meant, as data; its name is made from that, here and nowhere else."""

from dataclasses import dataclass
from typing import Literal

ProcessRole = Literal["target", "draft", "scheduler", "gateway"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessId:
    role: ProcessRole
    replica: int = 0
    rank: int | None = None  # of a worker in its group; None: a control process

    @property
    def name(self) -> str:
        """For people, logs and actors: "target-0.1", "scheduler-0"."""
        process = f"{self.role}-{self.replica}"
        return process if self.rank is None else f"{process}.{self.rank}"

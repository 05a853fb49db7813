"""Which process of a deployment is meant, as data; its name is made from that, here and nowhere else."""

from dataclasses import dataclass
from typing import Literal

ProcessRole = Literal["target", "draft", "scheduler", "gateway"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PartId:
    """What is lost, and started again, as a whole: a worker group, a scheduler, the gateway."""

    role: ProcessRole
    replica: int = 0

    @property
    def name(self) -> str:
        """For people: "target-0"."""
        return f"{self.role}-{self.replica}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessId:
    role: ProcessRole
    replica: int = 0
    rank: int | None = None  # of a worker in its group; None: a control process

    @property
    def name(self) -> str:
        """For people, logs and actors: "target-0.1", "scheduler-0"."""
        return self.part.name if self.rank is None else f"{self.part.name}.{self.rank}"

    @property
    def part(self) -> PartId:
        return PartId(role=self.role, replica=self.replica)

"""What can go wrong between a deployment file and a running deployment, in words for the person who wrote the file."""

from collections.abc import Sequence
from dataclasses import dataclass

_MAX_SHOWN_CHARS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One problem: where it is, the value there, what is wrong with it and what to do."""

    path: str  # "target.tensor_parallel_size"
    message: str
    remedy: str = ""  # empty where the message says it all
    value: str | None = None  # as written; None where nothing is written
    line: int | None = None  # of the file, from 1

    def __str__(self) -> str:
        where = self.path if self.value is None else f"{self.path}: {_cut(self.value)}"
        line = "" if self.line is None else f"line {self.line}: "
        remedy = f"; {self.remedy}" if self.remedy else ""
        return f"{line}{where}: {self.message}{remedy}"


def _cut(value: str) -> str:
    return value if len(value) <= _MAX_SHOWN_CHARS else f"{value[:_MAX_SHOWN_CHARS]}..."


class ConfigError(ValueError):
    """The deployment file, or a model folder that it names, cannot be served as it is. One line a problem."""

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        self.source = source
        self.problems = tuple(problems)
        super().__init__("\n".join(f"{source}: {problem}" for problem in problems))


class StartError(RuntimeError):
    """A process did not come up; holds that process's own error. `detail` is its traceback or log tail."""

    def __init__(self, message: str, detail: str = "") -> None:
        self.detail = detail
        super().__init__(message, detail)

    def __str__(self) -> str:
        return str(self.args[0])


class DeploymentNotFoundError(LookupError):
    """No deployment of that name is known here."""


class PlanError(StartError):
    """The cluster as it is now has no place for the deployment, or Ray did not follow the plan."""

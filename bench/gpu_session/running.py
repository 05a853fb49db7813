"""Runs commands one after another within a budget of time, and keeps what each of them gave as soon as it ends."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

SUMMARY = "summary.md"
RESULTS = "results.json"
LEAST_S = 5.0  # a step with less time left is not begun
GRACE_S = 5.0  # between asking a step to end and killing it

Status = Literal["passed", "failed", "timed out", "not run"]

# What names an error best, first: the assertion of pytest, the last line of a traceback, a line that says so.
_ERRORS = (r"^E  +(.+)$", r"^([\w.]*(?:Error|Exception|Timeout)\b.*)$", r"^(.*\b(?:error|ERROR|FAILED)\b.*)$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A command with the longest time that it may take."""

    name: str  # also the name of its log
    shows: str  # what passing shows
    command: Sequence[str]
    limit_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a step."""

    name: str
    shows: str
    command: Sequence[str]
    status: Status
    seconds: float = 0.0
    error: str = ""  # the first one that its output names


def run_steps(
    steps: Sequence[Step],
    folder: Path,
    *,
    budget_s: float,
    environment: Mapping[str, str] | None = None,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Run the steps in order, each as a process group of its own that is gone when its time is over.

    `folder` gets a log of each step and, after every step, the results so far: a run that is cut off loses only the
    step that it was in. A step that fails does not keep the others from running.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + budget_s
    outcomes: list[Outcome] = []
    for step in steps:
        left_s = ends - time.monotonic()
        outcome = _outcome(step, "not run") if left_s < LEAST_S else _run(step, folder, left_s, environment or {})
        outcomes.append(outcome)
        _save(outcomes, folder)
        on_outcome(outcome)
    return outcomes


def first_error(text: str) -> str:
    """The line of a program's output that says best what went wrong first; empty if none does."""
    for pattern in _ERRORS:
        found = re.search(pattern, text, re.M)
        if found:
            return found.group(1).strip()
    return ""


def summary(outcomes: Sequence[Outcome]) -> str:
    """A Markdown list of all steps."""
    lines = []
    for outcome in outcomes:
        lines.append(f"- **{outcome.status}** {outcome.name} ({outcome.seconds:.0f} s): {outcome.shows}")
        if outcome.error:
            lines.append(f"  first error: `{outcome.error}`")
    return "\n".join(lines) + "\n"


def _run(step: Step, folder: Path, left_s: float, environment: Mapping[str, str]) -> Outcome:
    path = folder / f"{step.name}.log"
    began = time.monotonic()
    with path.open("wb") as log:
        try:
            process = subprocess.Popen(
                step.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | environment,
                start_new_session=True,
            )
        except OSError as error:  # a program that is not there
            return _outcome(step, "failed", error=str(error))
        status: Status
        try:
            status = "failed" if process.wait(min(step.limit_s, left_s)) else "passed"
        except subprocess.TimeoutExpired:
            status = "timed out"
        finally:
            _end_group(process)
    error = "" if status == "passed" else first_error(path.read_text(errors="replace"))
    return _outcome(step, status, time.monotonic() - began, error)


def _end_group(process: "subprocess.Popen[bytes]") -> None:
    """End the step and all that it has started."""
    for number, patience_s in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, GRACE_S)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(patience_s)
        except subprocess.TimeoutExpired:
            continue


def _outcome(step: Step, status: Status, seconds: float = 0.0, error: str = "") -> Outcome:
    return Outcome(name=step.name, shows=step.shows, command=step.command, status=status, seconds=seconds, error=error)


def _save(outcomes: Sequence[Outcome], folder: Path) -> None:
    (folder / RESULTS).write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1))
    (folder / SUMMARY).write_text(summary(outcomes))

"""What all commands share: where output goes, and how errors become exit codes."""

import contextlib
import dataclasses
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from cluster.errors import ConfigError, DeploymentNotFoundError, PlanError, StartError
from echelon.errors import EchelonError, InvalidRequestError, NotFoundError

_MIB, _GIB, _TIB = 1 << 20, 1 << 30, 1 << 40
EXIT_FAILED = 1
_EXIT_USAGE = 2
_EXIT_INTERRUPTED = 130
EXIT_CODES_HELP = (
    "Exit codes: 0 success; 1 failure at run time (no answer, a process died, not ready); "
    "2 wrong input (an option, the deployment file, the request), so trying again will not help; "
    "130 interrupted. Errors and progress go to standard error, results to standard output."
)

P = ParamSpec("P")


class UsageProblem(Exception):
    """The user's input is wrong. The message says what to change."""


def stdout() -> Console:
    """For results. Created on each call, because the stream may have been replaced since import."""
    return Console(file=sys.stdout, highlight=False)


def stderr() -> Console:
    """For progress and errors."""
    return Console(file=sys.stderr, highlight=False)


def write(text: str) -> None:
    """Write text as it is, without markup or wrapping, and flush it."""
    sys.stdout.write(text)
    sys.stdout.flush()


def write_json(value: Any) -> None:
    """Write one JSON document. Dataclasses become objects."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    write(json.dumps(value, indent=2, default=str) + "\n")


def size_text(num_bytes: float) -> str:
    if num_bytes >= _TIB:
        return f"{num_bytes / _TIB:.1f} TiB"
    return f"{num_bytes / _GIB:.1f} GiB" if num_bytes >= _GIB else f"{num_bytes / _MIB:.1f} MiB"


def plain_table(*headings: str) -> Table:
    """A table whose only line is below its headings."""
    return Table(*headings, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)


def report_error(message: str) -> None:
    console = stderr()
    console.print("error:", style="bold red", end=" ")
    # What a file holds may not be printable here; that must not hide what is wrong with it.
    printable = message.encode(console.encoding, "backslashreplace").decode(console.encoding)
    console.print(printable, markup=False, soft_wrap=True)


def exits(command: Callable[P, None]) -> Callable[P, None]:
    """Turn the expected errors of a command into a message and an exit code. Unexpected errors keep their traceback."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except (UsageProblem, ConfigError, InvalidRequestError, NotFoundError) as err:
            report_error(str(err))
            raise typer.Exit(_EXIT_USAGE) from err
        except (EchelonError, PlanError, StartError, DeploymentNotFoundError) as err:
            report_error(str(err))
            raise typer.Exit(EXIT_FAILED) from err
        except BrokenPipeError as err:  # `echelon generate ... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing more to flush into the pipe
            raise typer.Exit(EXIT_FAILED) from err
        except KeyboardInterrupt as err:
            report_error("interrupted")
            raise typer.Exit(_EXIT_INTERRUPTED) from err

    return run


@contextlib.contextmanager
def cluster_extra() -> Iterator[None]:
    """Wraps imports that need `pip install 'echelon[cluster]'`."""
    try:
        yield
    except ModuleNotFoundError as err:
        raise UsageProblem(
            f"this command needs the package {err.name!r}, which is not installed: pip install 'echelon[cluster]'"
        ) from err

"""trace: record what the engines of a running deployment do."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from echelon.cli.connection import connect_operator
from echelon.cli.generate import DEFAULT_ADDRESS, AddressOption
from echelon.cli.output import EXIT_FAILED, UsageProblem, exits, report_error, stderr
from echelon.cli.trace_file import chrome_trace
from echelon.errors import EchelonError
from echelon.pb import scheduler_pb2

_DEFAULT_TRACE_S = 5.0


@exits
def trace(
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write.")] = Path("trace.json"),
    rounds: Annotated[int | None, typer.Option(min=1, help="Stop after this many rounds of the target.")] = None,
    seconds: Annotated[
        float | None,
        typer.Option(min=0.001, help=f"Stop after this many seconds. Default without --rounds: {_DEFAULT_TRACE_S:g}."),
    ] = None,
    replica: Annotated[int, typer.Option(min=0, help="Replica to record.")] = 0,
    address: AddressOption = DEFAULT_ADDRESS,
) -> None:
    """Record what every rank does, for https://ui.perfetto.dev or chrome://tracing.

    Ctrl-C ends the recording and keeps what was recorded.
    """
    duration_s = seconds if seconds is not None else (0.0 if rounds else _DEFAULT_TRACE_S)
    _check_writable(out)
    with connect_operator(address) as control:
        events = _record(control.trace(num_rounds=rounds or 0, duration_s=duration_s, replica=replica))
    counts = Counter(event.round.group for event in events if event.HasField("round"))
    if not counts:
        report_error("no round ran; send requests during the recording")
        raise typer.Exit(EXIT_FAILED)
    out.write_text(json.dumps(chrome_trace(events)))
    found = ", ".join(f"{count} rounds of the {group} group" for group, count in sorted(counts.items(), reverse=True))
    num_moves = sum(event.HasField("move") for event in events)
    moves = f", {num_moves} moves of KV" if num_moves else ""
    stderr().print(f"{out}: {found}{moves}", markup=False, soft_wrap=True)


def _check_writable(out: Path) -> None:
    """Check before the recording, so that it is not lost because the file cannot be written."""
    try:
        out.open("a").close()
    except OSError as err:
        raise UsageProblem(f"--out: {out} cannot be written: {err.strerror}") from err


def _record(stream: Iterable[scheduler_pb2.TraceEvent]) -> list[scheduler_pb2.TraceEvent]:
    events: list[scheduler_pb2.TraceEvent] = []
    try:
        with stderr().status("recording"):
            for event in stream:
                events.append(event)
    except EchelonError as err:
        if not events:
            raise
        report_error(f"the recording ended early: {err}")
    except KeyboardInterrupt:
        stderr().print("stopped", style="dim")
    return events

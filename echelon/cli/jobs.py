"""jobs and run-batch: many requests at once, which survive everything."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from echelon.cli.connection import connect
from echelon.cli.generate import DEFAULT_ADDRESS, AddressOption
from echelon.cli.output import EXIT_FAILED, UsageProblem, exits, plain_table, stderr, stdout, write, write_json
from echelon.client import Client
from echelon.errors import EchelonError, UnavailableError
from echelon.jobs import Job

JobArgument = Annotated[str, typer.Argument(help="The id of a job.", show_default=False)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
_POLL_S = 0.5
_PATIENCE_S = 300.0  # for a gateway that is away while a job is watched
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def jobs_app() -> typer.Typer:
    app = typer.Typer(no_args_is_help=True, help="Submit, watch and cancel jobs, and fetch their results.")
    app.command()(submit)
    app.command("list")(show_all)
    app.command()(show)
    app.command()(cancel)
    app.command()(results)
    return app


@exits
def submit(
    file: Annotated[Path, typer.Argument(help="Lines of requests, as for OpenAI's batches.", show_default=False)],
    address: AddressOption = DEFAULT_ADDRESS,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show the progress until the job has ended.")] = False,
    window: Annotated[str, typer.Option(help="Time after which the job expires: 30m, 24h, 7d.")] = "24h",
    key: Annotated[str, typer.Option("--idempotency-key", help="Submitting again with it is the same job.")] = "",
    seed: Annotated[int | None, typer.Option(min=0, help="Of items without seeds of their own.")] = None,
    json: JsonOption = False,
) -> None:
    """Submit a job and print its id."""
    with connect(address) as client:
        job = _submit(client, file, window=window, key=key, seed=seed)
        if not json:
            write(job.job_id + "\n")
        if watch:
            job = follow(client, job)
        if json:
            write_json(job)
    _check(job)


@exits
def show_all(
    address: AddressOption = DEFAULT_ADDRESS,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="The newest so many.")] = 20,
    json: JsonOption = False,
) -> None:
    """List jobs, the newest first."""
    with connect(address) as client:
        jobs = [job for job, _ in zip(client.jobs.list(), range(limit), strict=False)]
    if json:
        write_json([dataclasses.asdict(job) for job in jobs])
        return
    table = plain_table("job", "state", "done", "errors", "of", "submitted", "left")
    for job in jobs:
        submitted = time.strftime("%Y-%m-%d %H:%M", time.localtime(job.created_at))
        counts = map(str, (job.num_completed, job.num_failed, job.num_items))
        table.add_row(job.job_id, job.state, *counts, submitted, _left(job))
    stdout().print(table)


@exits
def show(job_id: JobArgument, address: AddressOption = DEFAULT_ADDRESS, json: JsonOption = False) -> None:
    """Show the state of a job."""
    with connect(address) as client:
        job = client.jobs.get(job_id)
    if json:
        write_json(job)
        return
    table = plain_table("", "")
    table.show_header = False
    for name, value in dataclasses.asdict(job).items():
        if value not in (None, "", (), {}):
            table.add_row(name, "; ".join(value) if name == "problems" else str(value))
    stdout().print(table)


@exits
def cancel(job_id: JobArgument, address: AddressOption = DEFAULT_ADDRESS) -> None:
    """Cancel a job. Items that have ended keep their results."""
    with connect(address) as client:
        job = client.jobs.cancel(job_id)
    stderr().print(f"{job.job_id} is {job.state}", markup=False)


@exits
def results(
    job_id: JobArgument,
    address: AddressOption = DEFAULT_ADDRESS,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Default: standard output.")] = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Only those that are there.")] = False,
) -> None:
    """Write the results as JSON lines, in the order of the requests, errors among them."""
    with connect(address) as client, _writing(output) as out:
        for line in lines_of(client, job_id, follow=not no_wait):
            out(line + "\n")


@exits
def run_batch(
    input_file: Annotated[Path, typer.Option("--input-file", "-i", help="Lines of requests.")],
    output_file: Annotated[Path, typer.Option("--output-file", "-o", help="Gets a line for each, errors among them.")],
    address: AddressOption = DEFAULT_ADDRESS,
    window: Annotated[str, typer.Option(help="Time after which what is left expires: 30m, 24h, 7d.")] = "24h",
    seed: Annotated[int | None, typer.Option(min=0, help="Of items without seeds of their own.")] = None,
) -> None:
    """Run a file of requests against a deployment, as `vllm run-batch` does. If this command is lost, the job goes on:
    `echelon jobs list` shows it."""
    with connect(address) as client, _writing(output_file) as out:
        job = _submit(client, input_file, window=window, key="", seed=seed)
        stderr().print(f"job {job.job_id}", markup=False)
        job = follow(client, job)
        for line in lines_of(client, job.job_id, follow=True):
            out(line + "\n")
    _check(job)


def follow(client: Client, job: Job) -> Job:
    """Shows how far a job is until it has ended, also while its gateway is away for a while."""
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[pace]}"),
        TimeRemainingColumn(),
        console=stderr(),
    )
    with progress:
        task = progress.add_task(job.state, total=None, pace="")
        while not job.has_ended:
            _update(progress, task, job)
            time.sleep(_POLL_S)
            job = _patiently(client, job)
        _update(progress, task, job)
    return job


def lines_of(client: Client, job_id: str, *, follow: bool) -> Iterator[str]:
    """Of the results; a connection that is lost is made again where it was lost. Raises EchelonError."""
    after, lost_at_s = None, None
    while True:
        try:
            for result in client.jobs.results(job_id, after=after, follow=follow):
                yield result.line
                after, lost_at_s = result.number, None
        except UnavailableError:
            lost_at_s = lost_at_s or time.monotonic()
            if time.monotonic() - lost_at_s > _PATIENCE_S:
                raise
            time.sleep(_POLL_S)
        else:
            return


def _patiently(client: Client, job: Job) -> Job:
    """Its new state. Raises EchelonError."""
    deadline_s = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return client.jobs.get(job.job_id)
        except UnavailableError:
            if time.monotonic() > deadline_s:
                raise
        time.sleep(_POLL_S)


def _update(progress: Progress, task: TaskID, job: Job) -> None:
    pace = "" if job.items_per_s is None else f"{job.items_per_s:.1f}/s"
    errors = f", {job.num_failed} errors" if job.num_failed else ""
    done = job.num_completed + job.num_failed
    total = job.num_items if job.state != "validating" else None
    progress.update(task, description=job.state, completed=done, total=total, pace=pace + errors)


def _submit(client: Client, file: Path, *, window: str, key: str, seed: int | None) -> Job:
    try:
        return client.jobs.submit(file, completion_window_s=_seconds(window), idempotency_key=key, seed=seed)
    except OSError as err:
        raise UsageProblem(f"{file} cannot be read ({err.strerror})") from err


def _seconds(window: str) -> float:
    number, unit = window[:-1], window[-1:]
    if not number.isdecimal() or unit not in _UNITS:
        raise UsageProblem(f"--window: must be a number and s, m, h or d, like 24h, got {window!r}")
    return float(number) * _UNITS[unit]


def _check(job: Job) -> None:
    """A job that ended badly ends the command with an error."""
    if job.state == "failed":
        raise UsageProblem("; ".join(job.problems))
    if job.state in ("expired", "cancelled"):
        raise EchelonError("ABORTED", f"the job is {job.state}")
    if job.num_failed:
        stderr().print(f"{job.num_failed} of {job.num_items} items have errors", markup=False)
        raise typer.Exit(EXIT_FAILED)


def _left(job: Job) -> str:
    return "" if job.has_ended or job.eta_s is None else f"{job.eta_s:.0f} s"


@contextlib.contextmanager
def _writing(path: Path | None) -> Iterator[Callable[[str], object]]:
    """How to write to it, or to standard output."""
    if path is None:
        yield write
        return
    try:
        stream = path.open("w", encoding="utf-8")
    except OSError as err:
        raise UsageProblem(f"{path} cannot be written ({err.strerror})") from err
    with stream:
        yield stream.write

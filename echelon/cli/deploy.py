"""plan, up, status, down, schema: everything that needs the `cluster` extra."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from cluster.errors import DeploymentNotFoundError, StartError
from echelon.cli.output import (
    EXIT_FAILED,
    UsageProblem,
    cluster_extra,
    exits,
    plain_table,
    size_text,
    stderr,
    stdout,
    write_json,
)
from echelon.cli.tiers import fill_of, state_of, trouble_of
from echelon.cli.watch import watch

if TYPE_CHECKING:
    from cluster.lifecycle import UpEvent
    from cluster.planning.plan import Bundle, ControlProcess, Plan
    from cluster.processes.status import DeploymentStatus, ProcessStatus, TierUse

SERVING = ("READY", "DEGRADED")
_STATE_STYLES = {
    "READY": "green",
    "DEGRADED": "yellow",
    "NOT_RESPONDING": "bold red",
    "FAILED": "bold red",
    "STARTING": "cyan",
}

FileArgument = Annotated[Path, typer.Argument(help="Deployment file.", show_default=False)]
RayOption = Annotated[
    str | None,
    typer.Option(
        "--ray-address",
        envvar="RAY_ADDRESS",
        help="Address of the Ray cluster (host:port). By default, a private Ray is started here.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]


@exits
def plan(file: FileArgument, ray_address: RayOption = None, json: JsonOption = False) -> None:
    """Check a deployment file and show what would run where. This starts nothing."""
    with cluster_extra():
        from cluster import lifecycle
    made = lifecycle.plan(file, ray_address=ray_address)
    if json:
        write_json(made)
    else:
        stdout().print(plan_table(made))


@exits
def up(
    file: FileArgument,
    ray_address: RayOption = None,
    timeout: Annotated[
        float | None,
        typer.Option(min=1, help="Give up after this many seconds. Default: startup_timeout_s of the file."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Start a deployment and return once it serves. A failure or Ctrl-C takes everything down again."""
    with cluster_extra():
        from cluster import lifecycle
    with StartupDisplay(stderr()) as display:
        status = lifecycle.up(file, ray_address=ray_address, on_event=display.on_event, timeout_s=timeout)
    if json:
        write_json(status)
        return
    out = stdout()
    out.print(f"[bold]{status.name}[/bold] serves [bold]{status.model}[/bold] at [bold]{status.endpoint}[/bold]")
    if status.metrics_url:
        out.print(f"metrics: {status.metrics_url}")
    out.print(f"try: echelon generate 'def main(' --address {status.endpoint} --stats", style="dim")


@exits
def status(
    name: Annotated[
        str | None, typer.Argument(help="Name of the deployment; needed only if there are several.")
    ] = None,
    json: JsonOption = False,
    watching: Annotated[
        bool, typer.Option("--watch", "-w", help="Show tokens/s and speculation statistics until Ctrl-C.")
    ] = False,
    address: Annotated[
        str | None, typer.Option(help="With --watch: host:port of a gateway, instead of a name.")
    ] = None,
    interval: Annotated[float, typer.Option(min=0.1, help="With --watch: seconds between updates.")] = 1.0,
    count: Annotated[int | None, typer.Option(min=1, help="With --watch: stop after this many updates.")] = None,
) -> None:
    """Show a deployment and its processes. The exit code is 0 only if it serves."""
    if watching:
        watch(address or _endpoint_of(name), interval_s=interval, count=count, json_lines=json)
        return
    if address or count:
        raise UsageProblem("--address and --count need --watch")
    with cluster_extra():
        from cluster import lifecycle
    found = lifecycle.status(name or _the_only_deployment(lifecycle.list_deployments))
    if json:
        write_json(found)
    else:
        _print_status(stdout(), found)
    if found.state not in SERVING:
        raise typer.Exit(EXIT_FAILED)


@exits
def down(
    name: Annotated[
        str | None, typer.Argument(help="Name of the deployment; needed only if there are several.")
    ] = None,
) -> None:
    """Stop every process of a deployment, and the Ray that was started for it."""
    with cluster_extra():
        from cluster import lifecycle
    name = name or _the_only_deployment(lifecycle.list_deployments)
    err = stderr()
    with err.status(f"taking {name} down"):
        lifecycle.down(name)
    err.print(f"{name} is down")


@exits
def schema() -> None:
    """Print the JSON schema of the deployment file, for editors."""
    with cluster_extra():
        from cluster.deployment.schema import json_schema
    write_json(json_schema())


def _endpoint_of(name: str | None) -> str:
    with cluster_extra():
        from cluster import lifecycle
    found = lifecycle.status(name or _the_only_deployment(lifecycle.list_deployments))
    if not found.endpoint:
        raise StartError(f"{found.name} is {found.state} and has no gateway yet; look at: echelon status {found.name}")
    return found.endpoint


def _the_only_deployment(list_deployments: Callable[[], list[str]]) -> str:
    names = list_deployments()
    if not names:
        raise DeploymentNotFoundError("no deployment was started from this machine")
    if len(names) > 1:
        raise UsageProblem(f"there are several deployments; name one of them: {', '.join(names)}")
    return names[0]


def plan_table(made: "Plan") -> Table:
    """Where each process runs, and how much memory it takes."""
    table = plain_table()
    nodes = {made.scheduler.address, made.gateway.address, *(bundle.address for bundle in made.bundles)}
    where = (
        "" if len(nodes) > 1 else f", node {made.gateway.address}"
    )  # a column less: 80 characters must show all sizes
    table.title, table.title_justify = f"plan of {made.deployment} on {made.device}{where}", "left"
    remarks = "\n".join(_remarks(made))
    table.caption, table.caption_justify = Text(remarks) if remarks else None, "left"
    for heading in ("process", *(["node"] if len(nodes) > 1 else []), "devices"):
        table.add_column(heading, no_wrap=True)
    has_host_tier = any(bundle.memory.host_bytes for bundle in made.bundles)
    for heading in ("weights", "KV cache", "activations", "total", *(["host KV"] if has_host_tier else [])):
        table.add_column(heading, justify="right", no_wrap=True)
    for bundle in made.bundles:
        memory = bundle.memory
        sizes = [memory.weight_bytes, memory.kv_cache_bytes, memory.activation_bytes, memory.total_bytes]
        if has_host_tier:
            sizes.append(memory.host_bytes)
        if bundle.num_gpus:
            devices = f"{bundle.num_gpus} GPU"
        elif bundle.cpu_ids:
            devices = f"cores {', '.join(map(str, bundle.cpu_ids))}"
        else:
            devices = "shared"
        table.add_row(*_place(bundle, nodes), devices, *(size_text(size) for size in sizes))
    for process in (made.scheduler, made.gateway):
        table.add_row(*_place(process, nodes))
    return table


def _place(process: "Bundle | ControlProcess", nodes: set[str]) -> list[str]:
    """Its cells in the columns of names and, if there are several, nodes."""
    return [process.name, process.address] if len(nodes) > 1 else [process.name]


def _remarks(made: "Plan") -> Iterator[str]:
    if made.eos:
        listed = ", ".join(f"{token.token_id} {token.text!r} ({', '.join(token.files)})" for token in made.eos)
        yield f"a stream stops at token {listed}"
    yield from (f"note: {note}" for note in made.notes)


def _print_status(out: Console, found: "DeploymentStatus") -> None:
    style = _STATE_STYLES.get(found.state, "")
    reason = f": {found.reason}" if found.reason else ""
    out.print(Text.assemble((found.name, "bold"), " is ", (str(found.state), style), reason))
    ray = f"{found.ray_address} (started for it)" if found.private_ray else found.ray_address
    metrics = f", metrics {found.metrics_url}" if found.metrics_url else ""
    out.print(f"model {found.model}, endpoint {found.endpoint}{metrics}, Ray {ray}", markup=False)
    out.print(process_table(found.processes))
    if found.tiers:
        out.print(tier_table(found.tiers))


def process_table(processes: "tuple[ProcessStatus, ...]") -> Table:
    table = plain_table("process", "state", "node", "devices", "pid", "")
    for process in processes:
        table.add_row(
            process.name,
            Text(str(process.state), style=_STATE_STYLES.get(process.state, "")),
            process.node,
            process.devices,
            "" if process.pid is None else str(process.pid),
            _doing(process),
        )
    return table


def tier_table(tiers: "tuple[TierUse, ...]") -> Table:
    """Host memory and disk behind the device blocks of each engine."""
    table = plain_table("KV cache", "tier")
    for heading in ("used", "of", "stored", "fetched", "failed", "evicted"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column()
    for tier in tiers:
        counts = (tier.num_stored, tier.num_fetched, tier.num_failed, tier.num_evicted)
        table.add_row(tier.engine, tier.tier, *fill_of(tier), *map(str, counts), state_of(tier))
    troubles = [f"{tier.engine} {tier.tier}: {trouble}" for tier in tiers if (trouble := trouble_of(tier))]
    caption = Text("\n".join(["bytes are those on each rank, numbers are blocks", *troubles]))
    table.caption, table.caption_justify = caption, "left"
    return table


def _doing(process: "ProcessStatus") -> RenderableType:
    """What a process is doing: its error, or the stage that it reported, with a bar if the total is known."""
    if process.error:
        return Text(process.error, style="red")
    if process.state in SERVING or not process.stage:
        return process.address
    if not process.total:
        return process.stage
    line = Table.grid(padding=(0, 1))
    line.add_row(process.stage, ProgressBar(total=process.total, completed=process.done, width=20))
    return line


class StartupDisplay:
    """Progress of `up`: a live table on a terminal, a line for each change elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        waiting = Spinner("dots", "connecting to Ray")
        self._live = Live(waiting, console=console, transient=True) if console.is_terminal else None
        self._processes: dict[str, ProcessStatus] = {}

    def __enter__(self) -> "StartupDisplay":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def on_event(self, event: "UpEvent") -> None:
        from cluster.lifecycle import PlanMade, ProcessChanged, RayConnected

        match event:
            case RayConnected(address=address, private=private):
                self._console.print(f"{'started' if private else 'connected to'} Ray at {address}")
            case PlanMade(plan=made):
                self._console.print(plan_table(made))
            case ProcessChanged(process=process):
                self._on_process(process)

    def _on_process(self, process: "ProcessStatus") -> None:
        before = self._processes.get(process.name)
        self._processes[process.name] = process
        if self._live is not None:
            self._live.update(process_table(tuple(self._processes.values())))
        elif before is not None and (before.state, before.stage) != (process.state, process.stage):
            doing = process.error or process.stage or process.address
            self._console.print(f"{process.name} {process.state} {doing}".rstrip(), markup=False, soft_wrap=True)

"""plan, up, status, down, schema: everything that needs the `cluster` extra."""

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from cluster.errors import DeploymentNotFoundError, StartError
from echelon.cli.deploy_tables import (
    SERVING,
    STATE_STYLES,
    changes_table,
    drafters_table,
    plan_table,
    process_table,
    tier_table,
)
from echelon.cli.output import (
    EXIT_FAILED,
    UsageProblem,
    cluster_extra,
    exits,
    stderr,
    stdout,
    write_json,
)
from echelon.cli.watch import watch

if TYPE_CHECKING:
    from cluster.lifecycle import UpEvent
    from cluster.processes.status import DeploymentStatus, ProcessStatus

_SHOWN_EVENTS = 8

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
def plan(
    ctx: typer.Context,
    file: FileArgument,
    ray_address: RayOption = None,
    inventory: Annotated[
        Path | None,
        typer.Option(help="YAML file that lists the machines. By default, the cluster or this machine is asked."),
    ] = None,
    acceptance: Annotated[
        list[float] | None,
        typer.Option(min=0, max=1, help="Estimate what drafters gain if this share of drafts is accepted. Repeatable."),
    ] = None,
    bandwidth: Annotated[
        float | None,
        typer.Option(min=0.001, help="GB/s that a device reads from its memory, for --acceptance. Default: assumed."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Check a deployment file and show what would run where. This starts nothing."""
    source = ctx.get_parameter_source("ray_address")  # an environment is no choice between the two
    if inventory is not None and source is not None and source.name == "COMMANDLINE":
        raise UsageProblem("--inventory and --ray-address: give one; a plan is for listed machines or for a cluster")
    with cluster_extra():
        from cluster import lifecycle
    made = lifecycle.plan(
        file,
        ray_address=ray_address,
        inventory=inventory,
        acceptances=acceptance or (),
        bandwidth=None if bandwidth is None else bandwidth * 1e9,
    )
    if json:
        write_json(made)
    else:
        stdout().print(plan_table(made))
        if made.drafters:
            stdout().print(drafters_table(made))


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
    else:
        print_ready(status)


def print_ready(status: "DeploymentStatus") -> None:
    """Where a deployment serves."""
    out = stdout()
    out.print(f"[bold]{status.name}[/bold] serves [bold]{status.model}[/bold] at [bold]{status.endpoint}[/bold]")
    if status.http_url:
        out.print(f"OpenAI API: {status.http_url}/v1, metrics: {status.http_url}/metrics")
    out.print(f"try: echelon generate 'def main(' --address {status.endpoint} --stats", style="dim")


@exits
def apply(
    file: FileArgument,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would change, and change nothing.")] = False,
    json: JsonOption = False,
) -> None:
    """Change a running deployment to what its edited file says. Replicas come and go while the others serve."""
    with cluster_extra():
        from cluster import lifecycle
    with StartupDisplay(stderr()) as display:
        status = lifecycle.apply(file, on_event=display.on_event, dry_run=dry_run)
    if json:
        write_json(status)
    elif not dry_run:
        stdout().print(f"[bold]{status.name}[/bold] is {status.state}, replicas: {status.num_replicas}")


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
    found = lifecycle.status(name or the_only_deployment(lifecycle.list_deployments))
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
    name = name or the_only_deployment(lifecycle.list_deployments)
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
    found = lifecycle.status(name or the_only_deployment(lifecycle.list_deployments))
    if not found.endpoint:
        raise StartError(f"{found.name} is {found.state} and has no gateway yet; look at: echelon status {found.name}")
    return found.endpoint


def the_only_deployment(list_deployments: Callable[[], list[str]]) -> str:
    names = list_deployments()
    if not names:
        raise DeploymentNotFoundError("no deployment was started from this machine")
    if len(names) > 1:
        raise UsageProblem(f"there are several deployments; name one of them: {', '.join(names)}")
    return names[0]


def _print_status(out: Console, found: "DeploymentStatus") -> None:
    style = STATE_STYLES.get(found.state, "")
    reason = f": {found.reason}" if found.reason else ""
    out.print(Text.assemble((found.name, "bold"), " is ", (str(found.state), style), reason))
    ray = f"{found.ray_address} (started for it)" if found.private_ray else found.ray_address
    facts = {"model": found.model, "endpoint": found.endpoint, "HTTP": found.http_url, "Ray": ray}
    facts["batch_invariant"] = str((found.settings or {}).get("batch_invariant", "")).lower()
    facts["draft"] = str((found.settings or {}).get("draft", ""))
    if any(facts.values()):
        out.print(", ".join(f"{name} {fact}" for name, fact in facts.items() if fact), markup=False)
    if found.processes:
        out.print(process_table(found.processes))
    if found.tiers:
        out.print(tier_table(found.tiers))
    for event in found.events[-_SHOWN_EVENTS:]:
        when = datetime.fromtimestamp(event.at).astimezone().strftime("%H:%M:%S")
        out.print(f"{when} {event.part} {event.text}", markup=False, soft_wrap=True)


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
        self.close()

    def close(self) -> None:
        """Take the table away; idempotent."""
        if self._live is not None:
            self._live.stop()

    def on_event(self, event: "UpEvent") -> None:
        from cluster.lifecycle import ChangesFound, PlanMade, ProcessChanged, RayConnected

        match event:
            case RayConnected(address=address, private=private):
                self._console.print(f"{'started' if private else 'connected to'} Ray at {address}")
            case PlanMade(plan=made):
                self._console.print(plan_table(made))
            case ChangesFound(changes=found):
                self._console.print(changes_table(found) if found else "nothing differs from what runs")
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

"""scale, drain, restart, logs: what operators do with a deployment that runs."""

from contextlib import suppress
from typing import Annotated

import typer

from echelon.cli.deploy import StartupDisplay, the_only_deployment
from echelon.cli.output import EXIT_FAILED, UsageProblem, cluster_extra, exits, stderr, stdout

NameArgument = Annotated[str | None, typer.Argument(help="Name of the deployment; needed only if there are several.")]


@exits
def scale(
    name: NameArgument = None,
    *,
    replicas: Annotated[int, typer.Option(min=1, max=64, help="How many there should be.", show_default=False)],
) -> None:
    """Change the number of replicas while the deployment serves. The next `apply` goes by the file again."""
    with cluster_extra():
        from cluster import lifecycle
    name = name or the_only_deployment(lifecycle.list_deployments)
    with StartupDisplay(stderr()) as display:
        status = lifecycle.scale(name, replicas, on_event=display.on_event)
    stdout().print(f"[bold]{name}[/bold] is {status.state}, replicas: {status.num_replicas}")


@exits
def drain(
    name: NameArgument = None,
    timeout: Annotated[
        float | None, typer.Option(min=0, help="Seconds to wait. Default: drain_timeout_s of the file.")
    ] = None,
    undo: Annotated[bool, typer.Option("--undo", help="Take requests again.")] = False,
) -> None:
    """Take no new requests, and return when those that run have ended. The exit code is 0 only if none is left."""
    with cluster_extra():
        from cluster import lifecycle
    name = name or the_only_deployment(lifecycle.list_deployments)
    if undo:
        lifecycle.resume(name)
        stdout().print(f"[bold]{name}[/bold] takes requests again")
        return
    num_left = lifecycle.drain(name, timeout_s=timeout)
    stdout().print(f"[bold]{name}[/bold] takes no new requests; {num_left or 'none'} still run")
    if num_left:
        raise typer.Exit(EXIT_FAILED)


@exits
def restart(
    name: NameArgument = None,
    rank: Annotated[
        list[str] | None,
        typer.Option(help="A process or part, such as target-0.1, scheduler-0 or gateway-0; may be repeated."),
    ] = None,
) -> None:
    """Start parts again, one after the other; streams pause and go on. Without --rank: all but the gateway."""
    with cluster_extra():
        from cluster import lifecycle
    name = name or the_only_deployment(lifecycle.list_deployments)
    known = lifecycle.list_deployments()
    if known and name not in known and not rank:
        whose = known[0] if len(known) == 1 else "NAME"
        raise UsageProblem(
            f"{name!r} is no deployment; known: {', '.join(known)}. For a part of one: "
            f"echelon restart {whose} --rank {name}"
        )
    with StartupDisplay(stderr()) as display:
        status = lifecycle.restart(name, rank or (), on_event=display.on_event)
    stdout().print(f"[bold]{name}[/bold] is {status.state}")


@exits
def logs(
    name: Annotated[str, typer.Argument(help="Name of the deployment.", show_default=False)],
    process: Annotated[str | None, typer.Argument(help="Such as target-0.1. By default, all.")] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Show what is added, until Ctrl-C or echelon down.")
    ] = False,
    lines: Annotated[int, typer.Option(min=0, help="The last lines of each log.")] = 20,
) -> None:
    """Show the logs of the processes on this machine, also of those that were started again."""
    with cluster_extra():
        from cluster.logs import read_logs
    out = stdout()
    with suppress(KeyboardInterrupt):
        for line in read_logs(name, process, num_lines=lines, follow=follow):
            prefix = "" if process else f"{line.log}: "
            out.print(f"{prefix}{line.text}", markup=False, highlight=False, soft_wrap=True)
        if follow:
            stderr().print(f"{name} was taken down; its logs stay until the next deployment of that name")

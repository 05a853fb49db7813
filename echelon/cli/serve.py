"""serve: a deployment in the foreground, for containers and service managers."""

import logging
import signal
from typing import TYPE_CHECKING, Annotated, Any

import typer

from echelon.cli.deploy import FileArgument, RayOption, StartupDisplay, print_ready
from echelon.cli.output import cluster_extra, exits, stderr

if TYPE_CHECKING:
    from cluster.processes.status import DeploymentStatus


@exits
def serve(
    file: FileArgument,
    ray_address: RayOption = None,
    wait: Annotated[
        float, typer.Option(min=0, help="Seconds for which a cluster that has no place yet, or no Ray, is asked again.")
    ] = 0.0,
) -> None:
    """Start a deployment and stay until SIGTERM or Ctrl-C, which take it down, or until it fails. For containers and
    services. What an earlier process has left of the same name is taken down first."""
    with cluster_extra():
        from cluster import foreground

    def stop(*_: Any) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)  # it is already stopping
        raise foreground.Stopped

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    logging.basicConfig(format="%(message)s")
    display = StartupDisplay(stderr())

    def on_ready(status: "DeploymentStatus") -> None:
        display.close()
        print_ready(status)

    with display:
        foreground.serve(file, ray_address=ray_address, patience_s=wait, on_event=display.on_event, on_ready=on_ready)

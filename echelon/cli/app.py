"""The `echelon` command."""

from typing import Annotated

import typer

from echelon import __version__
from echelon.cli.connection import ENVIRONMENT_HELP
from echelon.cli.deploy import apply, down, plan, schema, status, up
from echelon.cli.generate import chat, generate
from echelon.cli.jobs import jobs_app, run_batch
from echelon.cli.operate import drain, logs, restart, scale
from echelon.cli.output import EXIT_CODES_HELP, write
from echelon.cli.serve import serve
from echelon.cli.token import token_app
from echelon.cli.trace import trace


def _print_version(wanted: bool) -> None:
    if wanted:
        write(f"echelon {__version__}\n")
        raise typer.Exit


def _app() -> typer.Typer:
    app = typer.Typer(
        name="echelon",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback(epilog=f"{EXIT_CODES_HELP}\n\n{ENVIRONMENT_HELP}")
    def echelon(
        version: Annotated[
            bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
        ] = False,
    ) -> None:
        """Serve a large language model with speculative decoding that never changes a token."""

    for command in (plan, up, apply, scale, drain, restart, logs, serve, status, down, generate, chat, trace, schema):
        app.command()(command)
    app.command("run-batch")(run_batch)
    app.add_typer(jobs_app(), name="jobs")
    app.add_typer(token_app(), name="token")
    return app


def main(arguments: list[str] | None = None) -> None:
    """Runs the command and exits with its code (see `echelon --help`)."""
    _app()(args=arguments, prog_name="echelon")


if __name__ == "__main__":
    main()

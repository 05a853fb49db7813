"""The `echelon` command."""

from typing import Annotated

import typer

from echelon import __version__
from echelon.cli.deploy import down, plan, schema, status, up
from echelon.cli.generate import chat, generate
from echelon.cli.output import EXIT_CODES_HELP, write
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

    @app.callback(epilog=EXIT_CODES_HELP)
    def echelon(
        version: Annotated[
            bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
        ] = False,
    ) -> None:
        """Serve a large language model with speculative decoding that never changes a token."""

    for command in (plan, up, status, down, generate, chat, trace, schema):
        app.command()(command)
    return app


def main(arguments: list[str] | None = None) -> None:
    """Runs the command and exits with its code (see `echelon --help`)."""
    _app()(args=arguments, prog_name="echelon")


if __name__ == "__main__":
    main()

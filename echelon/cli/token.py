"""token: who may call a gateway whose deployment has `server.auth`. Gateways see a change within a second."""

import fcntl
import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from google.protobuf import json_format

from echelon.cli.output import UsageProblem, exits, plain_table, stderr, stdout, write, write_json
from echelon.pb.access_pb2 import TokenRecord, TokensFile

FileOption = Annotated[Path, typer.Option("--file", "-f", envvar="ECHELON_TOKENS_FILE", help="The file of tokens.")]
_DEFAULT_FILE = Path("tokens.json")
_PREFIX = "ech_"  # so that a token is known as one where it should not be, in a log or in a repository
_TOKEN_BYTES = 32
_SCOPES = ("generate", "admin")


def token_app() -> typer.Typer:
    app = typer.Typer(no_args_is_help=True, help="Make, list and revoke tokens for a gateway's callers.")
    app.command()(create)
    app.command("list")(show)
    app.command()(revoke)
    return app


@exits
def create(
    name: Annotated[str, typer.Argument(help="Who will use it.")],
    file: FileOption = _DEFAULT_FILE,
    scope: Annotated[
        list[str] | None, typer.Option("--scope", help="generate or admin (metrics, traces); can be repeated.")
    ] = None,
    max_running: Annotated[int, typer.Option(min=0, help="Requests that may run at once; 0: no limit.")] = 0,
    per_minute: Annotated[int, typer.Option(min=0, help="Requests that may be sent in a minute; 0: no limit.")] = 0,
    cache_salt: Annotated[str, typer.Option(help="Share cached KV only with tokens of the same salt.")] = "",
) -> None:
    """Make a token and print it. Only its digest is kept, so it cannot be shown again."""
    scopes = list(dict.fromkeys(scope or ["generate"]))
    if unknown := set(scopes) - set(_SCOPES):
        raise UsageProblem(f"--scope: {sorted(unknown)[0]!r} is unknown; use {' or '.join(_SCOPES)}")
    if not name.strip():
        raise UsageProblem("NAME: is empty; say who will use the token")
    token = _PREFIX + secrets.token_urlsafe(_TOKEN_BYTES)
    record = TokenRecord(
        name=name,
        sha256=hashlib.sha256(token.encode()).hexdigest(),
        scopes=scopes,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        max_running_requests=max_running,
        max_requests_per_minute=per_minute,
        cache_salt=cache_salt,
    )
    with _changing(file) as tokens:
        if any(other.name == name for other in tokens.tokens):
            raise UsageProblem(f"NAME: {name!r} has a token in {file}; revoke it first, or choose another name")
        tokens.tokens.append(record)
    write(token + "\n")
    stderr().print(f"{name} may {' and '.join(scopes)}; {file} keeps only a digest", markup=False, soft_wrap=True)


@exits
def show(
    file: FileOption = _DEFAULT_FILE,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """List the tokens of a file, without the tokens themselves."""
    tokens = _read(file).tokens
    if json:
        write_json([json_format.MessageToDict(record, preserving_proto_field_name=True) for record in tokens])
        return
    table = plain_table("name", "may", "at once", "a minute", "made")
    for record in tokens:
        limits = (record.max_running_requests, record.max_requests_per_minute)
        table.add_row(record.name, ", ".join(record.scopes), *(str(n or "-") for n in limits), record.created_at)
    stdout().print(table)


@exits
def revoke(
    name: Annotated[str, typer.Argument(help="Whose token shall count no more.")], file: FileOption = _DEFAULT_FILE
) -> None:
    """Take a token out of a file. Requests that run go on."""
    with _changing(file) as tokens:
        left = [record for record in tokens.tokens if record.name != name]
        if len(left) == len(tokens.tokens):
            raise UsageProblem(f"NAME: {name!r} has no token in {file}")
        del tokens.tokens[:]
        tokens.tokens.extend(left)
    stderr().print(f"the token of {name} counts no more", markup=False)


@contextmanager
def _changing(path: Path) -> Iterator[TokensFile]:
    """The file's content, written back in one step when the block ends. Others who change it wait."""
    try:
        with path.with_name(path.name + ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            tokens = _read(path) if path.exists() else TokensFile()
            yield tokens
            _replace(path, json_format.MessageToJson(tokens, preserving_proto_field_name=True) + "\n")
    except OSError as err:
        raise UsageProblem(f"--file: {path} cannot be written ({err.strerror})") from err


def _read(path: Path) -> TokensFile:
    try:
        return json_format.Parse(path.read_bytes(), TokensFile())
    except OSError as err:
        raise UsageProblem(f"--file: {path} cannot be read ({err.strerror})") from err
    except (json_format.ParseError, UnicodeDecodeError) as err:
        raise UsageProblem(f"--file: {path} is no file of tokens: {err}") from err


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)

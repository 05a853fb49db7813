"""The file of `server.auth.tokens_file`, for the process that plans with it and the one that serves by it."""

import enum
import os
from pathlib import Path

from google.protobuf import json_format

from echelon.pb.access_pb2 import TokenRecord, TokensFile

_MAX_FILE_BYTES = 4 << 20  # it is read on an event loop


class Scope(enum.StrEnum):
    """What a token allows."""

    GENERATE = "generate"
    ADMIN = "admin"


class TokensFileError(ValueError):
    """The file cannot be used; the message names it and says what is wrong."""


def read_tokens_file(path: Path) -> TokensFile:
    """Raises TokensFileError."""
    try:
        with path.open("rb") as stream:
            text = stream.read(_MAX_FILE_BYTES + 1)
            stat = os.fstat(stream.fileno())
    except OSError as err:
        raise TokensFileError(f"{path} cannot be read ({err.strerror}); make it with `echelon token create`") from err
    if not is_kept_from_others(stat.st_mode, owner=stat.st_uid, reader=os.geteuid()):
        raise TokensFileError(f"{path} may be read by others: chmod 600 {path}")
    if len(text) > _MAX_FILE_BYTES:
        raise TokensFileError(f"{path} has more than {_MAX_FILE_BYTES >> 20} MiB; revoke tokens")
    try:
        file = json_format.Parse(text, TokensFile())
    except (json_format.ParseError, UnicodeDecodeError) as err:
        raise TokensFileError(f"{path} is no file of tokens: {err}") from err
    _check(file, path)
    return file


def is_kept_from_others(mode: int, *, owner: int, reader: int) -> bool:
    """Only its owner may read it. Root may also give a file to the reader's group, as Kubernetes does with secrets."""
    given_by_root = owner == 0 and reader != 0
    return not mode & (0o037 if given_by_root else 0o077)


def _check(file: TokensFile, path: Path) -> None:
    names: set[str] = set()
    for number, record in enumerate(file.tokens):
        if problem := _problem_of(record, names):
            raise TokensFileError(f"{path}: tokens[{number}].{problem}")
        names.add(record.name)


def _problem_of(record: TokenRecord, names: set[str]) -> str:
    """Empty: none."""
    if not record.name or record.name in names:
        return f"name: {record.name!r} must be neither empty nor used twice"
    if len(record.sha256) != 64 or set(record.sha256) - set("0123456789abcdef"):
        return "sha256: must be 64 hexadecimal digits in lower case"
    unknown = set(record.scopes) - set(Scope)
    if unknown or not record.scopes:
        return f"scopes: must name some of {', '.join(Scope)}, got {', '.join(record.scopes) or 'none'}"
    return ""

"""Tokens of a gateway's callers: the file, the command that changes it, and what each token allows."""

import json
from pathlib import Path
from typing import Any

import grpc
import pytest
from typer.testing import CliRunner

from childproc.tokens_file import Scope, TokensFileError, is_kept_from_others
from echelon.cli.token import token_app
from gateway.access.tokens import Tokens
from gateway.requests.refusal import Refusal


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def run(*arguments: str) -> str:
    result = CliRunner().invoke(token_app(), list(arguments))
    assert result.exit_code == 0, result.output
    return result.stdout.strip()


def create(path: Path, name: str, *options: str) -> str:
    """The token."""
    return run("create", name, "--file", str(path), *options)


def refusal_of(tokens: Tokens, authorization: str | None, scope: Scope = Scope.GENERATE) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(Refusal) as caught:
        tokens.caller(authorization, scope)
    return caught.value.code, caught.value.message


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tokens.json"


def test_a_token_that_was_made_is_known_and_the_file_does_not_hold_it(path: Path) -> None:
    token = create(path, "alice")
    assert Tokens(path).caller(f"Bearer {token}", Scope.GENERATE).name == "alice"
    assert token not in path.read_text()
    assert path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("authorization", "message"),
    [
        (None, "asks for a token"),
        ("", "asks for a token"),
        ("Bearer", "asks for a token"),
        ("Basic YTpi", "asks for a token"),
        ("Bearer wrong", "not known"),
        ("Bearer " + "x" * 100_000, "not known"),
        ("Bearer \N{PILE OF POO}", "not known"),
    ],
)
def test_who_has_no_token_gets_nothing(path: Path, authorization: str | None, message: str) -> None:
    create(path, "alice")
    code, text = refusal_of(Tokens(path), authorization)
    assert code is grpc.StatusCode.UNAUTHENTICATED
    assert message in text


def test_a_scope_is_needed_for_what_it_names(path: Path) -> None:
    token, operator = create(path, "alice"), create(path, "ops", "--scope", "admin")
    tokens = Tokens(path)
    assert tokens.caller(f"Bearer {operator}", Scope.ADMIN).name == "ops"
    for given, scope in ((token, Scope.ADMIN), (operator, Scope.GENERATE)):
        code, text = refusal_of(tokens, f"Bearer {given}", scope)
        assert code is grpc.StatusCode.PERMISSION_DENIED
        assert f"no scope {scope.value!r}" in text


def test_without_a_file_everyone_may_do_everything() -> None:
    caller = Tokens(None).caller(None, Scope.ADMIN)
    assert caller.may(Scope.GENERATE)
    assert caller.salt("mine") == "mine"


def test_a_change_of_the_file_counts_within_a_second(path: Path) -> None:
    clock = Clock()
    first = create(path, "alice", "--max-running", "1")
    tokens = Tokens(path, clock=clock)
    caller = tokens.caller(f"Bearer {first}", Scope.GENERATE)
    with caller.running():
        second = create(path, "bob")
        assert refusal_of(tokens, f"Bearer {second}")[0] is grpc.StatusCode.UNAUTHENTICATED
        clock.now += 1
        assert tokens.caller(f"Bearer {second}", Scope.GENERATE).name == "bob"
        with pytest.raises(Refusal, match="1 requests running"), caller.running():
            pytest.fail("the limit holds on over a change of the file")
    run("revoke", "alice", "--file", str(path))
    clock.now += 1
    assert refusal_of(tokens, f"Bearer {first}")[0] is grpc.StatusCode.UNAUTHENTICATED


def test_a_file_that_breaks_later_changes_nothing(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    token = create(path, "alice")
    tokens = Tokens(path, clock=clock)
    for content in ("{", '{"tokens": [{"name": "x"}]}'):
        path.write_text(content)
        clock.now += 1
        assert tokens.caller(f"Bearer {token}", Scope.GENERATE).name == "alice"
    path.unlink()
    clock.now += 1
    assert tokens.caller(f"Bearer {token}", Scope.GENERATE).name == "alice"
    assert len([record for record in caplog.records if "stay as they were" in record.message]) == 3


RECORD: dict[str, Any] = {"name": "a", "sha256": "0" * 64, "scopes": ["generate"]}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ([1], "is no file of tokens"),
        ({"tokens": {}}, "is no file of tokens"),
        ({"token": []}, 'no field named "token"'),
        ({"tokens": [{**RECORD, "name": ""}]}, "tokens[0].name: '' must be neither empty nor used twice"),
        ({"tokens": [RECORD, RECORD]}, "tokens[1].name: 'a' must be neither empty nor used twice"),
        ({"tokens": [{**RECORD, "sha256": "A" * 64}]}, "tokens[0].sha256: must be 64 hexadecimal digits"),
        ({"tokens": [{**RECORD, "scopes": []}]}, "tokens[0].scopes: must name some of generate, admin, got none"),
        ({"tokens": [{**RECORD, "scopes": ["root"]}]}, "got root"),
        ({"tokens": [{**RECORD, "max_running_requests": -1}]}, "is no file of tokens"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(path: Path, content: Any, problem: str) -> None:
    path.write_text(json.dumps(content))
    path.chmod(0o600)
    with pytest.raises(TokensFileError) as caught:
        Tokens(path)
    assert str(path) in str(caught.value)
    assert problem in str(caught.value)


def test_a_file_that_others_may_read_is_refused(path: Path) -> None:
    create(path, "alice")
    path.chmod(0o640)
    with pytest.raises(TokensFileError, match="may be read by others: chmod 600"):
        Tokens(path)
    with pytest.raises(TokensFileError, match="cannot be read"):
        Tokens(path.parent / "missing.json")


@pytest.mark.parametrize(
    ("mode", "owner", "reader", "kept"),
    [
        (0o600, 1000, 1000, True),
        (0o640, 1000, 1000, False),
        (0o440, 0, 1000, True),  # a secret of Kubernetes, with fsGroup
        (0o460, 0, 1000, False),
        (0o444, 0, 1000, False),
        (0o440, 0, 0, False),
    ],
)
def test_who_may_read_the_file(mode: int, owner: int, reader: int, kept: bool) -> None:
    assert is_kept_from_others(0o100000 | mode, owner=owner, reader=reader) is kept


def test_requests_a_minute(path: Path) -> None:
    clock = Clock()
    token = create(path, "alice", "--per-minute", "2")
    caller = Tokens(path, clock=clock).caller(f"Bearer {token}", Scope.GENERATE)
    for _ in range(2):
        with caller.running():
            pass
    with pytest.raises(Refusal, match=r"2 requests a minute; try again in 30\.0 s"), caller.running():
        pytest.fail("a third within the minute")
    clock.now += 30
    with caller.running():
        pass


def test_callers_with_salts_share_with_nobody(path: Path) -> None:
    options = {"alice": ("--cache-salt", "a"), "bob": ("--cache-salt", "b"), "carol": ()}
    made = {name: create(path, name, *given) for name, given in options.items()}
    tokens = Tokens(path)
    alice, bob, carol = (tokens.caller(f"Bearer {token}", Scope.GENERATE) for token in made.values())
    salts = {alice.salt(""), alice.salt("x"), bob.salt(""), bob.salt("x"), carol.salt(""), carol.salt("x"), "a", "b"}
    assert len(salts) == 8
    assert alice.salt("x") == alice.salt("x")


def test_the_command_says_what_is_wrong(path: Path) -> None:
    create(path, "alice")

    def error_of(*arguments: str) -> str:
        result = CliRunner().invoke(token_app(), [*arguments, "--file", str(path)])
        assert result.exit_code == 2
        return result.stderr

    before = path.read_bytes()
    assert "'alice' has a token" in error_of("create", "alice")
    assert "--scope: 'root' is unknown; use generate or admin" in error_of("create", "bob", "--scope", "root")
    assert "NAME: is empty" in error_of("create", " ")
    assert "NAME: 'bob' has no token" in error_of("revoke", "bob")
    assert path.read_bytes() == before
    assert [record["name"] for record in json.loads(run("list", "--json", "--file", str(path)))] == ["alice"]
    path.write_text("x")
    assert "is no file of tokens" in error_of("list")


def test_a_file_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = CliRunner().invoke(token_app(), ["create", "alice", "--file", str(tmp_path / "file" / "tokens.json")])
    assert result.exit_code == 2
    assert "cannot be written" in result.stderr

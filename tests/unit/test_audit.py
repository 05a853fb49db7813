"""The audit log says who has asked for what, and nothing of what was said."""

import asyncio
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.json_format import MessageToJson

from cluster.deployment.settings import ServerSettings
from cluster.planning.inventory import machine_facts
from echelon.client import AsyncClient
from echelon.errors import AuthenticationError, EchelonError
from echelon.pb import inference_pb2, scheduler_pb2
from echelon.pb.access_pb2 import TokenRecord, TokensFile
from echelon.pb.process_pb2 import AuthSection
from gateway.access.audit import AuditFileError, AuditLog
from tests.helpers.replica_house import ReplicaHouse, replica_house

SECRET = "nobody else may read this"


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def tokens_file(folder: Path, token: str) -> AuthSection:
    path = folder / "tokens.json"
    record = TokenRecord(name="alice", sha256=hashlib.sha256(token.encode()).hexdigest(), scopes=["generate"])
    path.touch(mode=0o600)
    path.write_text(MessageToJson(TokensFile(tokens=[record]), preserving_proto_field_name=True))
    return AuthSection(tokens_file=str(path))


async def finish(house: ReplicaHouse, request_id: str) -> None:
    await house.scheduler.next_submit()
    house.scheduler.send_chunk(request_id, [1, 2], SECRET)
    house.scheduler.send_complete(request_id)


async def test_requests_and_refusals_are_told_without_what_was_said(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    section = {"audit_file": str(path), "auth": tokens_file(tmp_path, "t0ken")}
    async with replica_house(**section) as house, AsyncClient(house.address, token="t0ken") as alice:
        done = asyncio.ensure_future(alice.generate(SECRET, request_id="good"))
        await finish(house, "good")
        await done
        failing = asyncio.ensure_future(alice.generate(SECRET, request_id="bad"))
        await house.scheduler.next_submit()
        house.scheduler.send_error("bad", grpc.StatusCode.INTERNAL, "broken")
        with pytest.raises(EchelonError):
            await failing
        async with AsyncClient(house.address, token=SECRET) as stranger:
            with pytest.raises(AuthenticationError):
                await stranger.generate("x")
    good, bad, refused = lines_of(path)
    assert (good["event"], good["token"], good["request_id"], good["status"]) == ("request", "alice", "good", "OK")
    assert (good["completion_tokens"], good["finish_reasons"], good["gateway"]) == (2, ["length"], "test")
    assert good["prompt_tokens"] > 0
    assert (bad["status"], "completion_tokens" in bad) == ("INTERNAL", False)
    assert (refused["event"], refused["token"], refused["status"]) == ("refusal", "", "UNAUTHENTICATED")
    text = path.read_text()
    assert SECRET not in text
    assert "t0ken" not in text
    assert path.stat().st_mode & 0o777 == 0o600


def test_many_refusals_are_counted_not_written(tmp_path: Path) -> None:
    now = [100.0]
    audit = AuditLog(tmp_path / "audit.jsonl", "gateway-0", now=lambda: now[0])
    for _ in range(1000):
        audit.call_refused(grpc.StatusCode.UNAUTHENTICATED, "", "generate")
    now[0] = 101.0
    audit.call_refused(grpc.StatusCode.UNAUTHENTICATED, "", "generate")
    lines = lines_of(tmp_path / "audit.jsonl")
    assert len(lines) == 11
    assert lines[-1]["refusals_not_shown"] == 990
    assert lines[0]["at"] == "1970-01-01T00:01:40Z"


def test_a_file_may_be_moved_away(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    audit = AuditLog(path, "gateway-0")
    end(audit, "first")
    path.rename(tmp_path / "audit.jsonl.1")
    end(audit, "second")
    assert [line["request_id"] for line in lines_of(path)] == ["second"]


def test_a_file_that_cannot_be_written_stops_the_start_but_no_request(tmp_path: Path) -> None:
    with pytest.raises(AuditFileError, match="cannot be written: No such file or directory"):
        AuditLog(tmp_path / "missing" / "audit.jsonl", "gateway-0")
    folder = tmp_path / "folder"
    folder.mkdir()
    audit = AuditLog(folder / "audit.jsonl", "gateway-0")
    (folder / "audit.jsonl").unlink()
    folder.rmdir()
    end(audit, "r")
    folder.mkdir()
    end(audit, "later")
    assert [line["request_id"] for line in lines_of(folder / "audit.jsonl")] == ["later"]


def test_plan_names_a_folder_that_is_missing(tmp_path: Path) -> None:
    for folder, problem in ((tmp_path, ""), (tmp_path / "no", "server.audit_file: folder .* is missing")):
        server = ServerSettings(audit_file=str(folder / "audit.jsonl"))
        assert re.match(problem or "$", machine_facts(None, server).server_problem)


def end(audit: AuditLog, request_id: str) -> None:
    complete = inference_pb2.GenerateComplete()
    audit.request_ended(scheduler_pb2.Submit(request_id=request_id), grpc.StatusCode.OK, 1.0, complete)

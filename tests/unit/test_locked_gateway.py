"""A gateway with TLS and tokens, at both ports, with a scheduler that the test plays."""

import asyncio
import json
import os
import ssl
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from typer.testing import CliRunner

from childproc.tls_identity import TlsFileError, TlsIdentity
from echelon import AsyncClient, Client, Tls, __version__
from echelon.channel import metadata, open_async_channel
from echelon.cli.token import token_app
from echelon.errors import (
    AuthenticationError,
    EchelonError,
    NotFoundError,
    OverloadedError,
    PermissionDeniedError,
    UnavailableError,
)
from echelon.pb import process_pb2
from echelon.pb.control_pb2 import ReplicaTraceRequest
from echelon.pb.control_pb2_grpc import ControlStub
from echelon.pb.jobs_pb2 import StreamResultsRequest
from echelon.pb.jobs_pb2_grpc import JobsStub
from echelon.pb.scheduler_pb2 import TracedRound, TraceEvent
from echelon.pb.worker_pb2 import ENGINE_ROLE_TARGET
from gateway.doors import http_server
from gateway.doors.grpc_access import TokenInterceptor
from gateway.server import Gateway, StartupError
from tests.helpers.fake_scheduler import FakeScheduler, serve
from tests.helpers.scrape import free_port

MODEL_DIR = Path(__file__).parents[2] / "models" / "demo-target"


@dataclass
class Files:
    """What an operator gives to a gateway and its clients, in a folder."""

    folder: Path
    ca: trustme.CA

    def __post_init__(self) -> None:
        self.ca.cert_pem.write_to_path(self.ca_file)
        self.renew(self.ca)

    @property
    def ca_file(self) -> Path:
        return self.folder / "ca.pem"

    @property
    def tokens_file(self) -> Path:
        return self.folder / "tokens.json"

    @property
    def section(self) -> process_pb2.TlsSection:
        return process_pb2.TlsSection(cert=str(self.folder / "cert.pem"), key=str(self.folder / "key.pem"))

    def renew(self, ca: trustme.CA) -> None:
        """A new certificate of the server."""
        issued = ca.issue_cert("127.0.0.1", "localhost")
        issued.private_key_pem.write_to_path(self.folder / "key.pem")
        (self.folder / "cert.pem").write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))

    def client(self, ca: trustme.CA | None = None) -> Tls:
        """With a certificate of its own."""
        issued = (ca or self.ca).issue_cert("client@example.org")
        issued.private_key_pem.write_to_path(self.folder / "client-key.pem")
        issued.cert_chain_pems[0].write_to_path(self.folder / "client.pem")
        names = {"cert_file": self.folder / "client.pem", "key_file": self.folder / "client-key.pem"}
        return Tls(ca_file=self.ca_file, **names)

    def token(self, name: str, *options: str) -> str:
        arguments = ["create", name, "--file", str(self.tokens_file), *options]
        return CliRunner().invoke(token_app(), arguments, catch_exceptions=False).stdout.strip()

    def revoke(self, name: str) -> None:
        arguments = ["revoke", name, "--file", str(self.tokens_file)]
        assert CliRunner().invoke(token_app(), arguments, catch_exceptions=False).exit_code == 0


@dataclass
class House:
    files: Files
    scheduler: FakeScheduler
    address: str
    http_port: int

    @property
    def tls(self) -> Tls:
        return Tls(ca_file=self.files.ca_file)

    def client(self, token: str | None = None, tls: Tls | None = None) -> AsyncClient:
        return AsyncClient(self.address, token=token, tls=tls or self.tls)

    async def generate(self, token: str, **options: Any) -> Any:
        async with self.client(token) as client:
            call = asyncio.ensure_future(client.generate("x", **options))
            submit = await self.scheduler.next_submit()
            self.scheduler.send_complete(submit.request_id)
            await call
        return submit

    async def ask(
        self, path: str, *, body: bytes | None = None, context: ssl.SSLContext | None = None, **headers: str
    ) -> tuple[int, str, Any]:
        """Status, head and JSON of the answer."""
        trusting = context or ssl.create_default_context(cafile=self.files.ca_file)
        reader, writer = await asyncio.open_connection("127.0.0.1", self.http_port, ssl=trusting)
        head = {"host": "x", "connection": "close", "content-type": "application/json", **headers}
        head["content-length"] = str(len(body or b""))
        lines = [f"{'GET' if body is None else 'POST'} {path} HTTP/1.1"]
        lines += [f"{key.replace('_', '-')}: {value}" for key, value in head.items()]
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + (body or b""))
        answer = await reader.read()
        writer.close()
        first, _, content = answer.decode().partition("\r\n\r\n")
        return int(first.split()[1]), first.lower(), json.loads(content) if content.startswith("{") else content


@pytest.fixture(scope="module")
def ca() -> Iterator[trustme.CA]:
    return trustme.CA()


@pytest.fixture
def files(tmp_path: Path, ca: trustme.CA) -> Files:
    return Files(tmp_path, ca)


@asynccontextmanager
async def opened(files: Files, *, client_ca: str = "", tokens: bool = True) -> AsyncIterator[House]:
    scheduler = FakeScheduler()
    server, scheduler_address = await serve(scheduler)
    http_port = free_port()
    section = process_pb2.ServerSection(host="127.0.0.1", http_port=http_port, tls=files.section)
    section.tls.client_ca = client_ca
    if tokens:
        section.auth.tokens_file = str(files.tokens_file)
    wanted = spec(section, scheduler_address)
    jobs = process_pb2.JobsSection(path=str(files.folder / "jobs"), max_bytes=1 << 20, max_running=4, retention_s=60)
    wanted.jobs.CopyFrom(jobs)
    gateway = Gateway(wanted)
    address = await gateway.start()
    await gateway.wait_until_ready()
    yield House(files, scheduler, address, http_port)
    await gateway.drain(grace_s=0)
    await server.stop(grace=0)


def spec(section: process_pb2.ServerSection, scheduler_address: str = "127.0.0.1:1") -> process_pb2.GatewaySpec:
    return process_pb2.GatewaySpec(
        name="test",
        version=__version__,
        server=section,
        model_name="demo",
        model_dir=str(MODEL_DIR),
        scheduler_addresses=[scheduler_address],
        max_model_len=64,
        vocab_size=4096,
    )


async def test_a_client_with_a_token_is_served_and_others_are_told_why_not(files: Files) -> None:
    token, operator = files.token("alice", "--cache-salt", "a"), files.token("ops", "--scope", "admin")
    async with opened(files) as house:
        submit = await house.generate(token)
        assert submit.cache_salt, "of the token"
        for given, error in (
            (None, AuthenticationError),
            ("wrong", AuthenticationError),
            (operator, PermissionDeniedError),
        ):
            async with house.client(given) as client:
                with pytest.raises(error):
                    await client.generate("x")
                with pytest.raises(error):
                    await client.model_info()
                with pytest.raises(error):
                    await client.cancel("x")
        assert house.scheduler.received.empty(), "the scheduler heard of none of them"


async def test_the_doors_speak_tls_only(files: Files, ca: trustme.CA) -> None:
    token = files.token("alice")
    async with opened(files) as house:
        async with AsyncClient(house.address, token=token) as plain:
            with pytest.raises(UnavailableError):
                await plain.generate("x", timeout_s=20)
        stranger = files.folder / "stranger.pem"
        trustme.CA().cert_pem.write_to_path(stranger)
        async with house.client(token, Tls(ca_file=stranger)) as client:
            with pytest.raises(UnavailableError):
                await client.generate("x", timeout_s=20)
        reader, writer = await asyncio.open_connection("127.0.0.1", house.http_port)
        writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert b"HTTP" not in await reader.read()
        writer.close()


async def test_http_asks_for_the_same_tokens(files: Files) -> None:
    token, operator = files.token("alice"), files.token("ops", "--scope", "admin")
    async with opened(files) as house:
        assert (await house.ask("/health"))[0] == 200, "probes have no token"
        for path, body in (("/v1/models", None), ("/v1/chat/completions", b"x" * 3_000_000), ("/nothing", None)):
            status, head, answer = await house.ask(path, body=body)
            assert status == 401
            assert "www-authenticate: bearer" in head
            assert answer["error"]["type"] == "authentication_error"
        assert (await house.ask("/v1/models", authorization=f"Bearer {token}"))[0] == 200
        assert (await house.ask("/v1/models", x_api_key=token))[0] == 200
        assert (await house.ask("/metrics", authorization=f"Bearer {token}"))[0] == 403
        assert (await house.ask("/metrics", authorization=f"Bearer {operator}"))[0] == 200
        status, _, answer = await house.ask("/v1/models", authorization=f"Bearer {operator}")
        assert (status, answer["error"]["type"]) == (403, "permission_error")


async def test_who_may_watch(files: Files) -> None:
    token, operator = files.token("alice"), files.token("ops", "--scope", "admin")
    async with opened(files) as house:
        for path in ("/ui/", "/ui/app.js"):
            assert (await house.ask(path))[0] == 200, "the page itself is no secret, and asks for a token"
        for path in ("/control/status", "/control/rounds"):
            assert (await house.ask(path))[0] == 401
            assert (await house.ask(path, authorization=f"Bearer {token}"))[0] == 403
        status, _, answer = await house.ask("/control/status", authorization=f"Bearer {operator}")
        assert (status, answer["model"]) == (200, "demo")
        for path in ("/ui/../metrics", "/ui/%2e%2e/metrics", "/ui/../control/status", "/ui/x"):
            assert (await house.ask(path))[0] == 404
        for path in ("/metrics%0a", "/control/status%0A", "/control/rounds%0a"):
            assert (await house.ask(path, authorization=f"Bearer {token}"))[0] == 403, (
                "the router takes it for the path"
            )


async def test_who_watches_rounds_is_shown_no_more_once_the_token_is_revoked(files: Files) -> None:
    operator, other = files.token("ops", "--scope", "admin"), files.token("other", "--scope", "admin")
    async with opened(files) as house:
        house.scheduler.trace = [TraceEvent(round=TracedRound(engine=ENGINE_ROLE_TARGET))]
        watching = asyncio.ensure_future(house.ask("/control/rounds", authorization=f"Bearer {operator}"))
        while not house.scheduler.traces_asked:  # noqa: ASYNC110  # it has begun
            await asyncio.sleep(0.01)
        files.revoke("ops")
        assert "this token is not known here" in str((await watching)[2])
        assert (await house.ask("/control/status", authorization=f"Bearer {other}"))[0] == 200


async def test_what_is_watched_over_grpc_ends_once_the_token_is_revoked(files: Files) -> None:
    operator, token = files.token("ops", "--scope", "admin"), files.token("alice")
    async with opened(files) as house, open_async_channel(house.address, house.tls) as channel:
        house.scheduler.trace = [TraceEvent(round=TracedRound(engine=ENGINE_ROLE_TARGET))]
        async with house.client(token) as client:
            job = await client.jobs.submit([{"prompt": "x"}, {"prompt": "x"}])
        control: Any = ControlStub(channel)
        jobs: Any = JobsStub(channel)
        trace = control.Trace(ReplicaTraceRequest(), metadata=metadata(operator))
        wanted = StreamResultsRequest(job_id=job.job_id, follow=True)
        results = jobs.StreamResults(wanted, metadata=metadata(token))
        await trace.read()
        submits = [await house.scheduler.next_submit() for _ in range(2)]
        first = min(submit.request_id for submit in submits)  # results come in the order of the items
        house.scheduler.send_complete(first)
        await results.read()
        files.revoke("ops")
        files.revoke("alice")
        for call in (trace, results):
            with pytest.raises(grpc.aio.AioRpcError, match="this token is not known here"):
                await call.read()


async def test_what_is_no_http_gets_an_answer_over_tls_too(files: Files) -> None:
    async with opened(files, tokens=False) as house:
        trusting = ssl.create_default_context(cafile=files.ca_file)
        reader, writer = await asyncio.open_connection("127.0.0.1", house.http_port, ssl=trusting)
        writer.write(b"no http\r\n\r\n")
        assert b"400 Bad Request" in await reader.read()
        writer.close()


async def test_limits_of_a_token(files: Files) -> None:
    token, other = files.token("alice", "--max-running", "1"), files.token("bob")
    async with opened(files) as house, house.client(token) as client:
        first = asyncio.ensure_future(client.generate("x"))
        submit = await house.scheduler.next_submit()
        with pytest.raises(OverloadedError, match="token 'alice' has 1 requests running, and at most 1 may"):
            await client.generate("x")
        body = json.dumps({"model": "demo", "prompt": "x"}).encode()
        status, _, _ = await house.ask("/v1/completions", body=body, authorization=f"Bearer {token}")
        assert status == 429, "the doors share the limit"
        await house.generate(other)
        house.scheduler.send_complete(submit.request_id)
        await first
        await house.generate(token)


async def test_nobody_touches_requests_of_another_but_operators(files: Files) -> None:
    token, other = files.token("alice"), files.token("bob")
    operator = files.token("ops", "--scope", "admin", "--scope", "generate")
    async with opened(files) as house, house.client(token) as client, house.client(other) as stranger:
        running = asyncio.ensure_future(client.generate("x", request_id="mine"))
        await house.scheduler.next_submit()
        assert not await stranger.cancel("mine")
        assert not await stranger.set_speculation("mine", enabled=False)
        async with house.client(operator) as ops:
            assert await ops.set_speculation("mine", enabled=False)
        assert await client.cancel("mine")
        assert (await house.scheduler.next_adjust()).request_id == "mine"
        assert await house.scheduler.next_cancel() == "mine"
        house.scheduler.send_complete("mine")
        await running


async def test_a_token_that_is_revoked_while_its_call_comes_in_is_named(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.token("alice")

    async def let_in(self: TokenInterceptor, continuation: Any, details: Any) -> Any:
        return await continuation(details)

    monkeypatch.setattr(TokenInterceptor, "intercept_service", let_in)  # it still knew the token
    async with opened(files) as house, house.client("revoked") as client:
        for call in (
            client.cancel("x"),
            client.set_speculation("x", enabled=False),
            client.generate("x"),
            asyncio.to_thread(Client(house.address, token="revoked", tls=house.tls).jobs.get, "x"),
        ):
            with pytest.raises(AuthenticationError, match="this token is not known here"):
                await call


async def test_a_gateway_may_ask_for_certificates_of_clients(files: Files) -> None:
    async with opened(files, client_ca=str(files.ca_file), tokens=False) as house:
        async with house.client() as client:
            with pytest.raises(UnavailableError):
                await client.model_info()
        async with house.client(tls=files.client(trustme.CA())) as client:
            with pytest.raises(UnavailableError):
                await client.model_info()
        own = files.client()
        async with house.client(tls=own) as client:
            assert (await client.model_info()).model == "demo"
        context = ssl.create_default_context(cafile=files.ca_file)
        with pytest.raises((OSError, IndexError)):
            await house.ask("/health", context=context)
        context.load_cert_chain(str(own.cert_file), str(own.key_file))
        assert (await house.ask("/health", context=context))[0] == 200


async def test_a_renewed_certificate_serves_new_connections_and_old_ones_go_on(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "_LOOK_AGAIN_S", 0.01)
    token, newer = files.token("alice"), trustme.CA()
    async with opened(files) as house, house.client(token) as before:
        stream = before.stream("x")
        reading = asyncio.ensure_future(anext(stream))
        request_id = (await house.scheduler.next_submit()).request_id
        (files.folder / "key.pem").write_text("half of a key")
        assert (await house.ask("/health"))[0] == 200, "the old pair still serves"
        files.renew(newer)
        newer.cert_pem.write_to_path(files.ca_file)
        async with asyncio.timeout(20):
            while await _is_refused(house):
                pass
        async with house.client(token) as after:
            assert (await after.model_info()).model == "demo"
        house.scheduler.send_chunk(request_id, [1], "on")
        assert (await reading).text == "on"
        stream.close()


async def _is_refused(house: House) -> bool:
    try:
        return (await house.ask("/health"))[0] != 200
    except OSError:  # of TLS, or a connection that the server closed first
        return True


def test_files_that_cannot_be_used_are_named(files: Files) -> None:
    def problem_of(**changes: str) -> str:
        section = files.section
        section.MergeFrom(process_pb2.TlsSection(**changes))
        with pytest.raises(TlsFileError) as caught:
            TlsIdentity.read(section)
        with pytest.raises(StartupError) as refused:
            Gateway(spec(process_pb2.ServerSection(tls=section)))
        assert str(refused.value) == f"server.tls.{caught.value}"
        return str(caught.value)

    missing, empty = str(files.folder / "missing.pem"), files.folder / "empty.pem"
    empty.touch()
    other_key = files.folder / "other-key.pem"
    trustme.CA().issue_cert("x").private_key_pem.write_to_path(other_key)
    assert problem_of(cert=missing).startswith(f"cert: {missing} cannot be read (No such file")
    assert problem_of(key=missing).startswith(f"key: {missing} cannot be read")
    assert problem_of(client_ca=missing).startswith(f"client_ca: {missing} cannot be read")
    assert "are no pair" in problem_of(cert=str(empty))
    assert "are no pair" in problem_of(key=str(other_key))
    assert "holds no certificates" in problem_of(client_ca=str(empty))


async def test_commands_take_token_and_ca_from_the_environment(files: Files) -> None:
    token = files.token("alice")
    async with opened(files) as house:
        told = {"ECHELON_ADDRESS": house.address, "ECHELON_CA_FILE": str(files.ca_file)}
        running = asyncio.ensure_future(_command(told | {"ECHELON_TOKEN": token}))
        request_id = (await house.scheduler.next_submit()).request_id
        house.scheduler.send_chunk(request_id, [1], "served")
        house.scheduler.send_complete(request_id)
        assert await running == (0, "served\n", "")
        code, _, error = await _command(told)
        assert code == 1
        assert "UNAUTHENTICATED: this service asks for a token" in error
        code, _, error = await _command(told | {"ECHELON_CA_FILE": "/missing.pem"})
        assert code == 2
        assert "ECHELON_CA_FILE" in error


async def _command(environment: dict[str, str]) -> tuple[int | None, str, str]:
    """Exit code, output and errors of `echelon generate`."""
    command = [sys.executable, "-m", "echelon.cli.app", "generate", "hi", "--no-stream"]
    pipes = {"stdout": asyncio.subprocess.PIPE, "stderr": asyncio.subprocess.PIPE}
    process = await asyncio.create_subprocess_exec(*command, env=os.environ | environment, **pipes)
    out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


def test_a_client_certificate_needs_its_key() -> None:
    with pytest.raises(ValueError, match="cert_file and key_file belong together"):
        AsyncClient("127.0.0.1:1", tls=Tls(cert_file="x"))
    assert issubclass(AuthenticationError, EchelonError)
    assert grpc.StatusCode.UNAUTHENTICATED


async def test_jobs_are_seen_by_those_who_submitted_them_and_by_operators(files: Files) -> None:
    tokens = {name: files.token(name, "--max-running", "1", "--cache-salt", name) for name in ("alice", "bob")}
    tokens["ops"] = files.token("ops", "--scope", "admin", "--scope", "generate")
    async with opened(files) as house:
        clients = {name: Client(house.address, token=token, tls=house.tls) for name, token in tokens.items()}
        alice, bob, ops = (client.jobs for client in clients.values())
        job = await asyncio.to_thread(
            alice.submit, [{"prompt": "x", "max_tokens": 2}, {"prompt": "y", "max_tokens": 2}]
        )
        submits = [await house.scheduler.next_submit() for _ in range(2)]  # more than may run of her live requests
        assert [(each.tenant, each.is_background) for each in submits] == [("alice", True)] * 2
        assert submits[0].cache_salt == submits[1].cache_salt != ""
        assert (await house.generate(tokens["alice"])).tenant == "alice", "her limit is for live requests"
        for call in (bob.get, bob.cancel, lambda job_id: list(bob.results(job_id))):
            with pytest.raises(NotFoundError):
                await asyncio.to_thread(call, job.job_id)
        seen = [await asyncio.to_thread(lambda jobs=jobs: list(jobs.list())) for jobs in (alice, bob, ops)]
        assert [len(jobs) for jobs in seen] == [1, 0, 1]
        for name, status in (("alice", 200), ("bob", 404), ("ops", 200)):
            asked = await house.ask(f"/v1/batches/{job.job_id}", authorization=f"Bearer {tokens[name]}")
            assert asked[0] == status
            asked = await house.ask(f"/v1/files/{job.input_file}", authorization=f"Bearer {tokens[name]}")
            assert asked[0] == status
        for submit in submits:
            house.scheduler.send_chunk(submit.request_id, [1, 2], "ab")
            house.scheduler.send_complete(submit.request_id)
        results = await asyncio.to_thread(lambda: list(ops.results(job.job_id)))
        assert [result.body["choices"][0]["text"] for result in results] == ["ab", "ab"]
        assert (await asyncio.to_thread(ops.cancel, job.job_id)).state == "completed"
        assert (await house.ask("/v1/batches"))[0] == 401
        _, _, metrics = await house.ask("/metrics", authorization=f"Bearer {tokens['ops']}")
        for series, value in (
            ('jobs{model_name="demo",state="completed"}', 1),
            ('jobs{model_name="demo",state="in_progress"}', 0),
            ('job_items_left{model_name="demo"}', 0),
            ('oldest_job_age_seconds{model_name="demo"}', 0),
            ('job_items_total{model_name="demo",outcome="completed"}', 2),
            ('job_items_total{model_name="demo",outcome="failed"}', 0),
        ):
            assert f"echelon:{series} {value}.0\n" in metrics
        _, _, watched = await house.ask("/control/jobs", authorization=f"Bearer {tokens['ops']}")
        assert [(each["job_id"], each["num_completed"]) for each in watched["jobs"]] == [(job.job_id, "2")]
        for client in clients.values():
            client.close()


async def test_an_item_that_ends_its_target_each_time_is_not_tried_again(files: Files) -> None:
    async with opened(files, tokens=False) as house:
        with Client(house.address, tls=house.tls) as client:
            job = await asyncio.to_thread(client.jobs.submit, [{"prompt": "x", "max_tokens": 2}])
            submit = await house.scheduler.next_submit()
            house.scheduler.send_error(submit.request_id, grpc.StatusCode.INTERNAL, "it is not tried again")
            (result,) = await asyncio.to_thread(lambda: list(client.jobs.results(job.job_id)))
    assert result.body["error"]["message"] == "it is not tried again"
    assert house.scheduler.received.empty(), "by the job neither"


async def test_an_upload_beyond_the_room_is_refused_while_it_comes(files: Files) -> None:
    too_many = ({"prompt": "x" * 1000} for _ in range(20_000))
    async with opened(files, tokens=False) as house, house.client() as client:
        with pytest.raises(OverloadedError, match=r"all uploads together may take 1048576 bytes \(jobs.max_bytes\)"):
            await client.jobs.submit(too_many)
        assert [job async for job in client.jobs.list()] == []

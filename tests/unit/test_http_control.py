"""What operators see over HTTP, between a client and schedulers that the test plays; the page's files."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from echelon import __version__
from echelon.pb import process_pb2
from echelon.pb.scheduler_pb2 import SchedulerStatus, TracedMove, TracedRound, TracedWait, TraceEvent
from echelon.pb.worker_pb2 import ENGINE_ROLE_DRAFT, ENGINE_ROLE_TARGET, MoveOrder
from gateway.server import Gateway
from tests.helpers.fake_scheduler import FakeScheduler, serve
from tests.helpers.scrape import free_port

pytestmark = pytest.mark.asyncio(loop_scope="module")
MODEL_DIR = Path(__file__).parents[2] / "models" / "demo-target"
PAGE = Path(__file__).parents[2] / "gateway" / "ui"


class House:
    def __init__(self, scheduler: FakeScheduler, gateway: Gateway, port: int) -> None:
        self.scheduler, self.gateway, self.port = scheduler, gateway, port

    @asynccontextmanager
    async def asked(self, path: str, **headers: str) -> AsyncIterator[asyncio.StreamReader]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        head = {"host": "x", "connection": "close", **headers}
        lines = [f"GET {path} HTTP/1.1", *(f"{key.replace('_', '-')}: {value}" for key, value in head.items())]
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n")
        try:
            yield reader
        finally:
            writer.close()

    async def ask(self, path: str, **headers: str) -> tuple[int, dict[str, str], str]:
        async with self.asked(path, **headers) as reader:
            head, _, content = (await reader.read()).decode().partition("\r\n\r\n")
        first, *fields = head.split("\r\n")
        return int(first.split()[1]), dict(field.lower().split(": ", 1) for field in fields), content

    async def status(self) -> Any:
        return json.loads((await self.ask("/control/status"))[2])


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def house() -> AsyncIterator[House]:
    scheduler = FakeScheduler()
    server, address = await serve(scheduler)
    port = free_port()
    placed = process_pb2.PlacedProcess(
        name="target-0.1", role="target", rank=1, node="10.0.0.7", devices="cuda:3", engines=[ENGINE_ROLE_TARGET]
    )
    spec = process_pb2.GatewaySpec(
        name="test",
        version=__version__,
        server=process_pb2.ServerSection(host="127.0.0.1", http_port=port),
        model_name="demo",
        model_dir=str(MODEL_DIR),
        scheduler_addresses=[address],
        max_model_len=64,
        vocab_size=4096,
        processes=[placed, process_pb2.PlacedProcess(name="gateway-0", role="gateway", node="10.0.0.7")],
        models=[process_pb2.ServedModel(engine=ENGINE_ROLE_TARGET, model="big", dtype="bfloat16", num_ranks=2)],
    )
    gateway = Gateway(spec)
    await gateway.start()
    await gateway.wait_until_ready()
    yield House(scheduler, gateway, port)
    await gateway.drain(grace_s=0)
    await server.stop(grace=0)


async def test_the_status_says_what_runs_where(house: House) -> None:
    house.scheduler.status = SchedulerStatus(num_requests_running=3, generation_tokens_total=5)
    answer = await house.status()
    assert answer["model"] == "demo"
    (replica,) = answer["replicas"]
    assert replica["status"]["num_requests_running"] == 3
    assert replica["status"]["generation_tokens_total"] == "5", "protobuf's JSON writes long integers as text"
    assert answer["processes"][0] == {
        "name": "target-0.1", "role": "target", "rank": 1, "node": "10.0.0.7", "devices": "cuda:3",
        "engines": ["ENGINE_ROLE_TARGET"],
    }  # fmt: skip
    assert answer["models"][0]["model"] == "big"
    assert answer["events"][0]["text"] == "ready"


async def test_the_status_lists_running_requests(house: House) -> None:
    assert "requests" not in await house.status()
    body = json.dumps({"prompt": [5, 6, 7]})
    reader, writer = await asyncio.open_connection("127.0.0.1", house.port)
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    )
    writer.write(f"{head}x-request-id: mine\r\n\r\n{body}".encode())
    request_id = (await house.scheduler.next_submit()).request_id
    (request,) = (await house.status())["requests"]
    assert (request["request_id"], request["num_prompt_tokens"], request["waits"]) == ("mine", 3, True)
    house.scheduler.send_chunk(request_id, [1, 2], "hi")
    async with asyncio.timeout(30):
        while (request := (await house.status())["requests"][0]).get("waits"):
            pass
    assert request["num_output_tokens"] == 2
    house.scheduler.send_complete(request_id)
    await reader.readuntil(b"}")
    writer.close()


async def test_rounds_are_streamed_as_they_happen(house: House) -> None:
    house.scheduler.trace = [
        TraceEvent(
            round=TracedRound(
                engine=ENGINE_ROLE_TARGET, sent_ns=1_000_000, received_ns=9_000_000, queue_ns=1_000_000,
                run_ns=4_000_000, num_rows=2, num_steps=1,
            )
        ),
        TraceEvent(wait=TracedWait(engine=ENGINE_ROLE_DRAFT, start_ns=3_000, run_ns=5_000)),
        TraceEvent(move=TracedMove(engine=ENGINE_ROLE_TARGET, kind=MoveOrder.LOAD, sent_ns=1_000, received_ns=7_000)),
    ]  # fmt: skip
    async with house.asked("/control/rounds?replica=0") as reader:
        assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
        batch: dict[str, Any] = {"moves": []}
        while not batch["moves"]:
            batch = json.loads((await reader.readuntil(b"}\n\n")).partition(b"data: ")[2])
    assert house.scheduler.traces_asked[-1].rounds_only, "nobody waits for it"
    assert batch["rounds"] == [
        {
            "engine": "target", "sent_us": 1000, "began_us": 3500, "run_us": 4000, "received_us": 9000, "rows": 2,
            "steps": 1,
        }
    ]  # fmt: skip
    assert batch["waits"] == [{"engine": "draft", "began_us": 3, "run_us": 5}]
    assert batch["moves"][0]["kind"] == "load"


async def test_the_recording_ends_when_its_watcher_leaves(house: House) -> None:
    house.scheduler.trace = [TraceEvent()]
    async with house.asked("/control/rounds") as reader:
        await reader.readuntil(b"data: ")
    async with asyncio.timeout(30):
        await house.scheduler.trace_left.wait()


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("/control/rounds?replica=1", 400, "replica: there is no 1; the last one is 0"),
        ("/control/rounds?replica=-1", 400, "replica: must be the number of a replica, got '-1'"),
        ("/control/rounds?replica=" + "9" * 40, 400, "replica: must be the number of a replica"),
        ("/control/nothing", 404, "is not served here"),
    ],
)
async def test_what_cannot_be_watched(house: House, path: str, status: int, words: str) -> None:
    got, _, content = await house.ask(path)
    assert got == status
    assert words in json.loads(content)["error"]["message"]


async def test_a_scheduler_that_has_too_many_watchers(house: House) -> None:
    house.scheduler.trace = None
    status, _, content = await house.ask("/control/rounds")
    assert (status, json.loads(content)["error"]["message"]) == (409, "another recording runs")


async def test_the_page_is_served_with_strict_headers(house: House) -> None:
    for path in PAGE.iterdir():
        status, headers, content = await house.ask(f"/ui/{path.name}")
        assert (status, content) == (200, path.read_text())
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        status, _, content = await house.ask(f"/ui/{path.name}", if_none_match=headers["etag"])
        assert (status, content) == (304, "")
    assert (await house.ask("/ui/"))[2] == (PAGE / "index.html").read_text()
    status, headers, _ = await house.ask("/ui")
    assert (status, headers["location"]) == (307, "ui/")


async def test_the_page_needs_no_other_host_and_nothing_inline() -> None:
    for path in PAGE.iterdir():
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "http:" not in text
        assert "https:" not in text
        for word in ("innerHTML", "eval(", " style=", " onclick=", "<style", "import("):
            assert word not in text, path.name


async def test_a_deployment_without_jobs_says_so(house: House) -> None:
    status, _, content = await house.ask("/control/jobs")
    assert (status, json.loads(content)) == (200, {"kept": False, "jobs": []})

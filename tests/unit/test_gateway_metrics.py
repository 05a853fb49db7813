"""What the metrics say about requests, and what Prometheus reads from a gateway."""

import asyncio
import contextlib
import socket
import sqlite3
import urllib.error
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
import pytest_asyncio
from prometheus_client import CollectorRegistry, generate_latest

from echelon import __version__
from echelon.client import AsyncClient
from echelon.errors import InvalidRequestError
from echelon.pb import inference_pb2 as pb
from echelon.pb import process_pb2, scheduler_pb2, worker_pb2
from gateway.doors import http_server
from gateway.job_metrics import JobCollector
from gateway.jobs.jobs import JobNumbers
from gateway.metrics import RequestMetrics
from gateway.server import Gateway, StartupError
from tests.helpers.fake_scheduler import FakeScheduler, serve
from tests.helpers.scrape import Samples, fetch, free_port, parse, scrape

MODEL_DIR = Path(__file__).parents[2] / "models" / "demo-target"


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def samples_of(metrics: RequestMetrics) -> Samples:
    return parse(generate_latest(metrics.registry).decode(), model_name="demo")


def test_a_request_is_measured_from_its_arrival_to_its_end() -> None:
    clock = Clock()
    metrics = RequestMetrics("demo", now=clock)
    meter = metrics.start(clock.now)
    for at, num_tokens in ((102.0, 2), (102.5, 0), (103.0, 4), (104.0, 1)):
        clock.now = at
        meter.on_chunk(pb.GenerateChunk(token_ids=range(num_tokens), text="x"))
    clock.now = 105.0
    meter.on_complete(
        pb.GenerateComplete(
            finished=[pb.Finished(reason=pb.FINISH_REASON_STOP)],
            timings=pb.RequestTimings(queue_s=0.5, first_token_s=1.5, total_s=4.0),
        )
    )
    samples = samples_of(metrics)
    for name, count, total in (
        ("time_to_first_token_seconds", 1, 2.0),
        ("inter_token_latency_seconds", 5, 2.0),  # four tokens that share a second, one that took another
        ("request_time_per_output_token_seconds", 1, 2.0 / 6),
        ("e2e_request_latency_seconds", 1, 5.0),
        ("request_queue_time_seconds", 1, 0.5),
        ("request_prefill_time_seconds", 1, 1.0),
        ("request_decode_time_seconds", 1, 2.5),
    ):
        assert samples[f"echelon:{name}_count",] == count, name
        assert samples[f"echelon:{name}_sum",] == pytest.approx(total), name
    assert samples["echelon:inter_token_latency_seconds_bucket", "0.3"] == 4
    assert samples["echelon:request_success_total", "stop"] == 1


def test_spares_are_counted_under_the_model_that_is_served_now() -> None:
    metrics = RequestMetrics("old")
    metrics.note_spares(ready=1, wanted=2)
    metrics.use("new")

    def number(model: str, state: str) -> float | None:
        return metrics.registry.get_sample_value("echelon:spares", {"model_name": model, "state": state})

    assert (number("new", "ready"), number("new", "wanted")) == (1, 2)
    assert number("old", "ready") is None


def test_samples_of_a_request_run_side_by_side() -> None:
    clock = Clock()
    metrics = RequestMetrics("demo", now=clock)
    meter = metrics.start(clock.now)
    for at, index in ((101.0, 0), (101.0, 1), (102.0, 0), (102.0, 1)):
        clock.now = at
        meter.on_chunk(pb.GenerateChunk(index=index, token_ids=[1]))
    meter.on_complete(pb.GenerateComplete(finished=[pb.Finished(reason=pb.FINISH_REASON_LENGTH)] * 2))
    samples = samples_of(metrics)
    assert samples["echelon:time_to_first_token_seconds_count",] == 1
    assert samples["echelon:inter_token_latency_seconds_sum",] == pytest.approx(2.0)
    assert samples["echelon:request_time_per_output_token_seconds_sum",] == pytest.approx(1.0)
    assert samples["echelon:request_success_total", "length"] == 2


class House:
    def __init__(self, scheduler: FakeScheduler, scheduler_server: grpc.aio.Server, port: int, client: AsyncClient):
        self.scheduler = scheduler
        self.scheduler_server = scheduler_server
        self.port = port
        self.client = client

    async def scrape(self) -> Samples:
        return await asyncio.to_thread(scrape, self.port, model_name="demo")


def gateway_spec(scheduler_address: str, http_port: int) -> process_pb2.GatewaySpec:
    return process_pb2.GatewaySpec(
        name="test",
        version=__version__,
        server=process_pb2.ServerSection(host="127.0.0.1", http_port=http_port),
        model_name="demo",
        model_dir=str(MODEL_DIR),
        scheduler_addresses=[scheduler_address],
        max_model_len=64,
        vocab_size=4096,
    )


@pytest_asyncio.fixture
async def house(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AsyncIterator[House]:
    monkeypatch.setattr(http_server, "MAX_CONNECTIONS", 20)
    scheduler = FakeScheduler()
    server, scheduler_address = await serve(scheduler)
    port = free_port()
    spec = gateway_spec(scheduler_address, port)
    spec.jobs.CopyFrom(process_pb2.JobsSection(path=str(tmp_path / "jobs"), max_running=1, retention_s=1e6))
    gateway = Gateway(spec)
    address = await gateway.start()
    await gateway.wait_until_ready()
    async with AsyncClient(address) as client:
        yield House(scheduler, server, port, client)
    await gateway.drain(grace_s=0)
    await server.stop(grace=0)


async def test_a_scrape_asks_the_scheduler(house: House) -> None:
    house.scheduler.status = scheduler_pb2.SchedulerStatus(
        num_requests_running=3,
        num_requests_waiting=2,
        num_blocks=8,
        num_free_blocks=6,
        prompt_tokens_total=70,
        generation_tokens_total=50,
        prefix_cache_queries=40,
        prefix_cache_hits=30,
        num_preemptions_total=1,
        draft_tokens_total=90,
        lookup_tokens_total=10,
        speculation_total=pb.SpeculationStats(
            num_drafts=30, num_draft_tokens=80, num_accepted_tokens=60, accepted_per_position=[40, 20]
        ),
        wasted_draft_tokens_total=40,
        verdict_cache_hits_total=5,
        verdict_cache_misses_total=6,
        draft_idle_seconds_total=1.5,
        verify_wait_seconds_total=2.5,
        window_occupancy=0.75,
        acceptance_rate=0.9,
    )
    samples = await house.scrape()
    expected = {
        "num_requests_running": 3,
        "num_requests_waiting": 2,
        "kv_cache_usage_perc": 0.25,
        "prompt_tokens_total": 70,
        "generation_tokens_total": 50,
        "prefix_cache_queries_total": 40,
        "prefix_cache_hits_total": 30,
        "num_preemptions_total": 1,
        "spec_decode_num_drafts_total": 30,
        "spec_decode_num_draft_tokens_total": 80,
        "spec_decode_num_accepted_tokens_total": 60,
        "wasted_drafts_total": 40,
        "verdict_cache_hits_total": 5,
        "verdict_cache_misses_total": 6,
        "lookup_tokens_total": 10,
        "draft_idle_seconds_total": 1.5,
        "verify_wait_seconds_total": 2.5,
        "window_occupancy": 0.75,
        "acceptance_rate": 0.9,
        "replica_ready": 1,
    }
    assert {name: samples[f"echelon:{name}", "0"] for name in expected} == expected
    by_position = [samples["echelon:spec_decode_num_accepted_tokens_per_pos_total", at, "0"] for at in ("0", "1")]
    assert by_position == [40, 20]
    house.scheduler.status.num_requests_running = 4
    assert (await house.scrape())["echelon:num_requests_running", "0"] == 4


async def test_a_scrape_does_without_jobs_that_cannot_be_counted(house: House, tmp_path: Path) -> None:
    assert (await house.scrape())["echelon:job_items_left",] == 0
    with contextlib.closing(sqlite3.connect(tmp_path / "jobs" / "jobs.sqlite")) as store:
        store.execute("ALTER TABLE jobs RENAME TO lost")
    samples = await house.scrape()
    assert samples["echelon:replica_ready", "0"] == 1
    assert ("echelon:job_items_left",) not in samples


def test_jobs_are_counted_under_the_model_that_is_served_now() -> None:
    names, registry = ["old", "new"], CollectorRegistry(auto_describe=False)
    collector = JobCollector(lambda: names[0])
    collector.numbers = JobNumbers(by_status={}, num_left=3, oldest_age_s=0.0, num_completed=1, num_failed=0)
    registry.register(collector)
    while names:
        samples = parse(generate_latest(registry).decode(), model_name=names[0])
        assert samples["echelon:job_items_left",] == 3
        names.pop(0)


async def test_a_scrape_shows_every_tier_of_every_engine(house: House) -> None:
    target, draft = worker_pb2.ENGINE_ROLE_TARGET, worker_pb2.ENGINE_ROLE_DRAFT
    house.scheduler.status = scheduler_pb2.SchedulerStatus(
        prefix_cache_queries=1000,
        prefix_cache_hits=700,
        prefix_cache_hits_from_host=300,
        prefix_cache_hits_from_disk=100,
        tiers=[
            scheduler_pb2.TierStatus(
                engine=target,
                tier="disk",
                num_blocks=100,
                num_used_blocks=25,
                block_bytes=1 << 20,
                stored_blocks_total=40,
                fetched_blocks_total=12,
                failed_blocks_total=3,
                evicted_blocks_total=15,
                store_seconds_total=2.5,
                fetch_seconds_total=0.5,
                damaged_blocks_total=1,
                store_queue_seconds_total=0.25,
                fetch_queue_seconds_total=0.125,
                avoided_seconds_total=30.0,
                waited_seconds_total=4.0,
                paused=True,
                last_error="no space left on device",
            ),
            scheduler_pb2.TierStatus(engine=draft, tier="host", num_blocks=8, block_bytes=1024),
        ],
    )
    samples = await house.scrape()
    expected = {
        "capacity_bytes": 100 << 20,
        "used_bytes": 25 << 20,
        "paused": 1,
        "store_blocks_total": 40,
        "load_blocks_total": 12,
        "store_bytes_total": 40 << 20,
        "load_bytes_total": 12 << 20,
        "store_time_total": 2.5,
        "load_time_total": 0.5,
        "failed_blocks_total": 3,
        "checksum_failures_total": 1,
        "store_queue_time_total": 0.25,
        "load_queue_time_total": 0.125,
        "avoided_time_total": 30.0,
        "waited_time_total": 4.0,
        "evicted_blocks_total": 15,
    }
    assert {name: samples[f"echelon:kv_offload_{name}", "target", "0", "disk"] for name in expected} == expected
    assert samples["echelon:kv_offload_capacity_bytes", "draft", "0", "host"] == 8192
    assert samples["echelon:external_prefix_cache_queries_total", "0"] == 1000 - 300, "not found on the device"
    assert samples["echelon:external_prefix_cache_hits_total", "0"] == 400


async def test_requests_are_counted_however_they_end(house: House) -> None:
    call = asyncio.ensure_future(house.client.generate("x"))
    request_id = (await house.scheduler.next_submit()).request_id
    house.scheduler.send_chunk(request_id, [1, 2], "ab")
    house.scheduler.send_complete(request_id)
    await call
    with pytest.raises(InvalidRequestError):
        await house.client.generate("x", top_p=7)
    stream = house.client.stream("x", request_id="dropped")
    reading = asyncio.ensure_future(anext(stream))
    await house.scheduler.next_submit()
    house.scheduler.send_chunk("dropped", [1], "a")
    await reading
    stream.close()
    assert await house.scheduler.next_cancel() == "dropped"
    house.scheduler.send_complete("dropped", reason=pb.FINISH_REASON_ABORT)
    again = asyncio.ensure_future(house.client.generate("y"))  # by its end the abort has arrived too
    request_id = (await house.scheduler.next_submit()).request_id
    house.scheduler.send_error(request_id, grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full")
    with pytest.raises(Exception, match="queue"):
        await again
    samples = await house.scrape()
    assert samples["echelon:request_success_total", "length"] == 1
    assert samples["echelon:request_success_total", "abort"] == 1
    assert samples["echelon:request_errors_total", "INVALID_ARGUMENT"] == 1
    assert samples["echelon:request_errors_total", "RESOURCE_EXHAUSTED"] == 1
    assert samples["echelon:time_to_first_token_seconds_count",] == 2


async def test_a_scheduler_that_does_not_answer_is_not_ready(house: House) -> None:
    await house.scheduler_server.stop(grace=0)
    samples = await house.scrape()
    assert samples["echelon:replica_ready", "0"] == 0
    assert ("echelon:num_requests_running", "0") not in samples


async def test_other_paths_than_metrics_are_not_found(house: House) -> None:
    with pytest.raises(urllib.error.HTTPError, match="404"):
        await asyncio.to_thread(fetch, f"http://127.0.0.1:{house.port}/")


async def test_silent_connections_shut_nobody_out(house: House) -> None:
    silent = [await asyncio.open_connection("127.0.0.1", house.port) for _ in range(http_server.MAX_CONNECTIONS + 1)]
    assert (await house.scrape())["echelon:replica_ready", "0"] == 1
    assert await silent[0][0].read() == b"", "the oldest was dropped"
    for _, writer in silent:
        writer.close()


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /metrics HTTP/1.1\r\nHost: x\r\nAccept: application/openmetrics-text\r\n", b"HTTP/1.1 200 OK"),
        (b"HEAD /metrics HTTP/1.0\r\n", b"HTTP/1.1 200 OK"),
        (b"GET /metrics?a=b HTTP/1.1\r\nHost: x\r\n", b"HTTP/1.1 200 OK"),
        (b"POST /metrics HTTP/1.1\r\nHost: x\r\n", b"HTTP/1.1 405"),
        (b"GET /nothing HTTP/1.1\r\nHost: x\r\n", b"HTTP/1.1 404"),
        (b"\xff\r\n", b"HTTP/1.1 400"),
        (b"GET /metrics HTTP/1.1\r\nA: " + b"a" * (1 << 20), b"HTTP/1.1 400"),
    ],
)
async def test_every_request_has_a_status(house: House, request_: bytes, status: bytes) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", house.port)
    writer.write(request_ + b"Connection: close\r\n\r\n")
    assert (await reader.read()).startswith(status)
    writer.close()


async def test_a_taken_http_port_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        gateway = Gateway(gateway_spec("127.0.0.1:1", port))
        with pytest.raises(StartupError, match=rf"127\.0\.0\.1:{port} is taken.*server\.http_port"):
            await gateway.start()
        await gateway.drain(grace_s=0)

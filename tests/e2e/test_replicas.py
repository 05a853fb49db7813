"""Several replicas behind two gateways, without Ray: which of them serves changes no token, and one can be lost."""

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from childproc.wires import open_blocking_channel
from cluster.deployment.settings import KvCacheSettings, SchedulerSettings, ServerSettings
from cluster.errors import StartError
from cluster.local import LocalDeployment, local_settings
from cluster.processes.status import State
from echelon import AsyncClient, Client, __version__
from echelon.errors import UnavailableError
from echelon.pb import process_pb2, scheduler_pb2, scheduler_pb2_grpc
from echelon.results import Completion
from gateway.server import Gateway

TARGET = Path(__file__).parents[2] / "models" / "demo-target"
BLOCK_SIZE = 16
PROMPTS = [f"def task_{number}(items):\n" for number in range(6)]
OPTIONS: dict[str, Any] = {"max_tokens": 24, "temperature": 1.0, "seed": 3, "ignore_eos": True, "timeout_s": 60.0}

LONG: dict[str, Any] = {**OPTIONS, "max_tokens": 150}


@pytest.fixture(scope="module")
def deployment() -> Iterator[LocalDeployment]:
    settings = local_settings(
        TARGET,
        dtype="float32",  # whatever runs beside a request must not change a token
        kv_cache=KvCacheSettings(device_bytes=16 << 20),
        scheduler=SchedulerSettings(max_num_seqs=4, max_num_batched_tokens=256, max_model_len=256),
        server=ServerSettings(grpc_port=0, http_port=0, gateways=2),
        num_replicas=2,
    )
    with LocalDeployment(settings, gateway=True) as deployment:
        yield deployment


@pytest.fixture
def client(deployment: LocalDeployment) -> Iterator[Client]:
    with Client(deployment.running.gateway_address) as client:
        yield client


def tokens_of(deployment: LocalDeployment) -> list[int]:
    """How many each replica has generated."""
    totals = []
    for replica in deployment.running.replicas:
        with open_blocking_channel(replica.scheduler_address) as channel:
            stub = scheduler_pb2_grpc.SchedulerStub(channel)
            status = stub.GetSchedulerStatus(scheduler_pb2.GetSchedulerStatusRequest())
            totals.append(status.generation_tokens_total)
    return totals


def test_requests_at_once_are_spread_and_get_what_each_gets_alone(deployment: LocalDeployment, client: Client) -> None:
    alone = [client.generate(prompt, **OPTIONS).token_ids for prompt in PROMPTS]
    before = tokens_of(deployment)
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        together = list(pool.map(lambda prompt: client.generate(prompt, **OPTIONS).token_ids, PROMPTS))
    assert together == alone
    shares = [after - old for old, after in zip(before, tokens_of(deployment), strict=True)]
    assert sum(shares) == sum(map(len, alone))
    assert min(shares) > 0


def test_a_conversation_stays_where_it_is_cached_also_with_a_gateway_that_has_just_started(
    deployment: LocalDeployment, client: Client
) -> None:
    talks = [
        f"# Notes of day {number}, which nobody else has kept.\n" * 2 for number in range(5)
    ]  # odd, so that taking turns would miss
    for turn in range(2):
        for number, talk in enumerate(talks):
            completion = client.generate(talk, **OPTIONS)
            if turn:
                assert_was_cached(completion)
            talks[number] = f"{talk}{completion.text}\nAnd then?\n"
    assert min(tokens_of(deployment)) > 0, "both replicas have conversations"
    for completion in asyncio.run(ask_through_a_new_gateway(deployment, talks)):
        assert_was_cached(completion)


async def ask_through_a_new_gateway(deployment: LocalDeployment, prompts: list[str]) -> list[Completion]:
    gateway = Gateway(
        process_pb2.GatewaySpec(
            name="second",
            version=__version__,
            server=process_pb2.ServerSection(host="127.0.0.1"),
            model_name=TARGET.name,
            model_dir=str(TARGET),
            scheduler_addresses=[replica.scheduler_address for replica in deployment.running.replicas],
            max_model_len=256,
            vocab_size=4096,
        )
    )
    async with AsyncClient(await gateway.start()) as client:
        while (await client.server_info()).num_ready_replicas < 2:
            pass
        # One for each replica; its reply comes after what the replica reports of its cache.
        await asyncio.gather(*(client.generate([number], **OPTIONS) for number in (1, 2)))
        completions = [await client.generate(prompt, **OPTIONS) for prompt in prompts]
    await gateway.drain(grace_s=0)
    return completions


def assert_was_cached(completion: Completion) -> None:
    """All blocks of what was said before, but for the last question."""
    usage = completion.usage
    assert usage.cached_prompt_tokens >= usage.prompt_tokens - 2 * BLOCK_SIZE, usage


def test_parts_are_started_again_on_request_while_streams_go_on(deployment: LocalDeployment, client: Client) -> None:
    expected = [client.generate(prompt, **LONG).token_ids for prompt in PROMPTS[:4]]
    pids = pids_of(deployment)
    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(client.generate, prompt, **LONG) for prompt in PROMPTS[:4]]
        for name in ("target-0.0", "scheduler-1"):
            deployment.supervisor.restart(name)
        assert [each.result().token_ids for each in running] == expected
    changed = {name for name, pid in pids_of(deployment).items() if pid != pids[name]}
    assert changed == {"target-0.0", "scheduler-1"}
    with pytest.raises(StartError, match=r"there is no process 'target-7\.0'; there are target-0\.0, "):
        deployment.supervisor.restart("target-7.0")


def pids_of(deployment: LocalDeployment) -> dict[str, int | None]:
    return deployment.processes.read(lambda board: {process.name: process.pid for process in board.processes})


def test_a_deployment_that_drains_finishes_what_it_has_and_takes_nothing_new(
    deployment: LocalDeployment, client: Client
) -> None:
    expected = client.generate(PROMPTS[0], **LONG).token_ids
    with ThreadPoolExecutor(1) as pool:
        stream = client.stream(PROMPTS[0], **LONG)
        next(stream)
        running = pool.submit(stream.result)
        assert deployment.supervisor.drain(60.0) == 0
        assert running.result().token_ids == expected
    assert deployment.state() == (State.DRAINED, "it takes no new requests; echelon drain --undo ends that")
    with pytest.raises(UnavailableError, match="it is being drained"):
        client.generate(PROMPTS[1], max_tokens=1, timeout_s=60.0)
    deployment.supervisor.restart("gateway-0")
    with pytest.raises(UnavailableError):
        client.generate(PROMPTS[1], max_tokens=1, timeout_s=60.0)
    deployment.supervisor.resume()
    until_ready(client)
    assert client.generate(PROMPTS[0], **LONG).token_ids == expected


def until_ready(client: Client) -> None:
    deadline = time.monotonic() + 30.0
    while client.server_info().num_ready_replicas < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_what_a_lost_replica_does_not_serve_the_other_does(deployment: LocalDeployment, client: Client) -> None:
    expected = client.generate(PROMPTS[0], **OPTIONS).token_ids
    version, pid = deployment.processes.read(lambda board: (board.version, board.process("target-1.0").pid))
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    deployment.processes.wait_change(version, timeout_s=30.0)
    state, reason = deployment.state()
    assert state is State.DEGRADED
    assert reason.startswith("target-1.0: ")
    for _ in range(3):
        assert client.generate(PROMPTS[0], **OPTIONS).token_ids == expected


def test_a_stream_goes_on_at_the_other_gateway(deployment: LocalDeployment, client: Client) -> None:
    """The client is told of both, and does not wait until the lost one is back."""
    options = {**OPTIONS, "max_tokens": 160, "n": 2}
    undisturbed = client.generate(PROMPTS[0], **options)
    first, second = deployment.running.gateway_addresses
    lost = gateway_pid(deployment)
    assert lost is not None
    with Client([first, second]) as other, other.stream(PROMPTS[0], **options) as stream:
        next(stream)
        os.kill(lost, signal.SIGKILL)
        assert other.cancel("nobody's") is False, "one gateway answers, which is enough"
        resumed = stream.result()
    assert [sample.token_ids for sample in resumed.samples] == [sample.token_ids for sample in undisturbed.samples]
    assert [sample.text for sample in resumed.samples] == [sample.text for sample in undisturbed.samples]
    deadline = time.monotonic() + 60
    while deployment.state()[0] is not State.READY or gateway_pid(deployment) == lost:
        assert time.monotonic() < deadline, "not within a minute"
        time.sleep(0.02)  # polls other processes: there is nothing to wait on
    assert deployment.running.gateway_addresses == (first, second)


def gateway_pid(deployment: LocalDeployment) -> int | None:
    return deployment.processes.read(lambda board: board.process("gateway-0").pid)

"""Processes of a deployment are killed while streams run: the streams go on, and what died is started again."""

import asyncio
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.chaos import ROLES, Chaos, Tally
from bench.crowd import make_cases
from cluster.deployment.settings import KvCacheSettings, SchedulerSettings
from cluster.local import LocalDeployment, LocalDraft, local_settings
from cluster.processes.status import ProcessStatus, State
from echelon import Client

MODELS = Path(__file__).parents[2] / "models"
PROMPT = "def quicksort(items):\n"
OPTIONS: dict[str, Any] = {"max_tokens": 64, "temperature": 1.0, "seed": 3, "ignore_eos": True, "timeout_s": 60.0}


@pytest.fixture(scope="module")
def deployment() -> Iterator[LocalDeployment]:
    settings = local_settings(
        MODELS / "demo-target",
        tp_size=2,
        draft=LocalDraft(folder=MODELS / "demo-draft"),
        dtype="float32",  # a prompt that is computed again in other chunks must not change a token
        kv_cache=KvCacheSettings(device_bytes=32 << 20),
        scheduler=SchedulerSettings(max_num_seqs=16, max_num_batched_tokens=256, max_model_len=512),
        spares="auto",
    )
    with LocalDeployment(settings, gateway=True) as deployment:
        yield deployment


@pytest.fixture
def client(deployment: LocalDeployment) -> Iterator[Client]:
    with Client(deployment.running.gateway_address) as client:
        yield client


def pid_of(deployment: LocalDeployment, name: str) -> int:
    """0 while it has none."""
    return deployment.processes.read(lambda board: board.process(name).pid) or 0


def pids_by_role(deployment: LocalDeployment) -> dict[str, set[int | None]]:
    pids: dict[str, set[int | None]] = {}
    for process in deployment.processes.read(lambda board: board.processes):
        pids.setdefault(process.id.role, set()).add(process.pid)
    return pids


def kill(deployment: LocalDeployment, name: str) -> None:
    pid = pid_of(deployment, name)
    assert pid, f"{name} is not running"
    os.kill(pid, signal.SIGKILL)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "not within a minute"
        time.sleep(0.02)  # polls other processes: there is nothing to wait on


def wait_until_ready(deployment: LocalDeployment, name: str, old_pid: int) -> None:
    """Until all parts serve, with another process in the place of the one that was killed."""
    wait_until(lambda: deployment.state()[0] is State.READY and pid_of(deployment, name) != old_pid)


def test_drafts_come_back_after_the_draft_died(deployment: LocalDeployment, client: Client) -> None:
    undisturbed = client.generate(PROMPT, **OPTIONS)
    old_pid = pid_of(deployment, "draft-0.0")
    target_pids = [pid_of(deployment, f"target-0.{rank}") for rank in range(2)]
    with client.stream(PROMPT, **OPTIONS) as stream:
        next(iter(stream))
        kill(deployment, "draft-0.0")
        for _ in stream:
            pass
        assert stream.result().token_ids == undisturbed.token_ids
    wait_until_ready(deployment, "draft-0.0", old_pid)
    again = client.generate(PROMPT, speculation={"num_speculative_tokens": 4}, **OPTIONS)
    assert again.token_ids == undisturbed.token_ids
    assert again.speculation.num_draft_tokens > 0
    assert [pid_of(deployment, f"target-0.{rank}") for rank in range(2)] == target_pids, "nothing else was touched"
    assert [event.part for event in deployment.supervisor.events()[-3:]] == ["draft-0"] * 3


def test_spares_take_the_place_of_a_target_that_died(deployment: LocalDeployment, client: Client) -> None:
    def ranks() -> list[ProcessStatus]:
        board = deployment.processes.read(lambda board: board.processes)
        return [process for process in board if process.id.role == "target"]

    undisturbed = client.generate(PROMPT, **OPTIONS)
    wait_until(lambda: all(rank.spare == "ready" for rank in ranks()))
    old_pid = pid_of(deployment, "target-0.1")
    with client.stream(PROMPT, **OPTIONS) as stream:
        next(iter(stream))
        kill(deployment, "target-0.1")
        for _ in stream:
            pass
        assert stream.result().token_ids == undisturbed.token_ids
    wait_until_ready(deployment, "target-0.1", old_pid)
    last = deployment.supervisor.events()[-1]
    assert last.part == "target-0"
    assert last.text.startswith("is up again, ")
    assert last.text.endswith(" s after it was lost, by 2 spares")
    wait_until(lambda: all(rank.spare for rank in ranks()))  # the next ones are on their way


def test_a_gateway_that_died_is_back_at_its_address(deployment: LocalDeployment, client: Client) -> None:
    old_pid = pid_of(deployment, "gateway-0")
    address = deployment.running.gateway_address
    kill(deployment, "gateway-0")
    wait_until_ready(deployment, "gateway-0", old_pid)
    assert deployment.running.gateway_address == address
    assert client.generate(PROMPT, max_tokens=4, temperature=0, ignore_eos=True).usage.completion_tokens == 4


@pytest.fixture(scope="module")
def chaos(deployment: LocalDeployment) -> Chaos:
    chaos = Chaos(deployment, make_cases(7, 24), random.Random(0))
    asyncio.run(chaos.observe())
    return chaos


async def lose_one(chaos: Chaos, role: str, tally: Tally) -> None:
    async with chaos.load():
        await chaos.lose(role, "kill", tally)


@pytest.mark.parametrize("role", ROLES)
def test_no_stream_notices_that_a_process_was_killed(deployment: LocalDeployment, chaos: Chaos, role: str) -> None:
    """At a random moment, whichever rank."""
    before, tally = pids_by_role(deployment), Tally()
    asyncio.run(lose_one(chaos, role, tally))
    assert tally.damage.compared > 0
    assert not tally.damage.is_any, tally.damage
    after = pids_by_role(deployment)
    assert {other for other in after if after[other] != before[other]} == {role}, "nothing else was started again"
    assert not after[role] & before[role]

"""Contexts that are longer than the devices hold, through the gateway: the tokens and log-probabilities of a deployment
whose devices hold them."""

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest

from cluster.deployment.settings import KvCacheSettings, SchedulerSettings, SpeculationSettings
from cluster.local import LocalDeployment, local_settings
from echelon import Client
from echelon.errors import InvalidRequestError
from echelon.results import Completion

TARGET = Path(__file__).parents[2] / "models" / "demo-target"
BLOCK = 16
NUM_BLOCKS = 8  # on the small devices
MAX_LEN = 640
NUM_PROMPT = 560
NUM_TOKENS = 24
NUM_SLOTS = 2 * MAX_LEN // BLOCK
LENGTHS = {"temperature": 0.8, "seed": 7, "ignore_eos": True, "timeout_s": 120.0, "logprobs": 1}


@contextmanager
def deployed(tp_size: int, num_blocks: int, attention: Literal["full", "budgeted"]) -> Iterator[Client]:
    plain = local_settings(
        TARGET,
        tp_size=tp_size,
        dtype="float32",
        scheduler=SchedulerSettings(max_num_seqs=4, max_num_batched_tokens=256, max_model_len=MAX_LEN),
        speculation=SpeculationSettings(method="suffix", num_speculative_tokens=3),
        attention=attention,
        batch_invariant=True,
    )
    token_bytes = plain.target.kv_bytes_per_token
    cache = KvCacheSettings(
        block_size=BLOCK,
        device_bytes=num_blocks * BLOCK * token_bytes,
        cpu_bytes=NUM_SLOTS * BLOCK * token_bytes * tp_size,
    )
    with (
        LocalDeployment(replace(plain, kv_cache=cache), gateway=True) as deployment,
        Client(deployment.running.gateway_address) as client,
    ):
        yield client


def prompts() -> list[list[int]]:
    """Half of each repeats the other, so that lookup has drafts."""
    rng = random.Random(5)
    halves = [rng.choices(range(100, 900), k=NUM_PROMPT // 2) for _ in range(2)]
    return [2 * half for half in halves]


def ask(client: Client, prompt: list[int], *, speculates: bool, **others: Any) -> Completion:
    return client.generate(prompt, max_tokens=NUM_TOKENS, speculation={"enabled": speculates}, **LENGTHS | others)


@pytest.mark.parametrize("tp_size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_context_of_several_times_the_device_is_served_exactly(tp_size: int) -> None:
    """Several at once, with and without drafts, and again from host memory; aborted ones leave nothing behind."""
    with deployed(tp_size, MAX_LEN // BLOCK, "full") as client:
        expected = [ask(client, prompt, speculates=False) for prompt in prompts()]
        with pytest.raises(InvalidRequestError, match="must be full here: budgeted needs"):
            ask(client, prompts()[0], speculates=False, attention="budgeted")

    with deployed(tp_size, NUM_BLOCKS, "budgeted") as client, ThreadPoolExecutor(4) as pool:
        with pytest.raises(InvalidRequestError, match="room for 128: shorten the prompt, or set"):
            ask(client, prompts()[0], speculates=False)
        for _ in range(3):
            with client.stream(prompts()[0], max_tokens=NUM_TOKENS, attention="budgeted", **LENGTHS) as stream:
                next(stream)
        for speculates in (False, True):
            asked = [
                pool.submit(ask, client, prompt, speculates=speculates, attention="budgeted") for prompt in prompts()
            ]
            short = ask(client, prompts()[0][:60], speculates=speculates)
            assert short.token_ids
            for done, full in zip((each.result() for each in asked), expected, strict=True):
                assert done.token_ids == full.token_ids
                assert done.logprobs == full.logprobs
                assert not done.usage.approximations
        assert done.usage.cached_prompt_tokens_from_host > NUM_PROMPT - 2 * NUM_BLOCKS * BLOCK
        assert done.speculation.num_accepted_tokens > 0

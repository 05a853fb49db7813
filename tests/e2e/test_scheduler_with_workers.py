"""Scheduler and workers as real processes: a stream does not depend on how it was computed."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from childproc.wires import open_blocking_channel
from cluster.deployment.settings import KvCacheSettings, SpeculationSettings
from cluster.local import LOCAL_SCHEDULER, LocalDeployment, LocalDraft, local_settings
from echelon.pb import inference_pb2, scheduler_pb2, scheduler_pb2_grpc
from tests.helpers.scheduler_client import SchedulerClient

MODELS = Path(__file__).parents[2] / "models"
PROMPTS = ["def fibonacci(n):\n    ", "import os\nimport sys\n\ndef main(", "class Stack:\n    def __init__(self"]
NUM_TOKENS = 40


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MODELS / "demo-target" / "tokenizer.json"))


@pytest.fixture(scope="module")
def stub() -> Iterator[scheduler_pb2_grpc.SchedulerStub]:
    """One deployment with a draft; requests switch speculation on and off. With `batch_invariant`, sums are the same in
    every batch."""
    settings = local_settings(
        MODELS / "demo-target",
        draft=LocalDraft(folder=MODELS / "demo-draft"),
        dtype="bfloat16",
        batch_invariant=True,
        kv_cache=KvCacheSettings(device_bytes=64 << 20),
        scheduler=replace(LOCAL_SCHEDULER, max_num_batched_tokens=128),
        speculation=SpeculationSettings(num_speculative_tokens=4),
    )
    with (
        LocalDeployment(settings) as deployment,
        open_blocking_channel(deployment.running.replicas[0].scheduler_address) as channel,
    ):
        yield scheduler_pb2_grpc.SchedulerStub(channel)


def connect(stub: scheduler_pb2_grpc.SchedulerStub) -> SchedulerClient:
    return SchedulerClient(stub, max_tokens=NUM_TOKENS, seed=7)


def requests(tokenizer: Tokenizer) -> dict[str, tuple[list[int], dict[str, Any]]]:
    """Greedy and sampled requests of every kind, to run side by side."""
    prompts = [tokenizer.encode(text).ids for text in PROMPTS]
    long = [token_id for _ in range(12) for prompt in prompts for token_id in prompt]
    return {
        "greedy": (prompts[0], {"temperature": 0.0}),
        "sampled": (prompts[1], {"temperature": 1.0}),
        "samples": (prompts[2], {"temperature": 1.0, "n": 3}),
        "penalised": (prompts[0], {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.5}),
        "truncated": (prompts[1], {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "min_p": 0.01}),
        "logprobs": (prompts[2], {"temperature": 0.7, "logprobs": 2}),
        "chunked": (long, {"temperature": 1.0}),
    }


def run(
    stub: scheduler_pb2_grpc.SchedulerStub, tokenizer: Tokenizer, *, num_drafts: int | None, together: bool
) -> SchedulerClient:
    client = connect(stub)
    wanted = requests(tokenizer)
    for number, (request_id, (prompt, sampling)) in enumerate(wanted.items(), start=1):
        client.submit(request_id, prompt, num_drafts=num_drafts, ignore_eos=True, **sampling)
        if not together:
            while len(client.ends) < number:
                client.next_reply()
    client.finish(len(wanted))
    return client


def test_streams_are_the_same_with_and_without_drafts(
    stub: scheduler_pb2_grpc.SchedulerStub, tokenizer: Tokenizer
) -> None:
    plain = run(stub, tokenizer, num_drafts=0, together=False)
    drafted = run(stub, tokenizer, num_drafts=4, together=True)
    adaptive = run(stub, tokenizer, num_drafts=None, together=True)
    for other in (drafted, adaptive):
        assert plain.tokens == other.tokens
        assert plain.text == other.text
    assert all(len(tokens) == NUM_TOKENS for tokens in plain.tokens.values())
    assert len(set(map(tuple, (plain.tokens["samples", i] for i in range(3))))) == 3
    for request_id, end in drafted.ends.items():
        assert end.speculation.num_draft_tokens > 0, request_id
        assert plain.ends[request_id].speculation.num_draft_tokens == 0
    assert sum(end.speculation.num_accepted_tokens for end in drafted.ends.values()) > 0
    for key, tokens in plain.tokens.items():
        prompt = requests(tokenizer)[key[0]][0]
        whole = tokenizer.decode([*prompt, *tokens])
        assert whole == tokenizer.decode(prompt) + plain.text[key]


def test_a_cached_prefix_changes_nothing(stub: scheduler_pb2_grpc.SchedulerStub, tokenizer: Tokenizer) -> None:
    prompt = requests(tokenizer)["chunked"][0][5:]
    client = connect(stub)
    for request_id in ("cold", "warm"):
        client.submit(request_id, prompt, temperature=1.0)
        while request_id not in client.ends:
            client.next_reply()
    client.finish(2)
    assert client.ends["cold"].usage.cached_prompt_tokens == 0
    assert client.ends["warm"].usage.cached_prompt_tokens > len(prompt) - 32
    assert client.tokens["warm", 0] == client.tokens["cold", 0]


def test_prompt_logprobs_cover_the_prompt(stub: scheduler_pb2_grpc.SchedulerStub, tokenizer: Tokenizer) -> None:
    prompt = requests(tokenizer)["chunked"][0]
    client = connect(stub)
    client.submit("r", prompt, temperature=0.0, max_tokens=4, prompt_logprobs=1, logprobs=1)
    client.finish(1)
    first, *others = client.ends["r"].prompt_logprobs
    assert not first.HasField("chosen")
    assert [entry.chosen.token_id for entry in others] == prompt[1:]
    assert all(entry.chosen.logprob <= entry.top[0].logprob < 0 for entry in others)


def test_cancelled_requests_leave_nothing_behind(stub: scheduler_pb2_grpc.SchedulerStub, tokenizer: Tokenizer) -> None:
    client = connect(stub)
    for i in range(8):
        client.submit(f"r{i}", tokenizer.encode(PROMPTS[i % 3]).ids, num_drafts=4 * (i % 2), max_tokens=1000)
    while len(client.tokens) < 8:
        client.next_reply()
    for i in range(8):
        client.cancel(f"r{i}")
    client.finish(8)
    assert {end.finished[0].reason for end in client.ends.values()} == {inference_pb2.FINISH_REASON_ABORT}
    status = stub.GetSchedulerStatus(scheduler_pb2.GetSchedulerStatusRequest())
    assert status.num_free_blocks == status.num_blocks
    assert status.num_free_draft_blocks == status.num_draft_blocks
    assert status.num_requests_running == 0

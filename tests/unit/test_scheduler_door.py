"""Messages that no gateway sends: the scheduler refuses only these, and requests beside them are not affected."""

import math
import random
from typing import Any

import pytest
from grpc import StatusCode

from echelon.pb import scheduler_pb2, worker_pb2
from echelon.pb.sampling_pb2 import SamplingParams
from gateway.requests.refusal import Refusal
from gateway.requests.sampling import built_in_defaults, resolve_sampling
from scheduler.requests.checks import check_submit
from tests.helpers.fake_group import FakeEngine
from tests.helpers.scheduler_sim import Simulation, submit
from tests.helpers.scrambled import scramble
from workers.engine.rounds import plan_target
from workers.engine.seq_state import Limits, SeqTable

PROMPT = [5, 4, 3, 2, 1]
VOCAB_SIZE, MAX_MODEL_LEN = 40, 128

# For each field: what a client of the scheduler's port could put there, and what the refusal names.
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "prompt id": ({"prompt": [1, VOCAB_SIZE]}, "prompt_token_ids: token id 40 is outside the vocabulary of 40"),
    "largest id": ({"prompt": [2**32 - 1]}, "prompt_token_ids: token id 4294967295"),
    "no prompt": ({"prompt": []}, "prompt_token_ids is empty"),
    "long prompt": ({"prompt": [1] * MAX_MODEL_LEN}, "prompt_token_ids has 128 tokens"),
    "no id": ({"request_id": ""}, "request_id"),
    "long id": ({"request_id": "x" * 129}, "request_id must have 1 to 128 characters, got 129"),
    "long salt": ({"cache_salt": "\u00e9" * 129}, "cache_salt must have at most 256 bytes, got 258"),
    "deadline": ({"timeout_s": math.nan}, "timeout_s must be a number"),
    "stop strings": ({"stop": ["a"] * 65}, "sampling.stop: at most 64 strings, got 65"),
    "stop string": ({"stop": ["a" * 1025]}, "sampling.stop: at most 1024 characters a string, got 1025"),
    "stop ids": ({"stop_token_ids": [1] * 41}, "sampling.stop_token_ids: at most 40 tokens, got 41"),
    **{
        f"{field} {value}": ({field: value}, f"sampling.{field}")
        for field, values in {
            "temperature": (-1.0, math.nan, math.inf),
            "top_p": (0.0, 1.5, math.nan),
            "top_k": (-1, -(2**31)),
            "min_p": (-0.1, 1.1, math.nan),
            "repetition_penalty": (0.0, -1.0, math.nan, math.inf),
            "presence_penalty": (-2.5, math.nan),
            "frequency_penalty": (2.5, math.inf),
            "logit_bias": ({-1: 1.0}, {VOCAB_SIZE: 1.0}, {3: math.nan}, {3: 101.0}),
            "stop_token_ids": ([-1], [VOCAB_SIZE]),
            "max_tokens": (0, -1),
            "min_tokens": (-1,),
            "logprobs": (-1, 21),
            "prompt_logprobs": (-1, 2**31 - 1),
            "n": (0, -1, 65, 2**31 - 1),
        }.items()
        for value in values
    },
}


def bad_submit(fields: dict[str, Any]) -> scheduler_pb2.Submit:
    fields = {"request_id": "bad", "prompt": PROMPT, **fields}
    return submit(fields.pop("request_id"), fields.pop("prompt"), **fields)


def test_a_bad_submit_fails_no_other() -> None:
    """It comes between the rounds of another request, which runs to its end, and leaves nothing behind."""
    sim = Simulation(draft=FakeEngine(role=2))
    other = submit("other", PROMPT, max_tokens=100)
    sim.submit(other)
    for name, (fields, words) in BAD.items():
        message = bad_submit(fields)
        sim.submit(message)
        failed = sim.failed.pop(message.request_id, None)
        assert failed is not None, name
        assert (failed.code, words in failed.message) == (StatusCode.INVALID_ARGUMENT.value[0], True), failed.message
        sim.ended_at.clear()
        sim.step()
    sim.run()
    sim.assert_plain(other)
    assert len(sim.tokens["other", 0]) == 100
    sim.assert_all_free()


def worker_table() -> SeqTable:
    """The table of an empty worker, as large as the fake one's."""
    limits = Limits(
        num_slots=8,
        max_model_len=MAX_MODEL_LEN,
        vocab_size=VOCAB_SIZE,
        block_size=4,
        num_blocks=64,
        max_num_batched_tokens=64,
    )
    return SeqTable(limits)


@pytest.mark.parametrize("seed", range(4))
def test_any_submit_is_served_or_refused(seed: int) -> None:
    """A worker accepts the rounds of whatever is served."""
    rng = random.Random(seed)
    sim = Simulation(max_queue=1000)
    other = submit("other", PROMPT, max_tokens=120)
    sim.submit(other)
    for number in range(60):
        message = submit("", PROMPT, max_tokens=2)
        scramble(rng, message, rng.choice([0.02, 0.1, 0.5]))
        if rng.random() < 0.9:
            message.ClearField("resume_from")  # a senseless one is always refused
        message.request_id = f"r{number}"
        sim.submit(message)
        sim.plan()
        for round_ in sim.target_rounds:
            plan_target(worker_pb2.Round(init_seqs=round_.init_seqs), worker_table())
        sim.step()
    sim.run()
    sim.assert_plain(other)
    assert 0 < len(sim.failed) < 60
    sim.assert_all_free()


def test_the_scheduler_accepts_what_a_gateway_accepts() -> None:
    rng = random.Random(0)
    num_passed = 0
    for _ in range(2000):
        given = SamplingParams()
        scramble(rng, given, rng.choice([0.02, 0.1, 0.5]))
        try:
            sampling = resolve_sampling(given, built_in_defaults(), room=100, vocab_size=VOCAB_SIZE)
        except Refusal:
            continue
        num_passed += 1
        message = scheduler_pb2.Submit(request_id="r", prompt_token_ids=PROMPT, sampling=sampling)
        check_submit(message, max_model_len=MAX_MODEL_LEN, vocab_size=VOCAB_SIZE)
    assert num_passed > 100

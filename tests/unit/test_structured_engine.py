"""Engines with grammars, in one process and in fp32: outputs are valid, and depend neither on drafts nor on breaks."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from echelon.pb.sampling_pb2 import Grammar, SeqSampling
from tests.helpers.engines import DRAFT, TARGET, drive, interleave, make_engine
from tests.helpers.rounds import Driver, greedy, seeded
from tests.helpers.structured import EOS, assert_valid, grammar
from workers.engine.engine import Engine

DEMO = Path(__file__).parents[2] / "models" / "demo-draft"
PROMPTS = [[5, 99, 3, 14, 15], [31, 41], [7] * 9]
NUM_TOKENS = 40  # more than any object has
SAMPLINGS = [
    greedy(grammar=grammar(), logprobs=1),
    seeded(1, grammar=grammar()),
    seeded(2, grammar=grammar(), top_k=5, top_p=0.9, min_p=0.01),
    seeded(3, grammar=grammar(), repetition_penalty=1.4, presence_penalty=1.0, logit_bias={90: 5.0, EOS: 50.0}),
    seeded(4, grammar=grammar(), min_tokens=30, suppressed_token_ids=[EOS, 90]),
]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return make_engine(DEMO, TARGET, max_model_len=64, kv_cache_bytes=8 << 20)


@pytest.fixture
def target(engine: Engine) -> Iterator[Driver]:
    engine.reset()
    return drive(engine)


def plain(driver: Driver, prompt: list[int], sampling: SeqSampling) -> list[int]:
    seq = driver.start(7, prompt, sampling)
    output = driver.generate(seq, NUM_TOKENS)
    driver.send(driver.round([], free_slots=[7]))
    return output


def test_every_output_is_valid_and_drafts_change_no_token(target: Driver) -> None:
    prompts = [PROMPTS[i % 3] for i in range(len(SAMPLINGS))]
    streams = [plain(target, prompt, sampling) for prompt, sampling in zip(prompts, SAMPLINGS, strict=True)]
    for stream in streams:
        assert_valid(DEMO, stream)
    assert len({tuple(stream) for stream in streams}) == len(streams)
    rng = random.Random(4)
    seqs = [
        (target.start(slot, prompt, sampling), stream)
        for slot, (prompt, sampling, stream) in enumerate(zip(prompts, SAMPLINGS, streams, strict=True))
    ]
    interleave(target, seqs, rng, NUM_TOKENS)
    for seq, stream in seqs:
        assert seq.output[:NUM_TOKENS] == stream


def test_drafts_that_leave_the_grammar_are_rejected_unseen(target: Driver) -> None:
    stream = plain(target, PROMPTS[0], SAMPLINGS[0])
    seq = target.start(0, PROMPTS[0], SAMPLINGS[0])
    target.run((seq, target.target_row(seq)))
    row = target.target_row(seq, drafts=[*stream[1:3], 90, *stream[4:6]])
    (result,) = target.run((seq, row))
    assert (result.num_verified_tokens, result.num_accepted_tokens) == (5, 2)
    assert list(result.token_ids) == stream[1:4]
    assert [entry.chosen.token_id for entry in result.logprobs] == stream[1:4]


def test_a_preempted_seq_goes_on_where_it_was(target: Driver) -> None:
    stream, half = plain(target, PROMPTS[1], SAMPLINGS[1]), 7
    seq = target.start(0, PROMPTS[1] + stream[:half], SAMPLINGS[1])
    target.inits[0].num_prompt_tokens = len(PROMPTS[1])
    assert target.generate(seq, NUM_TOKENS - half) == stream[half:]


def test_logprobs_are_those_of_the_model_without_the_grammar(target: Driver) -> None:
    found = []
    for slot, sampling in enumerate((SAMPLINGS[0], greedy(logprobs=1))):
        seq = target.start(slot, PROMPTS[0], sampling)
        found += [target.run((seq, target.target_row(seq)))[0].logprobs[0]]
    assert found[0].top == found[1].top
    assert found[0].chosen != found[1].chosen


def test_a_grammar_that_cannot_go_on_ends_its_own_seq(target: Driver) -> None:
    broken = greedy(grammar=Grammar(source="start: nothing", eos_token_ids=[EOS]))
    truth = plain(target, PROMPTS[0], greedy())
    one, other = target.start(0, PROMPTS[0], broken), target.start(1, PROMPTS[0], greedy())
    found = target.run((one, target.target_row(one)), (other, target.target_row(other)))
    assert "nothing" in found[0].grammar_error
    assert not found[0].non_finite
    assert not found[0].token_ids
    assert list(found[1].token_ids) == truth[:1]


@pytest.mark.parametrize("sampling", SAMPLINGS[:2])
def test_drafts_are_legal_whatever_happens_to_their_chain(target: Driver, sampling: SeqSampling) -> None:
    """The draft has the target's weights here, so a legal chain is the target's stream."""
    stream = plain(target, PROMPTS[0], sampling)
    draft = drive(make_engine(DEMO, DRAFT, max_model_len=64))
    seq = draft.start(0, PROMPTS[0], sampling)
    draft.run((seq, draft.draft_row(seq, 6)), num_alternatives=2, confidences=True)
    assert seq.output == stream[:6]
    start = len(PROMPTS[0])
    branch = draft.fork(seq, 1, start + 4)
    rows = [
        (seq, draft.draft_row(seq, 3, crop_len=start + 3, append=stream[3:5])),
        (branch, draft.draft_row(branch, 4, append=stream[4:5])),
    ]
    draft.run(*rows, num_alternatives=2)
    assert seq.output == stream[:8]
    assert branch.output == stream[:9]
    draft.run((seq, draft.draft_row(seq, len(stream) - 8)))
    end = stream.index(EOS) + 1
    assert seq.output[:end] == stream[:end]

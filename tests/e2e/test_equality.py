"""The promise of the product on whole deployments: drafts, their number and tensor parallelism never change a token.

Requests with all settings and numbers of drafts run side by side. In fp32, another order of additions may change a
choice whose two best candidates are within TIE of each other. Such a place gives a warning and ends the comparison of
its stream. In bf16 with `batch_invariant` nothing may differ.
"""

import itertools
import json
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch

from cluster.deployment.settings import SpeculationSettings
from cluster.local import LocalDraft
from echelon.pb import inference_pb2
from tests.helpers.deployment_streams import (
    DRAFT,
    MAX_MODEL_LEN,
    NUM_DRAFTS,
    NUM_TOKENS,
    SETTINGS,
    TARGET,
    Case,
    Stream,
    Streams,
    generate,
    make_cases,
    make_structured_cases,
)
from tests.helpers.structured import assert_valid
from tests.helpers.token_rule import TokenRule
from workers.collectives import SoloGroup
from workers.models.loading import load_model

SMALL = LocalDraft(folder=DRAFT)
SERIAL = SpeculationSettings(pipeline="serial")
TIE = 1e-4
MOST_TIES = 2  # of all comparisons with one deployment


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    return make_cases()


@pytest.fixture(scope="module")
def rule() -> TokenRule:
    return rule_of(TARGET)


def rule_of(folder: Path) -> TokenRule:
    model = load_model(
        folder, dtype=torch.float32, device=torch.device("cpu"), group=SoloGroup(), max_model_len=MAX_MODEL_LEN
    )
    return TokenRule(model)


@pytest.fixture(scope="module")
def fp32(cases: dict[str, Case], all_fp32: Callable[[int], Streams]) -> Callable[[int], Streams]:
    """Those of `cases`."""
    return lambda tp_size: {key: stream for key, stream in all_fp32(tp_size).items() if key[0] in cases}


@pytest.fixture(scope="module")
def all_fp32(cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Streams]:
    """Streams in fp32 by the target's tp_size; one deployment runs at a time. In the first, the draft's context is so
    short that the long case outgrows it."""
    wanted = cases | make_structured_cases()
    made: dict[int, Streams] = {}
    short = LocalDraft(folder=shortened(DRAFT, tmp_path_factory.mktemp("draft"), len(cases["long"].prompt) + 16))

    def get(tp_size: int) -> Streams:
        if tp_size not in made:
            draft = short if tp_size == 1 else SMALL
            made[tp_size] = generate(
                wanted, NUM_DRAFTS, target=TARGET, draft=draft, tp_size=tp_size, dtype="float32", speculation=SERIAL
            )
        return made[tp_size]

    return get


def shortened(model: Path, folder: Path, max_len: int) -> Path:
    """The same model with a context of `max_len` tokens."""
    for file in model.iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((model / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": max_len}))
    return folder


def assert_equal_but_for_ties(
    rule: TokenRule, cases: dict[str, Case], pairs: Iterable[tuple[tuple[str, int], Stream, Stream]]
) -> None:
    num_ties = 0
    for (name, k), expected, actual in pairs:
        place = next((i for i in range(NUM_TOKENS) if expected.token_ids[i] != actual.token_ids[i]), None)
        assert_logprobs_are_close(expected, actual, NUM_TOKENS if place is None else place)
        if place is None:
            continue
        case = cases[name]
        lags = rule.lags(case.prompt, expected.token_ids[: place + 1], case.settings)[place]
        choices = [expected.token_ids[place], actual.token_ids[place]]
        behind = [lags[choice].item() for choice in choices]
        message = f"{name}, k = {k}: output token {place} is {choices}, which are {behind} below the best candidate"
        assert max(behind) < TIE, message
        warnings.warn(message, stacklevel=2)
        num_ties += 1
    assert num_ties <= MOST_TIES, f"{num_ties} streams differ at ties: they should be rare"


def assert_logprobs_are_close(expected: Stream, actual: Stream, num_tokens: int) -> None:
    assert len(actual.logprobs) == len(expected.logprobs)
    for ours, theirs in zip(actual.logprobs[:num_tokens], expected.logprobs[:num_tokens], strict=True):
        assert ours.chosen.token_id == theirs.chosen.token_id
        assert ours.chosen.logprob == pytest.approx(theirs.chosen.logprob, abs=TIE)
        assert [entry.logprob for entry in ours.top] == pytest.approx([e.logprob for e in theirs.top], abs=TIE)


def assert_really_speculated(streams: Streams) -> None:
    """Equal streams prove something only if drafts at every depth were accepted, and others were not."""
    for temperature, k in itertools.product((0, 1), {k for _, k in streams} - {0}):
        stats = [
            stream.speculation
            for (name, drafts), stream in streams.items()
            if drafts == k and name.endswith(f"temperature {temperature}")
        ]
        drafted = sum(entry.num_draft_tokens for entry in stats)
        accepted = sum(entry.num_accepted_tokens for entry in stats)
        assert all(entry.num_draft_tokens > NUM_TOKENS // 4 for entry in stats)
        assert drafted // 10 < accepted < drafted, f"temperature {temperature}, k = {k}: {accepted} of {drafted}"
        assert max(len(entry.accepted_per_position) for entry in stats) == k
        assert sum(entry.accepted_per_position[k - 1] for entry in stats if len(entry.accepted_per_position) == k) > 0
    assert all(stream.speculation.num_draft_tokens == 0 for (_, k), stream in streams.items() if k == 0)


def test_plain_decoding_follows_the_rule(
    fp32: Callable[[int], Streams], rule: TokenRule, cases: dict[str, Case]
) -> None:
    """Each token is the best candidate of a separate forward, so streams that are equal below are also right."""
    streams = fp32(1)
    for name, case in cases.items():
        tokens = torch.tensor(streams[name, 0].token_ids)
        lags = rule.lags(case.prompt, tokens.tolist(), case.settings).gather(1, tokens.unsqueeze(1))
        assert len(tokens) == NUM_TOKENS
        assert lags.max() < TIE, f"{name}: token {lags.argmax()} is {lags.max()} below the best candidate"
    sampled = [tuple(stream.token_ids) for (name, _), stream in streams.items() if name.endswith("temperature 1")]
    assert len(set(sampled)) > len(SETTINGS) // 2, "the settings make no difference"


def test_a_seq_longer_than_the_drafts_context_continues_without_drafts(fp32: Callable[[int], Streams]) -> None:
    """The tests around this one check that its tokens stay the same."""
    stats = [fp32(1)["long", k].speculation for k in NUM_DRAFTS if k]
    assert sum(entry.num_draft_tokens for entry in stats) > 0
    assert all(entry.num_accepted_tokens < 16 for entry in stats), "none is accepted beyond the draft's context"


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_drafts_change_no_token(
    fp32: Callable[[int], Streams], rule: TokenRule, cases: dict[str, Case], tp_size: int
) -> None:
    streams = fp32(tp_size)
    assert_really_speculated(streams)
    assert_equal_but_for_ties(rule, cases, ((key, streams[key[0], 0], streams[key]) for key in streams if key[1]))


def test_drafts_come_from_the_draft_model(fp32: Callable[[int], Streams], cases: dict[str, Case]) -> None:
    """As many are accepted as if the draft model had computed each chain from the true history, so its state is cut
    correctly after each verdict. Which rounds have no drafts depends on timing."""
    draft_rule = rule_of(DRAFT)
    predicted, found = inference_pb2.SpeculationStats(), inference_pb2.SpeculationStats()
    for (name, k), stream in fp32(1).items():
        if k and name != "long":
            tokens = torch.tensor(stream.token_ids)
            lags = draft_rule.lags(cases[name].prompt, stream.token_ids, cases[name].settings)
            simulate(lags.gather(1, tokens.unsqueeze(1)).squeeze(1) == 0, k, predicted)
            found.num_draft_tokens += stream.speculation.num_draft_tokens
            found.num_accepted_tokens += stream.speculation.num_accepted_tokens
    assert found.num_draft_tokens == pytest.approx(predicted.num_draft_tokens, rel=0.2)
    expected_rate = predicted.num_accepted_tokens / predicted.num_draft_tokens
    assert found.num_accepted_tokens / found.num_draft_tokens == pytest.approx(expected_rate, abs=0.03)


def simulate(agrees: torch.Tensor, k: int, stats: inference_pb2.SpeculationStats) -> None:
    """Simulates rounds over a stream. `agrees`, bool [NUM_TOKENS]: where the draft model would write the same token."""
    place = 1  # the prompt's last token gave the first output token
    while (num_drafts := min(k, NUM_TOKENS - 1 - place)) > 0:
        num_accepted = int(agrees[place : place + num_drafts].cumprod(dim=0).sum())
        stats.num_draft_tokens += num_drafts
        stats.num_accepted_tokens += num_accepted
        place += num_accepted + 1


@pytest.mark.parametrize("tp_size", [2, 4])
def test_tensor_parallelism_changes_no_token(
    fp32: Callable[[int], Streams], rule: TokenRule, cases: dict[str, Case], tp_size: int
) -> None:
    solo = fp32(1)
    streams = fp32(tp_size)
    assert_equal_but_for_ties(rule, cases, ((key, solo[key], streams[key]) for key in streams))


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_structured_output_is_valid_and_the_same_with_any_drafts(
    all_fp32: Callable[[int], Streams], tp_size: int
) -> None:
    plain = all_fp32(1)
    structured = {key: stream for key, stream in all_fp32(tp_size).items() if key[0].startswith("schema")}
    num_ties = 0
    for (name, _), stream in structured.items():
        assert_valid(TARGET, stream.token_ids)
        num_ties += stream.token_ids != plain[name, 0].token_ids
    assert num_ties <= MOST_TIES, f"{num_ties} streams differ"
    accepted = sum(stream.speculation.num_accepted_tokens for stream in structured.values())
    drafted = sum(stream.speculation.num_draft_tokens for stream in structured.values())
    assert accepted > drafted // 2, "drafts keep to the grammar too, which leaves little choice"


@pytest.mark.parametrize("tp_size", [1, 4])
def test_batch_invariance_leaves_no_difference(cases: dict[str, Case], tp_size: int) -> None:
    streams = generate(
        cases,
        (0, 1, 4),
        target=TARGET,
        draft=SMALL,
        tp_size=tp_size,
        dtype="bfloat16",
        batch_invariant=True,
        speculation=SERIAL,
    )
    assert_really_speculated(streams)
    for (name, k), stream in streams.items():
        assert stream.token_ids == streams[name, 0].token_ids, f"{name}, k = {k}"
        assert stream.logprobs == streams[name, 0].logprobs, f"{name}, k = {k}"


def test_a_draft_that_is_the_target_is_never_rejected(cases: dict[str, Case]) -> None:
    """It has the target's logits to the last bit, and must use the same noise, penalties and candidates too."""
    streams = generate(
        cases, [4], target=DRAFT, draft=SMALL, dtype="bfloat16", batch_invariant=True, speculation=SERIAL
    )
    for (name, _), stream in streams.items():
        assert stream.speculation.num_draft_tokens > NUM_TOKENS // 2
        assert stream.speculation.num_accepted_tokens == stream.speculation.num_draft_tokens, name

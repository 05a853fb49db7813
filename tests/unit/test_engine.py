"""Engines in one process with tiny random models in fp32: a stream never depends on how it was computed."""

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint.config_json import load_model_config
from checkpoint.errors import LoadError
from childproc.spec import SpecError
from echelon.pb.sampling_pb2 import SeqSampling
from echelon.pb.worker_pb2 import Round, Row, SeqInit
from kernels.native.linear import why_not
from tests.helpers.engines import (
    DRAFT,
    KV_CACHE_BYTES,
    MAX_MODEL_LEN,
    POISON,
    TARGET,
    drive,
    interleave,
    make_engine,
    poisoned_model,
)
from tests.helpers.layer_parallel_cases import write_deep_model
from tests.helpers.rounds import INCARNATION, Driver, Seq, greedy, seeded
from tests.helpers.tiny_models import TinyModel, make_tiny_model
from workers.engine.kv_cache import KVCacheError
from workers.engine.rounds import ProtocolError
from workers.engine.target_engine import TargetEngine
from workers.process import batch_invariance

DEMO_DRAFT = Path(__file__).parents[2] / "models" / "demo-draft"
PROMPTS = [[5, 99, 3, 14, 15, 92, 6, 53, 58, 9, 79], [31, 41], [7] * 17]
NUM_TOKENS = 12
SAMPLINGS = {
    "greedy": [greedy()] * 3,
    "seeded": [seeded(1), seeded(2), seeded(2**63 + 5)],
    "processed": [
        seeded(1, top_k=20, presence_penalty=1.5),
        seeded(2, top_p=0.8, repetition_penalty=1.3, logit_bias={4: 3.0}),
        greedy(frequency_penalty=0.7, min_tokens=6, suppressed_token_ids=[4, 99]),
    ],
}


@pytest.fixture(scope="module", params=[24, 48], ids=["operators", "one_call"])
def tiny(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> TinyModel:
    """Native kernels take heads of a multiple of 16 features; then a forward, or a chain of drafts, is one call."""
    return make_tiny_model("llama", tmp_path_factory.mktemp("tiny"), head_dim=request.param)


@pytest.fixture(scope="module")
def target_engine(tiny: TinyModel) -> TargetEngine:
    engine = make_engine(tiny.folder, TARGET)
    assert isinstance(engine, TargetEngine)
    return engine


@pytest.fixture
def target(target_engine: TargetEngine) -> Iterator[Driver]:
    target_engine.reset()
    return drive(target_engine)


@pytest.fixture
def draft(tiny: TinyModel) -> Driver:
    return drive(make_engine(tiny.folder, DRAFT))


def plain(driver: Driver, prompt: list[int], sampling: SeqSampling, num_tokens: int = NUM_TOKENS) -> list[int]:
    """The stream of plain decoding: the whole prompt, then one token per round. Leaves slot 7 free."""
    seq = driver.start(7, prompt, sampling)
    output = driver.generate(seq, num_tokens)
    driver.send(driver.round([], free_slots=[7]))
    return output


# -- target: the stream ---------------------------------------------------------------------------------------------


def test_greedy_tokens_are_those_of_transformers(target: Driver, tiny: TinyModel) -> None:
    for token_ids, logits in zip(tiny.token_ids, tiny.logits, strict=True):
        assert plain(target, token_ids, greedy(), 1) == [int(logits[-1].argmax())]


@pytest.mark.parametrize("settings", SAMPLINGS)
@pytest.mark.parametrize("seed", range(4))
def test_any_mix_of_chunks_and_drafts_gives_the_plain_stream(target: Driver, settings: str, seed: int) -> None:
    samplings = SAMPLINGS[settings]
    streams = [plain(target, prompt, sampling) for prompt, sampling in zip(PROMPTS, samplings, strict=True)]
    seqs = [target.start(slot, prompt, samplings[slot]) for slot, prompt in enumerate(PROMPTS)]
    interleave(target, list(zip(seqs, streams, strict=True)), random.Random(seed), NUM_TOKENS)
    assert [seq.output[:NUM_TOKENS] for seq in seqs] == streams


def test_batch_invariance_makes_it_exact_in_bf16(tiny: TinyModel) -> None:
    driver = drive(make_engine(tiny.folder, TARGET, dtype="bfloat16", batch_invariant=True))
    samplings = [seeded(slot) for slot in range(3)]
    streams = [plain(driver, prompt, sampling) for prompt, sampling in zip(PROMPTS, samplings, strict=True)]
    seqs = [driver.start(slot, prompt, samplings[slot]) for slot, prompt in enumerate(PROMPTS)]
    interleave(driver, list(zip(seqs, streams, strict=True)), random.Random(1), NUM_TOKENS)
    assert [seq.output[:NUM_TOKENS] for seq in seqs] == streams


@pytest.mark.parametrize("probe", ["probe_linear_batch_invariant", "probe_paged_attention"])
def test_a_machine_that_cannot_keep_batch_invariance_says_so(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch, probe: str
) -> None:
    monkeypatch.setattr(batch_invariance, probe, lambda *_, **__: "this machine rounds as it likes")
    with pytest.raises(SpecError, match="rounds as it likes; set batch_invariant: false"):
        make_engine(tiny.folder, TARGET, batch_invariant=True)


@pytest.mark.skipif(why_not() is not None, reason=f"cannot be compiled here: {why_not()}")
def test_batch_invariance_is_chosen_where_it_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def is_chosen(folder: Path = DEMO_DRAFT, **settings: Any) -> bool:
        return make_engine(folder, TARGET, kv_cache_bytes=1 << 24, **settings).info.batch_invariant

    assert is_chosen()
    assert not is_chosen(batch_invariant=False)
    assert not is_chosen(dtype="float16")  # which is not compiled
    assert not is_chosen(make_tiny_model("llama", tmp_path, head_dim=24).folder)  # nor is attention with 24 features
    with monkeypatch.context() as patch:
        patch.setattr(batch_invariance, "probe_paged_attention", lambda *_, **__: "this machine rounds as it likes")
        assert not is_chosen()
    monkeypatch.setenv("ECHELON_COMPILE", "off")
    assert not is_chosen()


def test_batch_invariance_is_probed_in_the_dtype_of_the_model(tiny: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    probed = []
    monkeypatch.setattr(
        batch_invariance, "probe_paged_attention", lambda *heads, **on: probed.append((*heads, *on.values()))
    )
    make_engine(tiny.folder, TARGET, dtype="bfloat16", batch_invariant=True)
    config = load_model_config(tiny.folder)
    heads = (config.num_q_heads, config.num_kv_heads, config.head_dim)
    assert probed == [(*heads, torch.bfloat16, torch.device("cpu"))]


def test_verification_reports_what_it_compared(target: Driver) -> None:
    stream = plain(target, PROMPTS[0], seeded())
    seq = target.start(0, PROMPTS[0], seeded())
    target.run((seq, target.target_row(seq)))
    wrong = (stream[3] + 1) % target.info.vocab_size
    (result,) = target.run((seq, target.target_row(seq, drafts=[stream[1], stream[2], wrong, stream[4]])))
    assert (result.num_verified_tokens, result.num_accepted_tokens) == (4, 2)
    assert list(result.token_ids) == stream[1:4]


def test_drafts_for_another_history_are_dropped(target: Driver) -> None:
    stream = plain(target, PROMPTS[0], greedy())
    seq = target.start(0, PROMPTS[0], greedy())
    target.run((seq, target.target_row(seq)))
    row = target.target_row(seq, drafts=stream[1:4])
    row.draft_base_len -= 1
    (result,) = target.run((seq, row))
    assert (result.num_verified_tokens, list(result.token_ids)) == (0, stream[1:2])


def test_a_decode_row_computes_the_last_committed_token(target: Driver) -> None:
    """Each round is built before the previous one is answered, as with two rounds in flight."""
    stream = plain(target, PROMPTS[1], seeded(3))
    seq = target.start(0, PROMPTS[1], seeded(3))
    rounds = [target.round([target.target_row(seq)])]
    rounds += [target.round([Row(slot=0, chunk_len=1, new_block_ids=target.blocks_for(seq, n + 3))]) for n in range(5)]
    results = [target.send(round_).rows[0] for round_ in rounds]
    assert [token for result in results for token in result.token_ids] == stream[:6]


def test_a_rebuilt_seq_continues_where_it_was(target: Driver) -> None:
    """As after preemption: earlier output comes back as part of the history and still counts as output."""
    sampling = SAMPLINGS["processed"][1]
    stream = plain(target, PROMPTS[0], sampling)
    half = NUM_TOKENS // 2
    seq = target.start(0, PROMPTS[0] + stream[:half], sampling)
    target.inits[0].num_prompt_tokens = len(PROMPTS[0])
    assert target.generate(seq, NUM_TOKENS - half) == stream[half:]


def test_shared_blocks_are_not_computed_again(target: Driver) -> None:
    prompt = PROMPTS[0]
    stream = plain(target, prompt, greedy())
    first = target.start(0, prompt, greedy())
    row = target.target_row(first)
    target.run((first, row))
    second = target.start(1, prompt, greedy())
    target.inits[0].num_computed_tokens = 8  # two full blocks
    target.inits[0].block_table.extend(row.new_block_ids[:2])
    second.num_computed, second.num_blocks = 8, 2
    assert target.generate(second, NUM_TOKENS) == stream


def test_a_seq_ends_at_max_model_len(target: Driver) -> None:
    """Rounds in flight were built without its current length: drafts are dropped first, then rows come back empty."""
    seq = target.start(0, [7] * (MAX_MODEL_LEN - 3), greedy())
    target.run((seq, target.target_row(seq)))
    (result,) = target.run((seq, target.target_row(seq, drafts=[1, 2, 3, 4])))
    assert result.num_verified_tokens == 1
    target.generate(seq, 3)
    assert len(seq.token_ids) == MAX_MODEL_LEN
    for _ in range(2):
        result = target.send(target.round([Row(slot=0, chunk_len=1)])).rows[0]
        assert not result.token_ids
        assert not result.non_finite


def test_logprobs_come_for_each_committed_token(target: Driver) -> None:
    stream = plain(target, PROMPTS[0], greedy())
    seq = target.start(0, PROMPTS[0], greedy(logprobs=2))
    results = target.run((seq, target.target_row(seq)))
    results += target.run((seq, target.target_row(seq, drafts=[stream[1], stream[2], 0])))
    logprobs = [entry for result in results for entry in result.logprobs]
    assert [entry.chosen.token_id for entry in logprobs] == seq.output == stream[: len(logprobs)]
    assert all(entry.chosen.rank == 1 and len(entry.top) == 2 for entry in logprobs)


@pytest.mark.parametrize("chunks", [[], [4, 1], [10]])
def test_prompt_logprobs_do_not_depend_on_the_chunks(target: Driver, tiny: TinyModel, chunks: list[int]) -> None:
    prompt, logits = tiny.token_ids[0], tiny.logits[0]
    seq = target.start(0, prompt, greedy(prompt_logprobs=1))
    found: dict[int, Any] = {}
    for chunk_len in [*chunks, len(prompt) - sum(chunks)]:
        (result,) = target.run((seq, target.target_row(seq, chunk_len)))
        found |= dict(enumerate(result.prompt_logprobs, start=result.prompt_logprobs_start))
    assert sorted(found) == list(range(1, len(prompt)))
    expected = logits.log_softmax(dim=-1)
    for position, entry in found.items():
        assert entry.chosen.token_id == prompt[position]
        assert entry.chosen.logprob == pytest.approx(float(expected[position - 1, prompt[position]]), abs=1e-4)


def test_prompt_logprobs_are_equal_bit_for_bit_however_the_prompt_is_cut(tmp_path: Path) -> None:
    """With batch_invariant; a chunk longer than a tile of 256 rows leaves a remainder."""
    folder = write_deep_model(tmp_path / "model", "llama", num_hidden_layers=1, max_position_embeddings=512)
    prompt = [(7 * i * i + 3 * i) % 100 for i in range(300)]
    changes = {"max_num_batched_tokens": 512, "max_model_len": 512, "batch_invariant": True}
    target = drive(make_engine(folder, TARGET, **changes))

    def logprobs(slot: int, first_chunks: list[int]) -> dict[int, bytes]:
        seq = target.start(slot, prompt, greedy(prompt_logprobs=1))
        found: dict[int, bytes] = {}
        for chunk_len in [*first_chunks, len(prompt) - sum(first_chunks)]:
            (result,) = target.run((seq, target.target_row(seq, chunk_len)))
            entries = [entry.SerializeToString() for entry in result.prompt_logprobs]
            found |= dict(enumerate(entries, start=result.prompt_logprobs_start))
        return found

    whole = logprobs(0, [])
    assert sorted(whole) == list(range(1, len(prompt)))
    for slot, first_chunks in enumerate([[256], [257], [1], [40, 257], [299]], start=1):
        assert logprobs(slot, first_chunks) == whole, first_chunks


# -- target: rows that go wrong -------------------------------------------------------------------------------------

NEVER = {POISON: -100.0}  # a logit bias that keeps the model from choosing it


@pytest.fixture
def poisoned(tiny: TinyModel, tmp_path: Path) -> Driver:
    """A target whose model gives non-finite logits after it has read token POISON."""
    return drive(make_engine(poisoned_model(tiny.folder, tmp_path / "poisoned"), TARGET))


def test_a_non_finite_row_harms_no_other(poisoned: Driver, target: Driver) -> None:
    sound = [
        poisoned.start(0, PROMPTS[0], greedy(logit_bias=NEVER)),
        poisoned.start(2, PROMPTS[1], seeded(logit_bias=NEVER)),
    ]
    sick = poisoned.start(1, [1, 2, POISON, 3], seeded())
    work = [(seq, poisoned.target_row(seq)) for seq in (sound[0], sick, sound[1])]
    results = poisoned.run(*work)
    assert [result.non_finite for result in results] == [False, True, False]
    assert not results[1].token_ids
    again = poisoned.send(poisoned.round([Row(slot=1, chunk_len=1)])).rows[0]
    assert again.non_finite
    assert poisoned.generate(sound[0], NUM_TOKENS) == plain(target, PROMPTS[0], greedy(logit_bias=NEVER))
    assert poisoned.generate(sound[1], NUM_TOKENS) == plain(target, PROMPTS[1], seeded(logit_bias=NEVER))


def test_blocks_of_a_broken_seq_can_be_reused(poisoned: Driver, target: Driver) -> None:
    """NaN in KV that attention masks out must not reach the result: 0 * NaN is NaN."""
    sick = poisoned.start(0, [POISON] * 8, greedy())
    row = poisoned.target_row(sick)
    poisoned.run((sick, row))
    poisoned.free_blocks += reversed(row.new_block_ids)
    seq = poisoned.start(0, PROMPTS[1], greedy(logit_bias=NEVER))
    round_ = poisoned.round([poisoned.target_row(seq)], free_slots=[0])
    assert list(round_.rows[0].new_block_ids) == list(row.new_block_ids[:1])
    poisoned.book(seq, round_.rows[0], poisoned.send(round_).rows[0])
    assert poisoned.generate(seq, NUM_TOKENS) == plain(target, PROMPTS[1], greedy(logit_bias=NEVER))


def test_a_draft_that_breaks_the_model_does_not_break_the_stream(poisoned: Driver, target: Driver) -> None:
    stream = plain(target, PROMPTS[0], greedy(logit_bias=NEVER))
    seq = poisoned.start(0, PROMPTS[0], greedy(logit_bias=NEVER))
    poisoned.run((seq, poisoned.target_row(seq)))
    (result,) = poisoned.run((seq, poisoned.target_row(seq, drafts=[stream[1], POISON, 5])))
    assert result.token_ids
    assert poisoned.generate(seq, NUM_TOKENS) == stream


def test_the_stream_up_to_the_breakdown_is_that_of_plain_decoding(poisoned: Driver) -> None:
    """The target itself chooses POISON: it is committed, and the next token fails, with and without drafts."""
    settings = greedy(logit_bias={POISON: 100.0})
    seq = poisoned.start(0, PROMPTS[0], settings)
    poisoned.run((seq, poisoned.target_row(seq)))
    assert seq.output == [POISON]
    without = poisoned.send(poisoned.round([poisoned.target_row(seq)])).rows[0]
    assert (without.non_finite, list(without.token_ids)) == (True, [])

    other = poisoned.start(1, PROMPTS[0], settings)
    poisoned.run((other, poisoned.target_row(other, 5)))
    (first,) = poisoned.run((other, poisoned.target_row(other, drafts=[POISON, POISON])))
    assert (list(first.token_ids), first.non_finite) == ([POISON], False)
    (second,) = poisoned.run((other, poisoned.target_row(other)))
    assert (second.non_finite, list(second.token_ids)) == (True, [])


# -- draft ----------------------------------------------------------------------------------------------------------


def test_a_draft_of_the_same_model_drafts_the_tokens_of_the_target(draft: Driver, target: Driver) -> None:
    """It uses the same rule and the same noise at the same absolute positions."""
    streams = [plain(target, prompt, seeded(slot)) for slot, prompt in enumerate(PROMPTS)]
    seqs = [draft.start(slot, prompt, seeded(slot, logprobs=3)) for slot, prompt in enumerate(PROMPTS)]
    wanted = [5, 1, 3]
    work = [(seq, draft.draft_row(seq, n)) for seq, n in zip(seqs, wanted, strict=True)]
    round_ = draft.round([row for _, row in work])
    result = draft.send(round_)
    assert [list(row.token_ids) for row in result.rows] == [
        stream[:n] for stream, n in zip(streams, wanted, strict=True)
    ]
    assert result.num_steps == 5
    assert not any(row.logprobs for row in result.rows)


def test_a_chain_continues_in_the_next_round(draft: Driver, target: Driver) -> None:
    stream = plain(target, PROMPTS[0], seeded())
    seq = draft.start(0, PROMPTS[0], seeded())
    for n in (1, 3, 2):
        draft.run((seq, draft.draft_row(seq, n)))
    assert seq.output == stream[:6]


def blind_row(driver: Driver, seq: Seq, num_drafts: int, *, num_known: int) -> Row:
    """Lets a chain grow by so many drafts while rounds are unanswered. The chain should have num_known tokens."""
    return Row(
        slot=seq.slot,
        chunk_len=1,
        num_draft_tokens=num_drafts,
        new_block_ids=driver.blocks_for(seq, num_known + num_drafts),
    )


@pytest.mark.parametrize("settings", SAMPLINGS)
@pytest.mark.parametrize("pieces", [(1, 1, 6), (3, 5), (2, 4, 1, 1)])
def test_a_chain_drafted_in_pieces_equals_that_of_one_round(
    draft: Driver, settings: str, pieces: tuple[int, ...]
) -> None:
    """All rounds are built before any answer, like queued ones."""
    seqs = [draft.start(slot, prompt, SAMPLINGS[settings][slot]) for slot, prompt in enumerate(PROMPTS)]
    draft.run(*[(seq, draft.draft_row(seq, 8)) for seq in seqs])
    others = [draft.start(slot + 3, prompt, SAMPLINGS[settings][slot]) for slot, prompt in enumerate(PROMPTS)]
    rounds = [draft.round([draft.draft_row(seq, pieces[0]) for seq in others])]
    for index, piece in enumerate(pieces[1:], start=1):
        num_ahead = sum(pieces[:index])
        rows = [blind_row(draft, seq, piece, num_known=len(seq.token_ids) + num_ahead) for seq in others]
        rounds.append(draft.round(rows))
    answers = [draft.send(round_).rows for round_ in rounds]
    for seq, rows in zip(seqs, zip(*answers, strict=True), strict=True):
        assert [token_id for row in rows for token_id in row.token_ids] == seq.output


def test_drafts_come_with_alternatives_and_confidences(draft: Driver, target: Driver) -> None:
    """The same model, as a target, reports this in its logprobs."""
    seq = target.start(0, PROMPTS[0], greedy(logprobs=4))
    expected = []
    for _ in range(5):
        (result,) = target.run((seq, target.target_row(seq)))
        expected += result.logprobs
    for settings in (greedy(), seeded(5)):
        seqs = [draft.start(0, PROMPTS[0], settings), draft.start(1, PROMPTS[1], settings)]
        work = [(each, draft.draft_row(each, n)) for each, n in zip(seqs, (5, 2), strict=True)]
        result, other = draft.run(*work, num_alternatives=3, confidences=True)
        assert [len(result.token_ids), len(result.alternative_token_ids), len(result.confidences)] == [5, 15, 5]
        assert [len(other.token_ids), len(other.alternative_token_ids), len(other.confidences)] == [2, 6, 2]
        if settings == greedy():
            runners_up = [[entry.token_id for entry in each.top[1:]] for each in expected]
            assert list(result.alternative_token_ids) == [token_id for each in runners_up for token_id in each]
            assert list(result.confidences) == pytest.approx([math.exp(e.chosen.logprob) for e in expected], rel=1e-4)
        alone = draft.start(2, PROMPTS[1], settings)
        (lone,) = draft.run((alone, draft.draft_row(alone, 2)), num_alternatives=3)
        assert lone.alternative_token_ids == other.alternative_token_ids
        draft.send(draft.round([], free_slots=[0, 1, 2]))
    (result,) = draft.run((seq := draft.start(0, PROMPTS[0], greedy()), draft.draft_row(seq, 5)))
    assert not result.alternative_token_ids
    assert not result.confidences


def test_a_row_without_drafts_only_catches_up(draft: Driver) -> None:
    seq = draft.start(0, PROMPTS[2], greedy())
    row = draft.draft_row(seq, 0)
    row.chunk_len -= 1
    (result,) = draft.run((seq, row))
    assert not result.token_ids
    assert seq.num_missing == 1


@pytest.mark.parametrize("accepted", [0, 1, 2, 3])
def test_a_cropped_chain_equals_that_of_a_fresh_engine(draft: Driver, accepted: int) -> None:
    """After a verdict the accepted drafts stay, the correction is appended, and stale KV is not read."""
    sampling = seeded(9, repetition_penalty=1.5, presence_penalty=1.0)
    seq = draft.start(0, PROMPTS[0], sampling)
    draft.run((seq, draft.draft_row(seq, 4)))
    committed = [*seq.token_ids[: len(PROMPTS[0]) + accepted], 77]
    row = draft.draft_row(seq, 4, crop_len=len(committed) - 1, append=[77])
    draft.run((seq, row))
    fresh = draft.start(1, committed, sampling)
    draft.inits[0].num_prompt_tokens = len(PROMPTS[0])
    draft.run((fresh, draft.draft_row(fresh, 4)))
    assert seq.token_ids == fresh.token_ids


def test_a_chain_ends_at_max_model_len(draft: Driver) -> None:
    seq = draft.start(0, [7] * (MAX_MODEL_LEN - 2), greedy())
    (result,) = draft.run((seq, draft.draft_row(seq, 5)))
    assert len(result.token_ids) == 2


def test_rounds_after_the_end_of_a_context_draft_nothing(draft: Driver) -> None:
    """They were sent before it was known that the chain had reached max_model_len. Then the verdict is a mismatch."""
    num_prompt = MAX_MODEL_LEN - 3
    seq = draft.start(0, [7] * num_prompt, greedy())
    rounds = [draft.round([draft.draft_row(seq, 5)])]
    rounds += [draft.round([blind_row(draft, seq, 5, num_known=MAX_MODEL_LEN)]) for _ in range(3)]
    results = [draft.send(round_).rows[0] for round_ in rounds]
    assert [len(result.token_ids) for result in results] == [3, 0, 0, 0]
    assert not any(result.non_finite for result in results)
    row = Row(slot=0, crop_len=num_prompt + 1, append_token_ids=[77], chunk_len=1, num_draft_tokens=1)
    (result,) = draft.send(draft.round([row])).rows
    fresh = draft.start(1, [7] * num_prompt + [results[0].token_ids[0], 77], greedy())
    (expected,) = draft.run((fresh, draft.draft_row(fresh, 1)))
    assert result.token_ids == expected.token_ids


@pytest.fixture
def sick_draft(tiny: TinyModel, tmp_path: Path) -> Driver:
    """A draft engine whose model gives non-finite logits after it has read token POISON."""
    return drive(make_engine(poisoned_model(tiny.folder, tmp_path / "poisoned"), DRAFT))


def test_a_non_finite_draft_ends_only_its_chain(sick_draft: Driver) -> None:
    driver = sick_draft
    sick = driver.start(0, PROMPTS[0], greedy(logit_bias={POISON: 100.0}))
    sound = driver.start(1, PROMPTS[1], greedy())
    results = driver.run((sick, driver.draft_row(sick, 4)), (sound, driver.draft_row(sound, 4)))
    assert [list(results[0].token_ids), len(results[1].token_ids)] == [[POISON], 4]
    assert not results[0].non_finite
    (again,) = driver.run((sick, driver.draft_row(sick, 4)))
    assert (again.non_finite, list(again.token_ids)) == (True, [])


@pytest.mark.parametrize("num_appended", [1, 2])
def test_rounds_after_a_broken_chain_are_harmless(sick_draft: Driver, num_appended: int) -> None:
    """One of 4 ordered drafts came. Three rounds that rely on all four are in flight; then the verdict comes."""
    driver = sick_draft
    num_prompt = len(PROMPTS[0])
    sick = driver.start(0, PROMPTS[0], greedy(logit_bias={POISON: 100.0}))
    sound = driver.start(1, PROMPTS[1], greedy())
    rounds = [driver.round([driver.draft_row(sick, 4), driver.draft_row(sound, 1)])]
    for ahead in (4, 5, 6):
        rows = [
            blind_row(driver, sick, 1, num_known=num_prompt + ahead),
            blind_row(driver, sound, 1, num_known=len(PROMPTS[1]) + ahead),
        ]
        rounds.append(driver.round(rows))
    results = [driver.send(round_).rows for round_ in rounds]
    assert [[len(row.token_ids) for row in rows] for rows in results] == [[1, 1], [0, 1], [0, 1], [0, 1]]
    assert [rows[0].non_finite for rows in results] == [False, True, False, False]
    append = [77, 78][:num_appended]
    blocks = driver.blocks_for(sick, num_prompt + 10)
    row = Row(slot=0, crop_len=num_prompt, append_token_ids=append, new_block_ids=blocks)
    row.chunk_len, row.num_draft_tokens = num_appended, 1
    (result,) = driver.send(driver.round([row])).rows
    assert list(result.token_ids) == [POISON]


def test_a_crop_after_a_row_without_drafts_works(sick_draft: Driver) -> None:
    """The verdict came while that row was in flight: history up to the last token seen, and one after it."""
    driver = sick_draft
    settings = greedy(logit_bias={POISON: 100.0})
    seq = driver.start(0, [*PROMPTS[0], POISON], settings)
    driver.inits[0].num_prompt_tokens = len(PROMPTS[0])
    num_tokens = len(seq.token_ids)
    first = driver.round([driver.draft_row(seq, 3)])
    row = Row(slot=0, crop_len=num_tokens, append_token_ids=[77], chunk_len=1, num_draft_tokens=2)
    row.new_block_ids.extend(driver.blocks_for(seq, num_tokens + 3))
    second = driver.round([row])
    third = driver.round([blind_row(driver, seq, 1, num_known=num_tokens + 3)])
    results = [driver.send(round_).rows[0] for round_ in (first, second, third)]
    assert [(result.non_finite, len(result.token_ids)) for result in results] == [(True, 0), (True, 0), (False, 0)]


def test_a_complete_chain_cannot_continue_twice(draft: Driver) -> None:
    """Only chains that ended early are treated leniently."""
    seq = draft.start(0, PROMPTS[0], greedy())
    draft.run((seq, draft.draft_row(seq, 2)))
    draft.send(draft.round([Row(slot=0, chunk_len=1)]))
    with pytest.raises(ProtocolError, match="chunk_len: 1, but only 0 of 13 tokens"):
        draft.send(draft.round([blind_row(draft, seq, 1, num_known=13)]))


# -- rounds that no scheduler may send ------------------------------------------------------------------------------

BAD_ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown slot": ({"slot": 3, "chunk_len": 1}, "rows[1] (slot 3): slot"),
    "slot out of range": ({"slot": 900, "chunk_len": 1}, "rows[1] (slot 900): slot"),
    "named twice": ({"slot": 0, "chunk_len": 1}, "slot: has a row already"),
    "chunk too long": ({"slot": 1, "chunk_len": 2}, "chunk_len: 2"),
    "crop beyond": ({"slot": 1, "crop_len": 40}, "crop_len: 40"),
    "crop into the prompt": ({"slot": 1, "crop_len": 1}, "crop_len: 1"),
    "token": ({"slot": 1, "append_token_ids": [131], "chunk_len": 1}, "append_token_ids: token id 131"),
    "too long": ({"slot": 1, "append_token_ids": [1] * 62}, "append_token_ids: make 65 tokens"),
    "draft token": ({"slot": 1, "chunk_len": 1, "draft_token_ids": [999]}, "draft_token_ids: token id 999"),
    "block id": ({"slot": 1, "chunk_len": 1, "new_block_ids": [100_000]}, "new_block_ids: block 100000"),
    "too many blocks": ({"slot": 1, "chunk_len": 1, "new_block_ids": [9] * 16}, "new_block_ids: make 17 blocks"),
    "no block": ({"slot": 1, "chunk_len": 1, "draft_token_ids": [5, 6], "draft_base_len": 3}, "position 4"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_an_impossible_round_is_refused_and_changes_nothing(target: Driver, case: str) -> None:
    fields, message = BAD_ROWS[case]
    stream = plain(target, PROMPTS[0], greedy())
    seq, other = target.start(0, PROMPTS[0], greedy()), target.start(1, PROMPTS[1], greedy())
    target.run((seq, target.target_row(seq)), (other, target.target_row(other)))
    good = target.target_row(seq)
    bad = Round(round_id=50, incarnation=INCARNATION, free_slots=[], rows=[good, Row(**fields)])
    bad.init_seqs.append(SeqInit(slot=5, token_ids=[1], num_prompt_tokens=1, sampling=greedy()))
    with pytest.raises(ProtocolError, match="round 50") as caught:
        target.send(bad)
    assert message in str(caught.value)
    result = target.send(target.round([good])).rows[0]
    target.book(seq, good, result)
    assert target.generate(seq, NUM_TOKENS) == stream
    with pytest.raises(ProtocolError, match="slot 5"):
        target.send(target.round([], free_slots=[5]))


BAD_INITS: dict[str, tuple[dict[str, Any], str]] = {
    "taken": ({"slot": 0}, "slot: is taken"),
    "slot": ({"slot": 8}, "slot: must be below 8"),
    "empty": ({"token_ids": []}, "token_ids: 0 tokens"),
    "long": ({"token_ids": [1] * 65}, "token_ids: 65 tokens"),
    "token": ({"token_ids": [1, 2**31]}, "token id 2147483648"),
    "prompt": ({"num_prompt_tokens": 9}, "num_prompt_tokens: 9"),
    "computed": ({"num_computed_tokens": 1}, "num_computed_tokens: 1"),
    "block": ({"block_table": [100_000]}, "block_table: block 100000"),
    **{
        f"{field} {value}": ({"sampling": greedy(**{field: value})}, f"sampling.{field}: ")
        for field, values in {
            "temperature": (-1.0, math.nan, math.inf),
            "top_p": (0.0, 1.5, math.nan),
            "min_p": (-0.1, 2.0, math.nan),
            "repetition_penalty": (0.0, -1.0, math.nan, math.inf),
            "presence_penalty": (math.nan, math.inf),
            "frequency_penalty": (math.nan, -math.inf),
            "logit_bias": ({3: math.nan}, {3: math.inf}, {131: 1.0}, {2**32 - 1: 1.0}),
            "logprobs": (21, 2**32 - 1),
            "prompt_logprobs": (21, 2**32 - 1),
        }.items()
        for value in values
    },
}


@pytest.mark.parametrize("case", BAD_INITS)
def test_a_seq_that_cannot_start_is_refused(target: Driver, case: str) -> None:
    changes, message = BAD_INITS[case]
    seq = target.start(0, PROMPTS[1], greedy())
    target.run((seq, target.target_row(seq)))
    fields = {"slot": 1, "token_ids": [1, 2], "num_prompt_tokens": 2, "sampling": greedy(), **changes}
    with pytest.raises(ProtocolError) as caught:
        target.send(Round(round_id=51, init_seqs=[SeqInit(**fields)]))
    assert "round 51: init_seqs[0]" in str(caught.value)
    assert message in str(caught.value)


def test_a_round_larger_than_the_engine_was_built_for_is_refused(target: Driver) -> None:
    limit = target.info.max_num_batched_tokens
    prompts = [[1] * (limit // 5 + 1)] * 5
    seqs = [target.start(slot, prompt, greedy()) for slot, prompt in enumerate(prompts)]
    with pytest.raises(ProtocolError, match=f"rows: .* tokens go through the model, must be at most {limit}"):
        target.send(target.round([target.target_row(seq) for seq in seqs]))


def test_more_alternatives_than_anyone_needs_are_refused(draft: Driver) -> None:
    seq = draft.start(0, PROMPTS[0], greedy())
    with pytest.raises(ProtocolError, match="num_alternatives: 4000000000, must be at most 64"):
        draft.run((seq, draft.draft_row(seq, 2)), num_alternatives=4_000_000_000)


def test_another_scheduler_finds_all_slots_free(target_engine: TargetEngine) -> None:
    first = drive(target_engine)
    target_engine.reset()
    first.run(*[(seq, first.target_row(seq)) for seq in [first.start(0, PROMPTS[0], greedy())]])
    target_engine.reset()
    second = drive(target_engine)
    assert plain(second, PROMPTS[1], greedy())
    seq: Seq = second.start(0, PROMPTS[0], greedy())
    assert second.generate(seq, 2)


# -- loading --------------------------------------------------------------------------------------------------------


def test_too_little_memory_for_one_seq_says_what_to_raise(tiny: TinyModel) -> None:
    with pytest.raises(KVCacheError, match=r"needs 16 \(.* bytes\): raise kv_cache\.device_bytes or lower"):
        make_engine(tiny.folder, TARGET, kv_cache_bytes=20_000)


def test_the_cache_uses_the_bytes_that_it_is_given(target: Driver, tiny: TinyModel) -> None:
    config = json.loads((tiny.folder / "config.json").read_text())
    kv_size = config["num_key_value_heads"] * config["head_dim"]
    bytes_per_block = config["num_hidden_layers"] * 2 * target.info.block_size * kv_size * 4  # k and v, fp32
    assert target.info.num_blocks == KV_CACHE_BYTES // bytes_per_block
    assert target.info.kv_cache_bytes == target.info.num_blocks * bytes_per_block


def test_a_missing_folder_is_a_load_error(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="nowhere"):
        make_engine(tmp_path / "nowhere", TARGET)

"""Drafts from lookup: what is proposed, what is forgotten, and when they are preferred."""

import pytest

from scheduler.drafting.suffix import Proposal, SuffixDrafts, SuffixIndex, prefers_lookup

SENTENCE = list(range(100, 120))


def index_of(*texts: list[int], max_tokens: int = 10_000) -> SuffixIndex:
    shared = SuffixIndex(max_tokens)
    for text in texts:
        shared.add(text)
    shared.index(max_tokens)
    return shared


def test_continuations_from_the_prompt_are_proposed() -> None:
    drafts = SuffixDrafts(SuffixIndex(), [*SENTENCE, 1, 2, *SENTENCE[:5]])
    proposal = drafts.propose(8)
    assert proposal.token_ids == SENTENCE[5:10], "a context of five tokens is trusted for five"
    assert (proposal.score, proposal.match_len) == (5.0, 5)
    drafts.extend(SENTENCE[5:9])
    assert drafts.propose(8).token_ids == SENTENCE[9:17]
    assert drafts.propose(2).token_ids == SENTENCE[9:11]


def test_continuations_from_generated_text_are_proposed_too() -> None:
    drafts = SuffixDrafts(SuffixIndex(), [1, 2, 3])
    drafts.propose(4)
    for token_id in [*SENTENCE, 9, *SENTENCE[:4]]:
        drafts.extend([token_id])
    assert drafts.propose(4).token_ids == SENTENCE[4:8]


def test_finished_requests_are_proposed_and_a_seqs_own_text_wins_ties() -> None:
    shared = index_of([*SENTENCE])
    drafts = SuffixDrafts(shared, [1, *SENTENCE[:6]])
    assert drafts.propose(4).token_ids == SENTENCE[6:10]
    own = [*SENTENCE[:6], 7, 8, 9, 10]
    both = SuffixDrafts(shared, [*own, 1, *SENTENCE[:6]])
    assert both.propose(4).token_ids == [7, 8, 9, 10]


def test_a_request_that_finishes_meanwhile_is_found() -> None:
    shared = SuffixIndex()
    drafts = SuffixDrafts(shared, SENTENCE[:6])
    assert drafts.propose(4).token_ids == []
    shared.add([*SENTENCE])
    shared.index(100)
    assert drafts.propose(4).token_ids == SENTENCE[6:10]


def test_drafts_do_not_run_from_one_request_into_the_next() -> None:
    shared = index_of([1, 2, 3, 4], [5, 6, 7, 8])
    assert SuffixDrafts(shared, [1, 2, 3]).propose(8).token_ids == [4]


def test_the_score_is_the_expected_number_of_accepted_tokens() -> None:
    shared = index_of([1, 2, 3, 4, 5], [1, 2, 3, 4, 6], [1, 2, 3, 4, 5], [1, 2, 3, 9])
    proposal = SuffixDrafts(shared, [1, 2, 3]).propose(2)
    assert proposal.token_ids == [4, 5]
    assert proposal.probabilities == pytest.approx([3 / 4, 3 / 4 * 2 / 3])
    assert proposal.score == pytest.approx(1.25)


def test_an_unlikely_draft_ends_the_proposal() -> None:
    texts = [[1, 2, 3, 4, 10 + i] for i in range(12)]
    assert SuffixDrafts(index_of(*texts), [1, 2, 3]).propose(8).token_ids == [4]


def test_a_shorter_context_wins_if_it_is_more_certain() -> None:
    # 9 1 2 was followed by 3 and by 4 equally often, then by 5; 1 2 is mostly followed by 6 7.
    texts = [[9, 1, 2, 3, 8, 8], [9, 1, 2, 4, 8, 8], *([[i, 1, 2, 6, 7, 7] for i in range(20, 40)])]
    proposal = SuffixDrafts(index_of(*texts), [9, 1, 2]).propose(8)
    assert proposal.token_ids == [6, 7]
    assert proposal.match_len == 2


def test_the_oldest_requests_are_forgotten_and_memory_is_bounded() -> None:
    shared = SuffixIndex(max_tokens=400)
    for number in range(100):
        shared.add([number * 100 + i for i in range(20)])
        shared.index(1000)
        assert shared.num_tokens <= 400
    assert shared.num_tokens >= 180
    assert SuffixDrafts(shared, [9900, 9901, 9902]).propose(2).token_ids == [9903, 9904]
    assert SuffixDrafts(shared, [0, 1, 2]).propose(2).token_ids == []


def test_requests_that_come_faster_than_they_are_indexed_are_bounded_too() -> None:
    shared = SuffixIndex(max_tokens=400)
    for number in range(100):
        shared.add([number * 100 + i for i in range(30)])
        assert shared.num_tokens <= 400
    shared.index(10_000)
    assert SuffixDrafts(shared, [9900, 9901, 9902]).propose(1).token_ids == [9903]
    shared.add(list(range(50_000, 51_000)))
    shared.index(10_000)
    assert shared.num_tokens <= 400
    assert SuffixDrafts(shared, [50_990, 50_991]).propose(1).token_ids == [50_992], "its end is kept"


def test_committed_tokens_pay_for_indexing_finished_requests() -> None:
    shared = SuffixIndex()
    shared.add(list(range(1000, 1400)))
    drafts = SuffixDrafts(shared, [1])
    for token_id in range(100):
        drafts.extend([token_id + 2])
    assert shared.automata[0].num_tokens == 400


def test_a_long_prompt_is_indexed_in_slices() -> None:
    shared = SuffixIndex()
    prompt = [i % 5000 for i in range(20_000)]
    drafts = SuffixDrafts(shared, prompt)
    num_rounds = 0
    while not drafts.is_indexed:
        proposal = drafts.propose(4)
        num_rounds += 1
        assert drafts.num_indexed <= 1024 * num_rounds
    assert num_rounds == 20
    assert proposal.token_ids == [0, 1, 2, 3]


def test_tokens_committed_meanwhile_are_indexed_after_the_prompt() -> None:
    drafts = SuffixDrafts(SuffixIndex(), list(range(3000)))
    drafts.propose(4)
    drafts.extend([10, 11, 12])
    while not drafts.is_indexed:
        drafts.propose(4)
    assert drafts.propose(3).token_ids == [13, 14, 15]


def test_many_prompts_share_the_time() -> None:
    shared = SuffixIndex()
    seqs = [SuffixDrafts(shared, list(range(5000))) for _ in range(8)]
    for seq in seqs:
        seq.propose(4)
    assert sum(seq.num_indexed for seq in seqs) <= 1100
    for seq in seqs[1:]:
        seq.close()
    seqs[0].propose(4)
    assert seqs[0].num_indexed >= 1024, "those that ended leave it theirs"


def test_hybrid_takes_the_source_that_promises_more() -> None:
    sure = Proposal([1, 2, 3, 4], [1.0, 1.0, 1.0, 1.0], 4)
    assert prefers_lookup(sure, reliability=1.0, expected_by_model=3.0)
    assert not prefers_lookup(sure, reliability=1.0, expected_by_model=4.0)
    assert not prefers_lookup(sure, reliability=0.5, expected_by_model=1.0), "0.5 + 0.25 + 0.125 + 0.0625"
    assert not prefers_lookup(Proposal([], [], 0), reliability=1.0, expected_by_model=0.0)

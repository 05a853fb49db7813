"""Counts the rows of a model whose bits depend on how their seqs were fed. Does not import transformers, so that ranks
start quickly."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from tests.helpers.paged import PagedRunner
from workers.collectives import Group, SoloGroup, TorchGroup
from workers.models.decoder import CausalLM
from workers.models.loading import load_model

DTYPE = torch.bfloat16

# What a forward computes for each seq: the number of its tokens, and of tokens after them that are not its own and will
# be overwritten, like rejected drafts.
Step = dict[int, tuple[int, int]]
Feed = Callable[[list[int]], Step]  # from the number of tokens that each seq has left


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    folder: Path
    token_ids: list[list[int]]  # of each seq
    feeds: tuple[str, ...]  # names from FEEDS, or a chunk size
    batch_invariant: bool = True
    ordered_sum: bool = True
    num_prefilled: int = 0  # tokens of each seq that are computed in one piece before the feed begins


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    num_rows: int
    num_differing: int


def count_on_rank(process_group: ProcessGroup, work: Mapping[int, Sequence[Case]]) -> dict[int, list[dict[str, Count]]]:
    """The counts by feed for each case, on one rank of several."""
    return {
        key: [count(TorchGroup(process_group, ordered_sum=case.ordered_sum), case) for case in cases]
        for key, cases in work.items()
    }


def count_alone(case: Case) -> dict[str, Count]:
    return count(SoloGroup(), case)


def count(group: Group, case: Case) -> dict[str, Count]:
    """The counts by feed. Compares hidden states and logits, bit for bit, with those of each seq alone in one piece."""
    model = load_model(
        case.folder,
        dtype=DTYPE,
        device=torch.device("cpu"),
        group=group,
        max_model_len=1024,
        batch_invariant=case.batch_invariant,
    )
    expected = [_runner(model, [ids]).forward({0: ids}) for ids in case.token_ids]
    logits = [_logits(model, hidden) for hidden in expected]
    return {name: _count(model, case, make_feed(name), expected, logits) for name in case.feeds}


def make_feed(name: str) -> Feed:
    return chunks(int(name)) if name.isdigit() else FEEDS[name](random.Random(0))  # the same on all ranks


def chunks(size: int) -> Feed:
    """Chunks of the first seq that has tokens left, alone."""

    def step(left: list[int]) -> Step:
        return next(({seq: (min(size, num), 0)} for seq, num in enumerate(left) if num), {})

    return step


def verify(rng: random.Random) -> Feed:
    """All seqs side by side, each with a token and 1 to 4 drafts, some of them right."""

    def step(left: list[int]) -> Step:
        result = {}
        for seq, num in enumerate(left):
            if num:
                num_drafts = rng.randint(1, 4)
                num_right = min(1 + rng.randint(0, num_drafts), num)
                result[seq] = (num_right, 1 + num_drafts - num_right)
        return result

    return step


def company(rng: random.Random) -> Feed:
    """Chunks of any size from any seqs."""

    def step(left: list[int]) -> Step:
        open_seqs = [seq for seq, num in enumerate(left) if num]
        chosen = rng.sample(open_seqs, rng.randint(1, len(open_seqs))) if open_seqs else []
        return {seq: (min(rng.choice([1, 1, 2, 5, 16, 33, 129, 300]), left[seq]), 0) for seq in chosen}

    return step


FEEDS: dict[str, Callable[[random.Random], Feed]] = {"verify": verify, "company": company}


def _count(model: CausalLM, case: Case, feed: Feed, expected: list[Tensor], logits: list[Tensor]) -> Count:
    seqs = case.token_ids
    runner = _runner(model, seqs)
    if case.num_prefilled:
        runner.forward({seq: ids[: case.num_prefilled] for seq, ids in enumerate(seqs)})
    num_rows = num_differing = 0
    while step := feed([len(ids) - done for ids, done in zip(seqs, runner.lens, strict=True)]):
        spans = {seq: slice(runner.lens[seq], runner.lens[seq] + num) for seq, (num, _) in step.items()}
        hidden = runner.forward({seq: seqs[seq][spans[seq]] + [0] * num_wrong for seq, (_, num_wrong) in step.items()})
        rows = zip(
            torch.split(hidden, [sum(sizes) for sizes in step.values()]),
            torch.split(_logits(model, hidden), [sum(sizes) for sizes in step.values()]),
            step.items(),
            strict=True,
        )
        for own_hidden, own_logits, (seq, (num, num_wrong)) in rows:
            differs = (own_hidden[:num] != expected[seq][spans[seq]]).any(dim=1)
            differs |= (own_logits[:num] != logits[seq][spans[seq]]).any(dim=1)
            runner.lens[seq] -= num_wrong
            num_rows += num
            num_differing += int(differs.sum())
    return Count(num_rows=num_rows, num_differing=num_differing)


def _runner(model: CausalLM, seqs: list[list[int]]) -> PagedRunner:
    longest = max(len(ids) for ids in seqs)
    return PagedRunner(model, num_seqs=len(seqs), max_len=longest + 4, dtype=DTYPE)


def _logits(model: CausalLM, hidden: Tensor) -> Tensor:
    with torch.inference_mode():
        return model.compute_logits(hidden)

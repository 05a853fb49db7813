"""Whether requests find their prefixes in a cache when several replicas share them, and the load stays even.

Conversations run side by side, each with one of a few system prompts, and end after some turns; then others begin. The
router and the block managers are the real ones; engines are simulated in time. The same conversations run on one
replica that has the memory of all, which finds what can be found, and with a router that looks at the load alone.

    python -m bench.route --conversations 64 --replicas 3
"""

import argparse
import asyncio
import heapq
import itertools
import random
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from bench.report import add_report_options, publish, table
from childproc.block_digests import DigestChain, root_digest
from echelon.pb.scheduler_pb2 import CacheReport, Submit
from gateway.replicas.routing import CachedBlocks, Router, find_matches
from scheduler.kv_cache.blocks import BlockManager
from scheduler.kv_cache.contents import CacheContents

_MODEL, _BLOCK_SIZE, _VOCAB = "model", 16, 100_000
_PROMPT_TOKENS_PER_S, _SECONDS_PER_TOKEN = 8000.0, 0.02
_SYSTEM_TOKENS, _QUESTION_TOKENS, _ANSWER_TOKENS = (300, 1200), (10, 400), (20, 400)
_TURNS, _PAUSE_S = (4, 12), 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What runs."""

    num_conversations: int = 64  # at once
    num_turns: int = 3000  # in all
    num_system_prompts: int = 4
    seed: int = 0


class Replica:
    """A cache, and the requests that run."""

    def __init__(self, num_blocks: int) -> None:
        contents = CacheContents()
        self.blocks = BlockManager(num_blocks, _BLOCK_SIZE, contents=contents)
        self.cache = CachedBlocks()
        self.load = 0
        self.busy_s = 0.0  # the time that requests have run, added up
        self.num_computed = 0  # tokens of prompts and answers
        self._watch = contents.watch()

    def begin(self, prompt: Sequence[int], answer: Sequence[int]) -> tuple["Running", int]:
        """The request, and how many tokens of its prompt were cached."""
        tokens = [*prompt, *answer]
        digests = DigestChain(root_digest(_MODEL, _BLOCK_SIZE), _BLOCK_SIZE).extend(tokens, len(tokens) // _BLOCK_SIZE)
        found = self.blocks.match(digests[: (len(prompt) - 1) // _BLOCK_SIZE])
        self.blocks.hold(found)
        held = [*found, *self.blocks.allocate(self.blocks.num_blocks_for(len(tokens)) - len(found))]
        for block_id, digest in zip(held, digests, strict=False):
            self.blocks.publish(block_id, digest)
        num_cached = len(found) * _BLOCK_SIZE
        num_uncached = len(prompt) - num_cached
        running_s = num_uncached / _PROMPT_TOKENS_PER_S + len(answer) * _SECONDS_PER_TOKEN
        self.load += 1
        self.busy_s += running_s
        self.num_computed += num_uncached + len(answer)
        self._report()
        return Running(self, held, running_s), num_cached

    def end(self, held: list[int]) -> None:
        self.blocks.release(held)
        self.load -= 1

    def _report(self) -> None:
        """Over the wire, as a scheduler does."""
        while self._watch.has_changes:
            changes = self._watch.take()
            report = CacheReport(
                from_nothing=changes.from_nothing,
                block_size=_BLOCK_SIZE,
                num_blocks=self.blocks.num_blocks,
                added=changes.added,
                removed=changes.removed,
            )
            self.cache.on_report(CacheReport.FromString(report.SerializeToString()))


@dataclass(frozen=True, slots=True)
class Running:
    replica: Replica
    held: list[int]
    running_s: float

    def end(self) -> None:
        self.replica.end(self.held)


@dataclass(slots=True)
class Conversation:
    """Its turns follow from its seed, whatever runs beside it."""

    rng: random.Random
    tokens: list[int]
    turns_left: int
    answer: list[int] = field(default_factory=list)

    def ask(self) -> None:
        """The prompt is in `tokens` then, and what the model says in `answer`."""
        self.tokens += self._text(_QUESTION_TOKENS)
        self.answer = self._text(_ANSWER_TOKENS)
        self.turns_left -= 1

    def pause_s(self) -> float:
        return self.rng.expovariate(1 / _PAUSE_S)

    def _text(self, limits: tuple[int, int]) -> list[int]:
        return self.rng.choices(range(_VOCAB), k=self.rng.randint(*limits))


def conversations(load: Load) -> Iterator[Conversation]:
    rng = random.Random(load.seed)
    systems = [rng.choices(range(_VOCAB), k=rng.randint(*_SYSTEM_TOKENS)) for _ in range(load.num_system_prompts)]
    while True:
        own = random.Random(rng.random())
        yield Conversation(own, list(own.choice(systems)), own.randint(*_TURNS))


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Shares are between 0 and 1."""

    cached: float  # of the tokens of prompts
    load_imbalance: float  # of the mean number of requests that run, max / mean
    work_imbalance: float  # of the computed tokens, max / mean


def run(load: Load, replicas: Sequence[Replica], *, by_cache: bool = True) -> Outcome:
    """Serve the conversations in simulated time."""
    router = Router()
    fresh, order = conversations(load), itertools.count()
    events: list[tuple[float, int, Conversation, Running | None]] = []
    for conversation in itertools.islice(fresh, load.num_conversations):
        heapq.heappush(events, (conversation.pause_s(), next(order), conversation, None))
    num_turns = num_prompt = num_cached = 0
    while num_turns < load.num_turns:
        now, _, conversation, running = heapq.heappop(events)
        if running is None:
            conversation.ask()
            submit = Submit(prompt_token_ids=conversation.tokens)
            replica = router.choose(asyncio.run(find_matches(_MODEL, submit, replicas)) if by_cache else {}, replicas)
            running, found = replica.begin(conversation.tokens, conversation.answer)
            num_turns, num_prompt, num_cached = num_turns + 1, num_prompt + len(conversation.tokens), num_cached + found
            heapq.heappush(events, (now + running.running_s, next(order), conversation, running))
            continue
        running.end()
        conversation.tokens += conversation.answer
        following = conversation if conversation.turns_left else next(fresh)
        heapq.heappush(events, (now + following.pause_s(), next(order), following, None))
    return Outcome(
        cached=num_cached / num_prompt,
        load_imbalance=_imbalance([replica.busy_s for replica in replicas]),
        work_imbalance=_imbalance([replica.num_computed for replica in replicas]),
    )


def _imbalance(values: Sequence[float]) -> float:
    return max(values) * len(values) / sum(values)


def compare(load: Load, *, num_replicas: int, num_blocks: int) -> dict[str, Outcome]:
    """`num_blocks`: of one replica."""
    return {
        "one replica with all the memory": run(load, [Replica(num_replicas * num_blocks)]),
        "by load alone": run(load, [Replica(num_blocks) for _ in range(num_replicas)], by_cache=False),
        "by cached prefix against load": run(load, [Replica(num_blocks) for _ in range(num_replicas)]),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=64)
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument("--turns", type=int, default=3000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--blocks", type=int, nargs="+", default=[4000, 6000, 12000], help="of a replica")
    add_report_options(parser)
    args = parser.parse_args()
    rows, is_good = [], True
    for num_blocks, seed in itertools.product(args.blocks, range(args.seeds)):
        load = Load(num_conversations=args.conversations, num_turns=args.turns, seed=seed)
        outcomes = compare(load, num_replicas=args.replicas, num_blocks=num_blocks)
        best = next(iter(outcomes.values()))
        for name, outcome in outcomes.items():
            share = outcome.cached / best.cached
            rows.append([num_blocks, seed, name, outcome.cached, share, outcome.load_imbalance, outcome.work_imbalance])
        is_good = is_good and share >= 0.95 and outcome.load_imbalance <= 1.3
    header = ["blocks", "seed", "router", "cached", "of the best", "load max/mean", "work max/mean"]
    text = table(header, [[f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows])
    publish("route", text, command=shlex.join(["python", "-m", "bench.route", *sys.argv[1:]]), save=args.save)
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())

"""Which replica gets a request: the one whose cache holds most of its prompt, unless others have far less to do.

The bound on the load is that of consistent hashing with bounded loads (arXiv 1608.01350): no replica gets a request
that would take it too far above the mean. The replicas themselves report what they have cached, so a gateway that was
started again knows it too.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from childproc.block_digests import DigestChain, root_digest, short_digest
from echelon.pb.scheduler_pb2 import CacheReport, Submit


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """Measured by bench/route.py."""

    most_load: float = 1.25  # of a replica that is chosen for its cache, as a share of the mean ...
    spare: int = 2  # ... and so many requests more, which count while there are few
    # A prefix is a common beginning, such as a system prompt, if the matches of so many earlier requests ended where it
    # does. It is worth a copy on every replica, unless it takes more than this share of one's cache.
    uses_of_beginning: int = 2
    most_of_cache: float = 1 / 16
    ends_remembered: int = 4096
    recent: int = 64  # requests over which the number that a replica got is averaged


_TUNING = Tuning()
_AT_ONCE = 128  # blocks that are hashed before others have their turn, some 0.4 ms


class CachedBlocks:
    """Which blocks one replica has, as it reports."""

    def __init__(self) -> None:
        self.block_size = 0  # tokens; 0: nothing was reported yet
        self.num_blocks = 0  # that the device has room for
        self._digests: set[int] = set()

    def __contains__(self, digest: int) -> bool:
        return digest in self._digests

    def on_report(self, report: CacheReport) -> None:
        if report.from_nothing:
            self._digests.clear()
        self.block_size, self.num_blocks = report.block_size, report.num_blocks
        self._digests.update(report.added)
        self._digests.difference_update(report.removed)


class Replica(Protocol):
    @property
    def cache(self) -> CachedBlocks: ...
    @property
    def load(self) -> int:
        """Requests that wait or run there."""
        ...


R = TypeVar("R", bound=Replica)


@dataclass(frozen=True, slots=True)
class Match:
    """The longest beginning of a prompt that a replica has cached."""

    num_blocks: int
    end: int  # short digest of its last block; 0 without one


_NO_MATCH = Match(0, 0)
Matches = Mapping[int, Match]  # by the id() of the replica; one without a match may be missing


async def find_matches(model_name: str, submit: Submit, replicas: Sequence[Replica]) -> Matches:
    """Hashes no further than the longest of them, and pauses again and again: 128k cached tokens take some 25 ms."""
    matches: dict[int, Match] = {}
    if len(replicas) > 1:
        for block_size in {replica.cache.block_size for replica in replicas} - {0}:
            chain = DigestChain(root_digest(model_name, block_size, submit.cache_salt), block_size)
            holding = [replica for replica in replicas if replica.cache.block_size == block_size]
            # The last token of a prompt is always computed.
            num_blocks = (len(submit.prompt_token_ids) - 1) // block_size
            await _match(chain, submit.prompt_token_ids, num_blocks, holding, matches)
    return matches


async def _match(
    chain: DigestChain, token_ids: Sequence[int], num_blocks: int, holding: list[Replica], matches: dict[int, Match]
) -> None:
    match = _NO_MATCH
    for number in range(1, num_blocks + 1):
        digest = short_digest(chain.extend(token_ids, number)[-1])
        still_holding = [replica for replica in holding if digest in replica.cache]
        if len(still_holding) < len(holding):
            matches.update((id(replica), match) for replica in holding)
            holding = still_holding
            if not holding:
                return
        match = Match(number, digest)
        if number % _AT_ONCE == 0:
            await asyncio.sleep(0)
    matches.update((id(replica), match) for replica in holding)


class Router:
    """Chooses for one request after the other."""

    def __init__(self, tuning: Tuning = _TUNING) -> None:
        self._tuning = tuning
        self._recent: dict[int, float] = {}  # requests that each replica got of late
        self._num_ended: OrderedDict[int, int] = OrderedDict()  # matches by their end, the latest last

    def choose(self, found: Matches, replicas: Sequence[R]) -> R:
        """One of these, of which there must be at least one."""
        if len(replicas) == 1:
            return replicas[0]
        self._age(replicas)
        matches = {id(replica): found.get(id(replica), _NO_MATCH) for replica in replicas}
        free = self._not_overloaded(replicas)
        best = max((matches[id(replica)] for replica in free), key=lambda match: match.num_blocks)
        if best.num_blocks and not self._is_common(best, free[0].cache):
            free = [replica for replica in free if matches[id(replica)].num_blocks == best.num_blocks]
        chosen = min(free, key=lambda replica: (replica.load, self._recent[id(replica)]))
        self._recent[id(chosen)] += 1
        return chosen

    def _age(self, replicas: Sequence[R]) -> None:
        """One that is new has had as many as the others, so that it gets its share and not everything."""
        known = [self._recent[id(replica)] for replica in replicas if id(replica) in self._recent]
        usual = sum(known) / len(known) if known else 0.0
        keep = 1 - 1 / self._tuning.recent
        self._recent = {id(replica): keep * self._recent.get(id(replica), usual) for replica in replicas}

    def _not_overloaded(self, replicas: Sequence[R]) -> list[R]:
        mean = (sum(replica.load for replica in replicas) + 1) / len(replicas)
        most = self._tuning.most_load * mean + self._tuning.spare
        return [replica for replica in replicas if replica.load + 1 <= most]

    def _is_common(self, match: Match, cache: CachedBlocks) -> bool:
        num_before = self._num_ended.pop(match.end, 0)
        self._num_ended[match.end] = num_before + 1
        if len(self._num_ended) > self._tuning.ends_remembered:
            self._num_ended.popitem(last=False)
        is_small = match.num_blocks <= self._tuning.most_of_cache * cache.num_blocks
        return is_small and num_before >= self._tuning.uses_of_beginning

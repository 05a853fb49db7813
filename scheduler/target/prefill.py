"""How the prompts being computed share the tokens of a round.

Decode rows come first, and prompts share the rest of the token budget. A prompt that arrived alone gets all of it.
Prompts of similar length are computed one after another, oldest first. While shorter prompts keep arriving, a prompt is
*long* if it is more than twice as long as the shortest of the last ten seconds. Short prompts are computed whole,
oldest first. The long ones together get one chunk per round, a quarter of the shortest arrival. So an arrival waits
little for the round that has begun and loses little to company in its own. The chunk has two lower bounds. It is at
least twice the knee (the number of tokens whose time equals the fixed time of a round, measured), so that a long prompt
keeps two thirds of its speed. And it is at least half of what the short prompts take, so that many of them do not
starve it. Of several long prompts, the oldest gets half the chunk, and the one with the fewest tokens left gets the
other half. No second round is queued after one that computes prompts, because an arrival would have to wait for both.
If short prompts have at least eight knees and keep the target busy for up to a quarter of the time, each prompt,
including the long one, has its first token within twice the time that it would take alone.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from scheduler.target.state import TargetState


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """How long prompts are distinguished from short ones. The module's docstring says what follows from it."""

    recent_s: float = 10.0  # how long an arrival counts; not measured
    long_ratio: int = 2  # times the shortest recent prompt; not measured
    num_recent: int = 64  # most arrivals that are remembered; not measured
    chunk_share: int = 4  # the chunk of the long prompts is the shortest recent prompt divided by this; not measured
    chunk_knees: int = 2  # but at least this many knees: then long prompts keep 2/3 of their speed; calculated
    short_share: int = 2  # and at least the tokens of the short prompts divided by this; not measured
    reserve_share: int = 2  # short prompts leave it at most the token budget divided by this; not measured
    nearest_share: int = 2  # the prompt with the fewest tokens left gets the chunk divided by this; not measured


_TUNING = Tuning()


class Arrivals:
    """The lengths of the prompts that arrived recently."""

    def __init__(self) -> None:
        self._recent: deque[tuple[float, int]] = deque(maxlen=_TUNING.num_recent)

    def add(self, num_tokens: int, now: float) -> None:
        self._recent.append((now, num_tokens))

    def shortest(self, now: float) -> int | None:
        """The shortest prompt of the last seconds, if any."""
        while self._recent and self._recent[0][0] < now - _TUNING.recent_s:
            self._recent.popleft()
        return min((length for _, length in self._recent), default=None)


class Prompt(NamedTuple):
    remaining: int  # tokens left to compute
    length: int  # tokens to compute in all


def share_prompts(states: Sequence[TargetState], budget: int, *, shortest: int | None, knee: int) -> list[int]:
    """`share_prefill` for seqs."""
    prompts = [Prompt(state.num_uncomputed, state.num_tokens_ahead - state.num_reused) for state in states]
    return share_prefill(prompts, budget, shortest=shortest, knee=knee)


def share_prefill(prompts: Sequence[Prompt], budget: int, *, shortest: int | None, knee: int) -> list[int]:
    """Tokens of each prompt to compute now, at most `budget` in all.

    prompts: oldest first. shortest, knee: see Arrivals and RoundCost.
    """
    limit = _TUNING.long_ratio * shortest if shortest is not None else max(prompt.length for prompt in prompts)
    long = [i for i, prompt in enumerate(prompts) if prompt.length > limit]
    chunk = max(_TUNING.chunk_knees * knee, limit // (_TUNING.chunk_share * _TUNING.long_ratio))
    wanted = max(chunk, budget // (1 + _TUNING.short_share))
    reserved = min(sum(prompts[i].remaining for i in long), wanted, budget // _TUNING.reserve_share)
    shares = [0] * len(prompts)
    left = budget - reserved
    for i, prompt in enumerate(prompts):
        if prompt.length <= limit:
            shares[i] = min(prompt.remaining, left)
            left -= shares[i]
    num_short = sum(shares)
    if long:
        _share_chunk(shares, prompts, long, min(budget - num_short, max(chunk, num_short // _TUNING.short_share)))
    if shares[0] == 0 and budget > 0:  # the oldest always advances, so that each is computed in the end
        shares[shares.index(max(shares))] -= 1 if sum(shares) == budget else 0
        shares[0] = 1
    return shares


def _share_chunk(shares: list[int], prompts: Sequence[Prompt], long: list[int], chunk: int) -> None:
    oldest, others = long[0], long[1:]
    if others:
        nearest = min(others, key=lambda i: prompts[i].remaining)
        shares[nearest] = min(prompts[nearest].remaining, chunk // _TUNING.nearest_share)
        chunk -= shares[nearest]
    shares[oldest] = min(prompts[oldest].remaining, chunk)

"""How many drafts give the most committed tokens a second, given the estimates of acceptance and step times.

The goodput of a round is its expected tokens divided by its time (arXiv 2406.14066). There are two pipelines. In the
serial one, the times of drafting and verifying add up. In the continuous one, both run at once, and only waiting costs.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from scheduler.policy.acceptance import expected_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """Limits of the search. Not measured."""

    max_cuts: int = 24  # numbers of drafts whose time is looked up, evenly spaced; a big batch could have hundreds


_TUNING = Tuning()


class Row(NamedTuple):
    """A seq in a target round."""

    acceptance: float
    limit: int  # most drafts
    num_fixed: int = 0  # drafts that it verifies whatever is chosen

    @property
    def most(self) -> int:
        return max(self.limit, self.num_fixed)

    @property
    def fixed_tokens(self) -> float:
        return expected_tokens(self.acceptance, self.num_fixed)


# A draft that could be verified: (minus the probability that it and all before it are accepted, depth, row). The first
# draft of a row has depth 1. Plain tuples, because a big batch sorts hundreds of them every round.
_Slot = tuple[float, int, int]


def _slots(rows: Sequence[Row]) -> list[_Slot]:
    """Best first, so the drafts of a row come in order."""
    slots = []
    for index, (acceptance, limit, num_fixed) in enumerate(rows):
        value = acceptance**num_fixed
        for depth in range(num_fixed + 1, limit + 1):
            value *= acceptance
            slots.append((-value, depth, index))
    slots.sort()
    return slots


def _cuts(num_slots: int) -> list[int]:
    step = max(1, -(-num_slots // _TUNING.max_cuts))
    return [*range(step, num_slots, step), num_slots] if num_slots else []


def rate_of_alike(
    num_seqs: int, acceptance: float, num_drafts: int, verify_s: Callable[[float], float], draft_s: float
) -> float:
    """Tokens a second if the target waits `draft_s` for this many drafts for each of `num_seqs` seqs."""
    return num_seqs * expected_tokens(acceptance, num_drafts) / (draft_s + verify_s(num_seqs * num_drafts))


class SerialPlan(NamedTuple):
    lengths: list[int]  # drafts for each row, including fixed ones
    rate: float  # tokens a second with these lengths: the best with at least one draft that is not fixed
    plain_rate: float  # and without


def plan_serial(
    rows: Sequence[Row],
    verify_s: Callable[[float], float],
    step_s: Callable[[int], float],
    *,
    start_s: float = 0.0,
) -> SerialPlan:
    """The best lengths if the target waits for the draft.

    `verify_s(d)`: seconds of a target round with d drafts. `step_s(n)`: of a draft step for n seqs. `start_s`: of a
    draft round apart from its steps. A step costs about the same for one seq as for all. So every number of steps is
    tried, and each is filled with drafts as far as verifying more tokens pays. The caller decides whether the result
    beats no drafts at all.
    """
    slots = _slots(rows)
    num_fixed = sum(row.num_fixed for row in rows)
    base_tokens = sum(row.fixed_tokens for row in rows)
    longest_fixed = max((row.num_fixed for row in rows), default=0)
    draft_s = sum(step_s(sum(row.num_fixed >= depth for row in rows)) for depth in range(1, longest_fixed + 1))
    draft_s += start_s if longest_fixed else 0.0
    plain_rate = base_tokens / (draft_s + verify_s(num_fixed))
    best_rate = 0.0 if slots else plain_rate
    best: list[_Slot] = []
    for depth in range(1, max((row.limit for row in rows), default=0) + 1):
        if depth == 1 and not longest_fixed:
            draft_s += start_s
        if depth > longest_fixed:
            draft_s += step_s(sum(row.limit >= depth for row in rows))
        reachable = [slot for slot in slots if slot[1] <= depth]
        tokens, num_taken = base_tokens, 0
        for cut in _cuts(len(reachable)):
            tokens -= sum(slot[0] for slot in reachable[num_taken:cut])
            num_taken = cut
            rate = tokens / (draft_s + verify_s(num_fixed + cut))
            if rate > best_rate:
                best_rate, best = rate, reachable[:cut]
    lengths = [row.num_fixed for row in rows]
    for slot in best:
        lengths[slot[2]] += 1
    return SerialPlan(lengths, best_rate, plain_rate)


def pick_drafts(rows: Sequence[Row], verify_s: Callable[[float], float], price: float) -> tuple[list[int], float]:
    """Which of the available drafts to verify. Returns drafts for each row, and tokens gained minus the price of the
    time.

    `price`: the value of a second in tokens.
    """
    slots = _slots(rows)
    num_fixed = sum(row.num_fixed for row in rows)
    value = sum(row.fixed_tokens for row in rows)
    best_gain, num_best, num_taken = value - price * verify_s(num_fixed), 0, 0
    for cut in _cuts(len(slots)):
        value -= sum(slot[0] for slot in slots[num_taken:cut])
        num_taken = cut
        gain = value - price * verify_s(num_fixed + cut)
        if gain > best_gain:
            best_gain, num_best = gain, cut
    counts = [row.num_fixed for row in rows]
    for slot in slots[:num_best]:
        counts[slot[2]] += 1
    return counts, best_gain


class SteadyState(NamedTuple):
    """The steady state of a continuous pipeline with a given limit of drafts and number of draft steps to wait for."""

    num_drafts: int  # most that a row verifies
    num_waited: int  # draft steps that the target waits for when a seq has no drafts available
    num_ready: float  # drafts made during a verification
    rate: float  # tokens a second


def steady_state(
    rows: Sequence[Row], verify_s: Callable[[float], float], step_s: float, *, waited_step_s: float, restart_s: float
) -> SteadyState:
    """The best steady state with a draft that never pauses.

    When the target is free, a seq is in one of two states. Either its chain continues, because the last verdict agreed
    with all drafts and with the draft's next token; then the drafts made during the verification are ready. Or the
    chain was restarted; then only the steps that the target waits for are. `step_s`: of a draft step during a
    verification; `waited_step_s`: of one that the target waits for. `restart_s`: from a verdict to the first step of
    the new chain. `num_drafts` is at least 1.
    """
    groups = Counter(Row(round(row.acceptance, 2), row.limit, row.num_fixed) for row in rows)
    most = max((row.most for row in groups), default=0)
    best = SteadyState(1, 0, 0.0, 0.0)
    for num_drafts in range(1, most + 1):
        ready = min(num_drafts, max(0.0, verify_s(groups.total() * num_drafts) / step_s - 1.0))
        for num_waited in range(num_drafts + 1):
            wait_s = restart_s + num_waited * waited_step_s if num_waited else 0.0
            rate = _steady_rate(groups, verify_s, wait_s, num_ready=ready, num_waited=num_waited)
            if rate > best.rate:
                best = SteadyState(num_drafts, num_waited, ready, rate)
    return best


def _steady_rate(
    groups: Counter[Row],
    verify_s: Callable[[float], float],
    wait_s: float,
    *,
    num_ready: float,
    num_waited: int,
) -> float:
    tokens = sum_drafts = 0.0
    all_continue = 1.0
    for row, count in groups.items():
        ready, restarted = min(num_ready, row.most), min(num_waited, row.most)
        stays, recovers = row.acceptance ** (ready + 1.0), row.acceptance ** (restarted + 1.0)
        share = recovers / (1.0 - stays + recovers)  # of the rounds in which the chain continued
        continued = expected_tokens(row.acceptance, ready)
        tokens += count * (share * continued + (1.0 - share) * expected_tokens(row.acceptance, restarted))
        sum_drafts += count * (share * ready + (1.0 - share) * restarted)
        all_continue *= share**count
    return tokens / (verify_s(sum_drafts) + (1.0 - all_continue) * wait_s)

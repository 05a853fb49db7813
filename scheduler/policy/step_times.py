"""How long a forward takes, learned while serving.

A forward's time is not linear in its tokens: captured graphs make it a staircase, and a few rows may cost as much as
one. So each observed batch size has its own mean: exact sizes up to 64, then a few sizes per octave. Sizes not seen yet
are guessed on the fast side, so that they are tried and become known. Between two sizes the time stays near that of the
smaller one. Beyond the largest it keeps rising as it rose last.
"""

from bisect import bisect_left, bisect_right
from copy import copy
from dataclasses import dataclass
from itertools import accumulate
from math import inf, log2

from scheduler.policy.recent_line import RecentLine


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """How times are learned. Together these values reach what the simulations of tests/unit/test_policy.py demand. None
    is measured."""

    # Sizes: each number of tokens up to max_exact is one; beyond, each doubling of the tokens has per_octave sizes.
    max_exact: int = 64
    per_octave: int = 6
    memory: float = 24.0  # a new observation counts for 1 / memory of its size's mean, more while there are fewer
    # The first num_first observations of a size may be far too long: kernels compile, caches fill. One of them that
    # takes less than `warm` of the expected time replaces the mean. Later ones count at most max_surprise times it.
    num_first: int = 3  # also the least rounds from which a fixed part is told
    warm: float = 0.5
    max_surprise: float = 3.0
    least_s: float = 1e-6  # a time below this counts as this, since a clock may say 0
    # After every forget_every observations all weights are halved, and sizes with a weight below least_weight dropped.
    forget_every: int = 1000
    least_weight: float = 0.5
    # A size with fewer than `trusted` observations, those of sizes within the factor `alike` included, is moved towards
    # the time that the others predict, if it is slower.
    trusted: float = 4.0
    alike: float = 1.15
    near: float = 1.3  # sizes within this factor: straight interpolation; others: the time stays near the smaller one's
    context_keep: float = 0.99  # weight that earlier observations of time by context keep
    least_context: float = 0.1  # a time that is corrected for less context keeps at least this share of itself
    # A draft round's time is a line over its steps. Its slope is at least least_per_step of the mean step, and is the
    # mean step if the variance of the steps is at most least_spread.
    keep: float = 0.98  # weight that earlier rounds keep
    least_spread: float = 0.25
    least_per_step: float = 0.5
    # A target round of more than growth times the most tokens seen, plus growth_tokens, counts as infinitely long.
    growth: float = 2.0
    growth_tokens: int = 8


_TUNING = Tuning()


def _bucket(num_tokens: int) -> int:
    if num_tokens <= _TUNING.max_exact:
        return num_tokens
    return _TUNING.max_exact + 1 + int(_TUNING.per_octave * log2(num_tokens / _TUNING.max_exact))


@dataclass(slots=True)
class _Bucket:
    num_tokens: float  # means
    num_context: float
    run_s: float
    weight: float = 1.0  # observations, at most `Tuning.memory`


class StepTimes:
    """Seconds of one forward, by its tokens and by the KV that they attend to."""

    def __init__(self) -> None:
        self._buckets: dict[int, _Bucket] = {}
        self._curve: list[tuple[float, float]] = []  # (tokens, seconds with the last context), both rising
        self._is_stale = False
        self._num_observed = 0
        self._num_context = 0.0  # of the last forward
        self._context_num = 0.0  # seconds by context is a quotient, of which this is the numerator
        self._context_den = 0.0
        self._per_context = 0.0  # seconds that one cached token adds

    @property
    def is_known(self) -> bool:
        return bool(self._buckets)

    @property
    def most_tokens(self) -> float:
        """The largest size seen."""
        return max((bucket.num_tokens for bucket in self._buckets.values()), default=0.0)

    def weight(self, num_tokens: int) -> float:
        """The number of recent observations of this size."""
        bucket = self._buckets.get(_bucket(num_tokens))
        return 0.0 if bucket is None else bucket.weight

    def observe(self, num_tokens: int, run_s: float, *, num_context: float = 0.0) -> None:
        """A forward over `num_tokens` tokens, which attend to `num_context` cached ones, took `run_s`."""
        run_s = max(run_s, _TUNING.least_s)
        self._is_stale = True
        self._num_context = num_context
        self._num_observed += 1
        if self._num_observed % _TUNING.forget_every == 0:
            self._forget()
        bucket = self._buckets.get(_bucket(num_tokens))
        if bucket is None:
            self._buckets[_bucket(num_tokens)] = _Bucket(float(num_tokens), num_context, run_s)
            self._update_per_context()
            return
        expected_s = self._at_context(bucket.run_s, num_context - bucket.num_context)
        if bucket.weight >= _TUNING.num_first:
            run_s = min(run_s, _TUNING.max_surprise * expected_s)
            self._learn_context(bucket, num_context, run_s)
        elif run_s < _TUNING.warm * expected_s:
            bucket.run_s *= run_s / expected_s
        bucket.weight = min(_TUNING.memory, bucket.weight + 1.0)
        share = 1.0 / bucket.weight
        bucket.num_tokens += share * (num_tokens - bucket.num_tokens)
        bucket.num_context += share * (num_context - bucket.num_context)
        bucket.run_s += share * (run_s - bucket.run_s)
        self._update_per_context()

    def _forget(self) -> None:
        """A machine changes, so sizes not seen for long have to be seen again."""
        for bucket in self._buckets.values():
            bucket.weight /= 2
        kept = {index: bucket for index, bucket in self._buckets.items() if bucket.weight >= _TUNING.least_weight}
        self._buckets = kept or self._buckets

    def _learn_context(self, bucket: _Bucket, num_context: float, run_s: float) -> None:
        """Compare within one size only, because more tokens tend to come with more context."""
        off = num_context - bucket.num_context
        keep = _TUNING.context_keep
        self._context_num = keep * self._context_num + off * (run_s - bucket.run_s)
        self._context_den = keep * self._context_den + off * off

    def _update_per_context(self) -> None:
        """Almost 0 as long as contexts differed little compared with the longest to which it is applied: otherwise it
        would multiply noise."""
        longest = max(self._num_context, *(bucket.num_context for bucket in self._buckets.values()))
        den = self._context_den + longest * longest
        self._per_context = max(0.0, self._context_num / den) if den > 0.0 else 0.0

    def _at_context(self, run_s: float, num_more: float) -> float:
        """Correct `run_s` for this many more (or fewer) cached tokens to attend to."""
        return max(_TUNING.least_context * run_s, run_s + self._per_context * num_more)

    def predict(self, num_tokens: float, *, num_context: float | None = None) -> float:
        """Expected seconds of a forward, by default with as much context as the last one had. Needs at least one
        observation (`is_known`)."""
        assert self._buckets, "no forward was observed yet"
        if self._is_stale:
            self._curve = self._rising_curve()
            self._is_stale = False
        run_s = _on(self._curve, num_tokens)
        return run_s if num_context is None else self._at_context(run_s, num_context - self._num_context)

    def _rising_curve(self) -> list[tuple[float, float]]:
        """A curve through the means. A size that was seen only a few times, like its neighbours, counts little against
        the time that the others predict: if its one time was slow by chance, it would never be tried again."""
        means = [
            (
                bucket.num_tokens,
                self._at_context(bucket.run_s, self._num_context - bucket.num_context),
                bucket.weight,
            )
            for _, bucket in sorted(self._buckets.items())
        ]
        support = _support(means)
        often = _rising([mean for mean, weight in zip(means, support, strict=True) if weight >= _TUNING.trusted])
        if not often:
            return _rising(means)
        return _rising(
            [
                (tokens, _shrunk(run_s, _on(often, tokens), near), weight)
                for (tokens, run_s, weight), near in zip(means, support, strict=True)
            ]
        )


def _support(means: list[tuple[float, float, float]]) -> list[float]:
    """For each size, the number of observations of it and of similar sizes."""
    sizes = [tokens for tokens, _, _ in means]
    sums = [0.0, *accumulate(weight for _, _, weight in means)]
    return [
        sums[bisect_right(sizes, size * _TUNING.alike)] - sums[bisect_left(sizes, size / _TUNING.alike)]
        for size in sizes
    ]


def _shrunk(run_s: float, expected_s: float, weight: float) -> float:
    share = min(1.0, weight / _TUNING.trusted)
    return min(run_s, expected_s + share * (run_s - expected_s))


def _rising(means: list[tuple[float, float, float]]) -> list[tuple[float, float]]:
    """Pool neighbours whose times fall: more tokens never take less time, so that is noise. `means`: (tokens, seconds,
    weight)."""
    pools: list[tuple[list[float], float, float]] = []  # (tokens, seconds, weight)
    for num_tokens, base_s, weight in means:
        pool = ([num_tokens], base_s, weight)
        while pools and pools[-1][1] >= pool[1]:
            tokens, run_s, weight = pools.pop()
            total = weight + pool[2]
            pool = (tokens + pool[0], (run_s * weight + pool[1] * pool[2]) / total, total)
        pools.append(pool)
    return [(tokens, run_s) for members, run_s, _ in pools for tokens in members]


def _on(curve: list[tuple[float, float]], num_tokens: float) -> float:
    """Seconds on a rising curve; between its points and beyond them on the fast side."""
    index = bisect_left(curve, (num_tokens, 0.0))
    if index == 0:
        return curve[0][1]
    if index < len(curve):
        (x0, y0), (x1, y1) = curve[index - 1], curve[index]
        bend = 1 if x1 <= _TUNING.near * x0 else 2
        return y0 + (y1 - y0) * ((num_tokens - x0) / (x1 - x0)) ** bend
    last_x, last_y = curve[-1]
    x, y = curve[min(bisect_left(curve, (last_x / 2, 0.0)), max(0, len(curve) - 2))]
    return last_y + (last_y - y) / (last_x - x) * (num_tokens - last_x) if last_x > x else last_y


class _RoundStart:
    """The time of a round as a fixed part plus one part per step of mean length: a line through the rounds seen. The
    fixed part is 0 until rounds of different lengths were seen."""

    def __init__(self) -> None:
        self._line = RecentLine(_TUNING.keep)

    def observe(self, num_steps: int, num_means: float) -> None:
        """A round of `num_steps` steps took as long as `num_means` steps of mean length."""
        self._line.add(float(num_steps), min(num_means, _TUNING.max_surprise * num_steps))

    @property
    def per_step(self) -> float:
        line = self._line
        if line.weight == 0.0 or line.variance <= _TUNING.least_spread:
            return 1.0
        return max(_TUNING.least_per_step, min(1.0, line.slope))

    @property
    def fixed(self) -> float:
        return max(0.0, self._line.intercept(self.per_step)) if self._line.weight >= _TUNING.num_first else 0.0


class DraftTimes:
    """Seconds of a draft round: one forward over the tokens to catch up with, then one per further draft."""

    def __init__(self) -> None:
        self._forward = StepTimes()
        self._start = _RoundStart()

    @property
    def is_known(self) -> bool:
        return self._forward.is_known

    def observe(self, *, num_seqs: int, num_steps: int, num_chunk_tokens: int, run_s: float) -> None:
        """A round of `num_steps` forwards for `num_seqs` seqs, the first over `num_chunk_tokens` tokens."""
        first, num_more = max(1, num_chunk_tokens), max(0, num_steps - 1)
        if num_seqs == 0 or not self.is_known:
            share_s = run_s / (1 + num_more)
            self._forward.observe(first, share_s)
            if num_more:
                self._forward.observe(num_seqs, share_s)
            return
        # Which forward was off by how much is unknown, so all get the same factor.
        first_s, step_s = self._forward.predict(first), self._forward.predict(num_seqs)
        if num_steps and num_chunk_tokens <= 2 * num_seqs:
            self._start.observe(num_steps, run_s / step_s)
        factor = run_s / (first_s + num_more * step_s)
        self._forward.observe(first, first_s * factor)
        if num_more:
            self._forward.observe(num_seqs, step_s * factor)

    def step_s(self, num_seqs: int) -> float:
        """Seconds of one draft for each of `num_seqs` seqs, including its share of the fixed part of a round."""
        return self._forward.predict(max(1, num_seqs))

    def start_s(self, num_seqs: int) -> float:
        """Seconds that a round takes apart from its drafts."""
        return self._start.fixed * self.step_s(num_seqs)

    def further_s(self, num_seqs: int) -> float:
        """Seconds that each draft for each of `num_seqs` seqs adds to a round."""
        return self._start.per_step * self.step_s(num_seqs)

    def chunk_s(self, num_tokens: int) -> float:
        """Seconds of a forward that only catches up."""
        return self._forward.predict(max(1, num_tokens))


class VerifyTimes:
    """Seconds of a target round by the number of its drafts.

    The seqs do not cause the prompts in a round, so the time that drafts add is counted on top of a round without
    prompts. Rounds far bigger than any seen count as infinitely long, so sizes grow step by step. `num_fixed`: drafts
    whose number is not the policy's choice.
    """

    __slots__ = ("_base_s", "_most", "_num_before", "_slowdown", "_times")

    def __init__(self, times: StepTimes, num_rows: int, num_other_tokens: int, *, num_fixed: int = 0) -> None:
        self._times = times
        self._num_before = num_rows + num_other_tokens
        self._base_s = times.predict(num_rows) - times.predict(self._num_before)
        tried_next = _TUNING.growth * times.most_tokens + _TUNING.growth_tokens
        self._most = max(tried_next, self._num_before + num_fixed + num_rows)
        self._slowdown = 1.0

    def __call__(self, num_drafts: float) -> float:
        num_tokens = self._num_before + num_drafts
        if num_tokens > self._most:
            return inf
        return self._slowdown * (self._base_s + self._times.predict(num_tokens))

    def slowed(self, slowdown: float) -> "VerifyTimes":
        """The same while the draft runs."""
        twin = copy(self)
        twin._slowdown = slowdown
        return twin

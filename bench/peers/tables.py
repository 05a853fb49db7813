"""The report of `bench.peers`: ratios with their confidence intervals, then what each side did at each load."""

from collections.abc import Mapping, Sequence

from bench.peers.results import (
    Metric,
    Results,
    Side,
    first_token_s,
    median_interval,
    token_s,
    tokens_per_round,
    tokens_per_s,
)
from bench.report import Spread, table

OURS = "Echelon"
METRICS: Mapping[str, Metric] = {
    "tokens/s": tokens_per_s,
    "time to first token": first_token_s,
    "time per output token": token_s,
}
MODES = (("plain", "plain"), ("fixed", "fixed"), ("policy", "fixed"))  # ours, the peer's
LOAD_HEADER = [
    "",
    "tokens/s",
    "first token, ms",
    "ms per output token",
    "tokens a round",
    "equal to its own plain",
    "equal to Echelon's plain",
    "cores of others",
]


def ratio_table(results: Results, peer: str) -> str:
    """Echelon divided by a peer, pair by pair."""
    modes = [f"{ours} / {theirs}" for ours, theirs in MODES]
    rows = [
        [name, str(load), str(_num_pairs(results, load, peer)), *_ratio_cells(results, load, peer, metric)]
        for name, metric in METRICS.items()
        for load in results.loads
        if _num_pairs(results, load, peer)
    ]
    return table([f"Echelon / {peer}", "requests", "pairs", *modes, "policy / best mode"], rows)


def _num_pairs(results: Results, load: int, peer: str) -> int:
    return max(len(results.ratios(load, Side(OURS, ours), Side(peer, theirs), tokens_per_s)) for ours, theirs in MODES)


def _ratio_cells(results: Results, load: int, peer: str, metric: Metric) -> list[str]:
    pairs = [(Side(OURS, ours), Side(peer, theirs)) for ours, theirs in MODES]
    pairs.append((Side(OURS, "policy"), results.best(load, peer)))
    return [ratio_cell(results.ratios(load, side, base, metric)) for side, base in pairs]


def ratio_cell(ratios: Sequence[float]) -> str:
    """Median and interval; in square brackets least and greatest, where there are too few for an interval."""
    if not ratios:
        return ""
    interval = median_interval(ratios)
    if interval is None:
        spread = Spread.of(ratios)
        return f"{spread.median:.2f} [{spread.least:.2f} to {spread.greatest:.2f}]"
    return f"{Spread.of(ratios).median:.2f} ({interval[0]:.2f} to {interval[1]:.2f})"


def load_table(results: Results, load: int) -> str:
    return table(LOAD_HEADER, [_side_row(results, load, side) for side in results.sides(load)])


def _side_row(results: Results, load: int, side: Side) -> list[str]:
    def spread(metric: Metric, scale: float = 1.0) -> Spread:
        return Spread.of([scale * value for value in results.values(load, side, metric)])

    return [
        side.name,
        f"{spread(tokens_per_s):.1f}",
        f"{spread(first_token_s, 1e3):.0f}",
        f"{spread(token_s, 1e3):.1f}",
        f"{spread(tokens_per_round).median:.2f}",
        _share_cell(results.equal_share(load, side, Side(side.system, "plain"))),
        _share_cell(results.equal_share(load, side, Side(OURS, "plain"))),
        _cores_cell([m.other_cores for m in results.measurements(load, side) if m.other_cores is not None]),
    ]


def _share_cell(share: float | None) -> str:
    return "" if share is None else f"{share:.3f}"


def _cores_cell(cores: Sequence[float]) -> str:
    return f"{Spread.of(cores):.2f}" if cores else "not known"


def metric_curves(results: Results) -> dict[str, dict[str, dict[int, Spread]]]:
    """For a plot: metric, side, load. Times are in ms."""
    sides = sorted({side.name: side for load in results.loads for side in results.sides(load)}.items())

    def points(side: Side, metric: Metric, scale: float) -> dict[int, Spread]:
        found = {load: results.values(load, side, metric) for load in results.loads}
        return {load: Spread.of([scale * value for value in values]) for load, values in found.items() if values}

    panels = [
        (name, metric, 1.0) if metric is tokens_per_s else (f"{name}, ms", metric, 1e3)
        for name, metric in METRICS.items()
    ]
    return {title: {name: points(side, metric, scale) for name, side in sides} for title, metric, scale in panels}

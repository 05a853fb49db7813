"""Charts of results, saved next to their tables."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib

from bench.report import Spread

matplotlib.use("Agg")  # files, no display
from matplotlib import pyplot


def plot_bars(groups: Mapping[str, Mapping[str, Spread]], *, label: str, path: Path) -> None:
    """One panel for each group, a bar for each entry: medians, with whiskers from the least to the greatest."""
    most = max(len(group) for group in groups.values())
    figure, panels = pyplot.subplots(len(groups), 1, figsize=(9, (0.4 * most + 1.2) * len(groups)), squeeze=False)
    for panel, (title, group) in zip(panels[:, 0], groups.items(), strict=True):
        spreads = list(group.values())
        panel.barh(list(group), [s.median for s in spreads], xerr=_whiskers(spreads), color="#4c72b0", capsize=3)
        panel.invert_yaxis()
        panel.set_title(title)
        panel.set_xlabel(label)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def plot_curves(groups: Mapping[str, Mapping[str, Mapping[int, Spread]]], *, label: str, path: Path) -> None:
    """One panel for each group, a curve for each entry over powers of two: medians, with whiskers from the least to the
    greatest. Both axes are logarithmic."""
    figure, panels = pyplot.subplots(1, len(groups), figsize=(5 * len(groups), 5), squeeze=False, layout="constrained")
    for panel, (title, curves) in zip(panels[0], groups.items(), strict=True):
        for name, points in curves.items():
            spreads = list(points.values())
            medians = [s.median for s in spreads]
            panel.errorbar(list(points), medians, yerr=_whiskers(spreads), label=name, marker="o", capsize=3)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.xaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter("{x:g}")
        panel.set_title(title)
        panel.set_xlabel(label)
        panel.grid(which="both", alpha=0.3)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _whiskers(spreads: list[Spread]) -> list[list[float]]:
    return [[s.median - s.least for s in spreads], [s.greatest - s.median for s in spreads]]

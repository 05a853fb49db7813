"""Bar charts of results, saved next to their tables."""

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
        medians = [spread.median for spread in group.values()]
        whiskers = [
            [spread.median - spread.least for spread in group.values()],
            [spread.greatest - spread.median for spread in group.values()],
        ]
        panel.barh(list(group), medians, xerr=whiskers, color="#4c72b0", capsize=3)
        panel.invert_yaxis()
        panel.set_title(title)
        panel.set_xlabel(label)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)

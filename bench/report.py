"""What every benchmark does with its numbers: medians, a Markdown table, a file named by hardware and date."""

import argparse
import datetime
import os
import platform
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).with_name("results")


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, least and greatest of several runs: machines are noisy, so all three are shown."""

    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values))

    def __format__(self, spec: str) -> str:
        return f"{self.median:{spec}} ({self.least:{spec}}-{self.greatest:{spec}})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns."""
    widths = [max(len(str(row[i])) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(str(c).ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([line(header), rule, *(line(row) for row in rows)])


def cpu_model() -> str:
    """The processor's name from Linux, else from Python."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.M)
        if match:
            return match.group(1).strip()
    return platform.processor() or platform.machine()


def hardware(device: str = "cpu") -> str:
    """The name of what a report was measured on; `device`: cpu or cuda."""
    if device == "cuda":
        import torch  # here, because most reports do without it

        return str(torch.cuda.get_device_name())
    return f"{cpu_model()}, {os.cpu_count()} cores"


def add_report_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--save", action="store_true", help=f"also write the report to {RESULTS.name}/")


def publish(name: str, body: str, *, command: str, save: bool, on: str | None = None) -> Path | None:
    """Prints a report. With `save`, writes it to bench/results/<hardware>-<date>-<name>.md and returns that path."""
    machine = on or hardware()
    today = datetime.date.today().isoformat()
    text = f"# {name}\n\n`{command}`, {machine}, {today}\n\n{body}\n"
    print(text)
    if not save:
        return None
    slug = re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{slug}-{today}-{name}.md"
    path.write_text(text)
    print(f"saved as {path}")
    return path

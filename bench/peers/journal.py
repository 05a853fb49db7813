"""Measurements in a file of JSON lines, so that a comparison can be made in pieces and continued.

The first line holds the settings that all its runs share; then come measurements, and what each side said of itself.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.peers.results import Measurement, Results, Side
from bench.peers.runs import Run, Stream


class JournalError(ValueError):
    """The file holds runs with other settings."""


class Journal:
    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Reads what is there. Raises JournalError."""
        self._path = path
        self.results = Results()
        self.about: dict[str, str] = {}  # by the side's name
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        if lines:
            _check(path, json.loads(lines[0]), settings)
        else:
            self._write(dict(settings))
        for line in lines[1:]:
            self._take(json.loads(line))

    def add(self, measurement: Measurement) -> None:
        self.results.add(measurement)
        self._write(asdict(measurement))

    def introduce(self, side: Side, about: str) -> None:
        self.about[side.name] = about
        self._write({"side": asdict(side), "about": about})

    def _take(self, entry: dict[str, Any]) -> None:
        side = Side(**entry.pop("side"))
        if "about" in entry:
            self.about[side.name] = entry["about"]
            return
        run = entry.pop("run")
        streams = [Stream(**stream) for stream in run["streams"]]
        self.results.add(Measurement(**entry, side=side, run=Run(streams=streams, seconds=run["seconds"])))

    def _write(self, entry: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def _check(path: Path, found: dict[str, Any], settings: Mapping[str, Any]) -> None:
    different = [name for name in settings if found.get(name) != settings[name]]
    if different:
        listed = ", ".join(f"{name} {found.get(name)} instead of {settings[name]}" for name in different)
        raise JournalError(f"{path} holds runs with {listed}: give another file as --journal, or the same settings")

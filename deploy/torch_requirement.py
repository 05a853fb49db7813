"""Prints the version range that pyproject.toml gives for torch: another version would be replaced right after."""

import sys
import tomllib
from pathlib import Path

extras = tomllib.loads(Path("pyproject.toml").read_text())["project"]["optional-dependencies"]
sys.stdout.write(next(line for line in extras["worker"] if line.startswith("torch")) + "\n")

"""The wheel of this tree, and an environment that holds it with what it asks for and nothing else."""

import importlib.metadata
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


def packages() -> list[str]:
    """The folders that a user gets."""
    return [folder.parent.name for folder in ROOT.glob("*/__init__.py") if folder.parent.name not in ("bench", "tests")]


def build_wheel(folder: Path) -> Path:
    """Builds in a copy, because setuptools leaves files beside the source. `folder` is empty."""
    tree = folder / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in packages():
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "-c", BUILD, folder], cwd=tree, check=True, capture_output=True)
    [wheel] = folder.glob("*.whl")
    return wheel


def install(wheel: Path, folder: Path) -> Path:
    """A new environment's bin folder. What the wheel asks for without extras is linked from ours, so nothing loads."""
    venv.create(folder, symlinks=True)
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", "--no-compile", wheel], check=True)
    [site] = folder.glob("lib/python*/site-packages")
    [metadata] = site.glob("echelon-*.dist-info")
    for distribution in _closure(importlib.metadata.Distribution.at(metadata)):
        for entry in {Path(str(file)).parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            (site / entry).symlink_to(Path(str(distribution.locate_file(entry))))
    return folder / "bin"


def _closure(start: importlib.metadata.Distribution) -> Iterator[importlib.metadata.Distribution]:
    """What `start` needs, and what that needs, without extras."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        for line in waiting.pop().requires or ():
            requirement = Requirement(line)
            is_wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if is_wanted and requirement.name not in found:
                found.add(requirement.name)
                waiting.append(importlib.metadata.distribution(requirement.name))
                yield waiting[-1]

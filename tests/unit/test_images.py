"""The images hold what is installed, run as an ordinary user, and bring no compiler that they do not need."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
STAGE = re.compile(r"^FROM (\S+) AS (\S+)\n(.*?)(?=^FROM |\Z)", flags=re.MULTILINE | re.DOTALL)


def stages() -> dict[str, str]:
    """The instructions of each target, with those of the stages that it is made from."""
    text: dict[str, str] = {}
    for base, name, own in STAGE.findall((ROOT / "deploy" / "Dockerfile").read_text()):
        text[name] = text.get(base, "") + own
    return text


def test_a_build_gets_every_package_and_nothing_else() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {name.rstrip("*") for name in config["tool"]["setuptools"]["packages"]["find"]["include"]}
    admitted = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    extra = {"pyproject.toml", config["project"]["readme"], "LICENSE", "deploy/torch_requirement.py"}
    assert admitted == packages | extra


def test_an_image_runs_as_an_ordinary_user_and_tells_its_health() -> None:
    for name in ("cuda", "cpu"):
        lines = stages()[name].splitlines()
        assert lines[-1 if lines[-1] else -2] == "USER 1000:1000"
        assert any(line.startswith("HEALTHCHECK") for line in lines)


def test_only_the_image_for_gpus_has_a_compiler() -> None:
    installed = {name: " ".join(re.findall(r"install --yes[^\\&]*", text)) for name, text in stages().items()}
    assert "g++" in installed["build"]
    assert "gcc" in installed["cuda"]
    assert "g++" not in installed["cuda"]
    assert installed["cpu"] == installed["base"]
    assert "gcc" not in installed["cpu"]
    assert "g++" not in installed["cpu"]


def test_the_range_of_torch_is_that_of_the_project() -> None:
    script = ROOT / "deploy" / "torch_requirement.py"
    shown = subprocess.run([sys.executable, script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    worker = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["worker"]
    assert shown.strip() in worker
    assert shown.startswith("torch>=")

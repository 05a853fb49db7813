"""The rules of the house: who may import whom, and what the light processes must not load."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("echelon", "gateway", "cluster", "scheduler", "workers", "kernels", "checkpoint", "childproc")
MAY_IMPORT = {
    "echelon": {"echelon", "cluster"},  # the CLI starts the controller; it does so lazily (below)
    "cluster": {"cluster", "checkpoint", "childproc", "echelon"},
    "gateway": {"gateway", "checkpoint", "childproc", "echelon"},
    "scheduler": {"scheduler", "childproc", "echelon"},
    "workers": {"workers", "kernels", "checkpoint", "childproc", "echelon"},
    "kernels": {"kernels"},
    "checkpoint": {"checkpoint"},
    "childproc": {"childproc", "echelon"},
}
TORCH = {"torch", "transformers", "triton"}
FORBIDDEN = {
    "echelon": TORCH | {"ray", "pydantic"},
    "cluster": TORCH,
    "gateway": TORCH | {"ray"},
    "scheduler": TORCH | {"ray", "pydantic"},
    "workers": {"ray", "pydantic", "transformers"},
    "kernels": {"ray", "pydantic", "transformers"},
    "checkpoint": TORCH | {"ray", "pydantic"},
    "childproc": TORCH | {"ray", "pydantic"},
}


def imports_of(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, function bodies included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def sources(folder: str) -> list[Path]:
    return [p for p in (ROOT / folder).rglob("*.py") if "pb" not in p.parts]


@pytest.mark.parametrize("folder", FOLDERS)
def test_arrows(folder: str) -> None:
    for path in sources(folder):
        for name in imports_of(path):
            top = name.split(".")[0]
            if top in FOLDERS:
                assert top in MAY_IMPORT[folder], f"{path.relative_to(ROOT)} must not import {name}"
            assert top not in FORBIDDEN[folder], f"{path.relative_to(ROOT)} must not import {name}"


@pytest.mark.parametrize("folder", ["scheduler", "workers", "childproc"])
def test_only_the_stubs_are_shared(folder: str) -> None:
    for path in sources(folder):
        for name in imports_of(path):
            if name.split(".")[0] == "echelon" and name != "echelon.__version__":
                assert name.startswith("echelon.pb"), f"{path.relative_to(ROOT)} imports {name}"


def files_of_ours() -> dict[str, set[str]]:
    """Each module of ours -> the modules of ours that it imports."""
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for f in FOLDERS for path in sources(f)}
    return {
        name: {other for found in imports_of(path) for other in (found, found.rpartition(".")[0]) if other in names}
        for name, path in names.items()
    }


def test_no_module_imports_itself_by_way_of_others() -> None:
    left = files_of_ours()
    while ready := [name for name, others in left.items() if not others & left.keys()]:
        for name in ready:
            del left[name]
    assert not left, f"these import each other, or such modules: {sorted(left)}"


def modules_loaded_by(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return {name.split(".")[0] for name in done.stdout.split()}


@pytest.mark.parametrize(
    ("code", "forbidden"),
    [
        ("import echelon, echelon.cli.app", TORCH | {"ray", "pydantic"}),
        ("import gateway", TORCH | {"ray"}),
        ("import scheduler.process.server", TORCH | {"ray", "pydantic"}),
        ("import workers.process.server", {"ray", "pydantic", "transformers"}),
    ],
)
def test_light_processes_stay_light(code: str, forbidden: set[str]) -> None:
    assert not modules_loaded_by(code) & forbidden

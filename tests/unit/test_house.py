"""The rules of the house: who may import whom, what the light processes must not load, and how long things may be.

A new folder needs a line in ARROWS and in FORBIDDEN, a new subpackage a line in SUBPACKAGE_ARROWS. Both tables say what
is there, no more: the tests print the arrows that are missing from them and those that have become stale.
"""

import ast
import functools
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What a folder imports besides itself. Within echelon, only the CLI imports cluster, when a command needs it.
ARROWS = {
    "echelon": "cluster",
    "cluster": "checkpoint childproc echelon",
    "gateway": "checkpoint childproc echelon",
    "scheduler": "checkpoint childproc echelon",
    "workers": "checkpoint childproc echelon kernels",
    "kernels": "",
    "checkpoint": "",
    "childproc": "echelon",
}
# The same for the subpackages of a folder. The folder's own name stands for the files beside them.
SUBPACKAGE_ARROWS = {
    "cluster": "cluster.deployment cluster.on_ray cluster.planning cluster.processes",
    "cluster.deployment": "cluster",
    "cluster.on_ray": "cluster cluster.deployment cluster.planning cluster.processes",
    "cluster.planning": "cluster cluster.deployment",
    "cluster.processes": "cluster cluster.deployment cluster.planning",
    "echelon.cli": "echelon",
    "gateway": "gateway.access gateway.doors gateway.jobs gateway.replicas gateway.requests",
    "gateway.access": "gateway.requests",
    "gateway.doors": "gateway gateway.access gateway.jobs gateway.requests",
    "gateway.jobs": "gateway.requests",
    "gateway.replicas": "gateway gateway.requests",
    "kernels.attention": "kernels kernels.kv kernels.native",
    "kernels.kv": "kernels kernels.native",
    "kernels.layers": "kernels kernels.native",
    "kernels.sampling": "kernels kernels.native",
    "kernels.upcoming": "kernels kernels.attention kernels.kv",
    "scheduler": "scheduler.drafting scheduler.engines scheduler.kv_cache scheduler.process scheduler.requests "
    "scheduler.target",
    "scheduler.drafting": "scheduler scheduler.engines scheduler.kv_cache scheduler.policy scheduler.requests "
    "scheduler.target",
    "scheduler.engines": "scheduler scheduler.kv_cache scheduler.policy scheduler.requests",
    "scheduler.kv_cache": "scheduler scheduler.policy",
    "scheduler.process": "scheduler scheduler.engines scheduler.requests",
    "scheduler.requests": "scheduler",
    "scheduler.target": "scheduler scheduler.engines scheduler.kv_cache scheduler.requests",
    "workers": "workers.process",
    "workers.captured": "workers.models workers.sampling",
    "workers.engine": "workers workers.captured workers.models workers.sampling",
    "workers.layers": "workers",
    "workers.models": "workers workers.layers",
    "workers.process": "workers workers.captured workers.engine workers.layers workers.models workers.sampling "
    "workers.tiers",
    "workers.sampling": "workers",
    "workers.tiers": "workers workers.engine",
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
MAX_FILE_LINES = 350
P95_FUNCTION_LINES = 26


@functools.cache
def sources(folder: str) -> tuple[Path, ...]:
    return tuple(path for path in sorted((ROOT / folder).rglob("*.py")) if "pb" not in path.parts)


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@functools.cache
def imports_of(path: Path) -> frozenset[str]:
    """Dotted names of everything that a file imports, including in function bodies and for type checkers only."""
    names: set[str] = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(names)


def top(name: str) -> str:
    return name.split(".")[0]


def subpackage(module: str) -> str:
    """scheduler.policy for scheduler.policy.goodput, scheduler for scheduler.core."""
    parts = module.split(".")
    return ".".join(parts[:2]) if (ROOT / parts[0] / parts[1]).is_dir() else parts[0]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@functools.cache
def module_imports() -> dict[str, set[str]]:
    """Which of our modules each of them imports."""
    modules = {module_of(path): path for folder in ARROWS for path in sources(folder)}
    return {
        module: {name if name in modules else name.rpartition(".")[0] for name in imports_of(path)} & modules.keys()
        for module, path in modules.items()
    }


def as_text(arrows: Iterator[tuple[str, str]]) -> list[str]:
    return sorted({f"{start} -> {end}" for start, end in arrows if start != end})


def allowed(table: dict[str, str]) -> list[str]:
    return as_text((start, end) for start, ends in table.items() for end in ends.split())


def test_arrows_between_folders() -> None:
    found = as_text(
        (folder, top(name))
        for folder in ARROWS
        for path in sources(folder)
        for name in imports_of(path)
        if top(name) in ARROWS
    )
    assert found == allowed(ARROWS)


def test_arrows_between_subpackages() -> None:
    found = as_text(
        (subpackage(module), subpackage(name))
        for module, names in module_imports().items()
        for name in names
        if "." in module and "." in name and top(module) == top(name)
    )
    assert found == allowed(SUBPACKAGE_ARROWS)


@pytest.mark.parametrize("folder", ARROWS)
def test_a_folder_imports_nothing_forbidden(folder: str) -> None:
    for path in sources(folder):
        for name in imports_of(path):
            assert top(name) not in FORBIDDEN[folder], f"{path.relative_to(ROOT)} must not import {name}"


@pytest.mark.parametrize("folder", ["scheduler", "workers", "childproc"])
def test_only_the_stubs_are_shared(folder: str) -> None:
    for path in sources(folder):
        for name in imports_of(path):
            if top(name) == "echelon" and name != "echelon.__version__":
                assert name.startswith("echelon.pb"), f"{path.relative_to(ROOT)} imports {name}"


def test_only_the_command_line_imports_the_cluster() -> None:
    for path in sources("echelon"):
        if path.parent != ROOT / "echelon" / "cli":
            assert "cluster" not in map(top, imports_of(path)), f"{path.relative_to(ROOT)} imports cluster"


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    graph = {module: set(names) - {module} for module, names in module_imports().items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as err:
        pytest.fail(f"import circle: {' <- '.join(err.args[1])}")


def test_subpackages_do_not_import_each_other_in_a_circle() -> None:
    graph = {
        start: set(ends.split()) & SUBPACKAGE_ARROWS.keys() for start, ends in SUBPACKAGE_ARROWS.items() if "." in start
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as err:
        pytest.fail(f"import circle: {' <- '.join(err.args[1])}")


def fields_of(module: str, name: str) -> set[str]:
    tree = ast.parse((ROOT / module).read_text())
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name]
    return {node.target.id for node in classes[0].body if isinstance(node, ast.AnnAssign)}


def attributes_set_in(path: Path) -> set[str]:
    """Names of the attributes that a file sets, except those of `self`."""
    stored = (node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Attribute))
    return {node.attr for node in stored if isinstance(node.ctx, ast.Store) and ast.unparse(node.value) != "self"}


def test_only_the_owning_subpackage_changes_what_it_knows_of_a_seq() -> None:
    fields = {
        "requests": fields_of("scheduler/requests/request.py", "Request"),
        "target": fields_of("scheduler/target/state.py", "TargetState")
        | fields_of("scheduler/target/row.py", "TargetRow"),
        "drafting": fields_of("scheduler/drafting/state.py", "DraftState")
        | fields_of("scheduler/drafting/row.py", "DraftRow"),
    }
    for owner, names in fields.items():
        shared = set().union(*(others for other, others in fields.items() if other != owner))
        for path in sources("scheduler"):
            if path.parent.name != owner:
                changed = attributes_set_in(path) & (names - shared)
                assert not changed, f"{path.relative_to(ROOT)} changes {changed} of scheduler/{owner}"


def private_names(path: Path) -> Iterator[str]:
    """Names with one leading underscore that a file imports from us, or reads from others than `self`, torch and os."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom) and node.module and top(node.module) in ARROWS:
            yield from (f"{node.module}.{alias.name}" for alias in node.names if is_private(alias.name))
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            name = ast.unparse(node)
            if top(name) not in ("self", "cls", "torch", "os"):  # os._exit is public
                yield name


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_tests_use_public_names() -> None:
    found = {f"{path.relative_to(ROOT)}: {name}" for path in sources("tests") for name in private_names(path)}
    assert found == set()


@functools.cache
def names_read_by(path: Path) -> frozenset[str]:
    """By their last part, including those that a test replaces."""
    names = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("setattr"):
            names |= {arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)}
        elif isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.alias):
            names.add(node.name)
    return frozenset(names)


def constants_of(path: Path) -> set[str]:
    targets = [
        target
        for node in tree_of(path).body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
    ]
    return {
        target.id for target in targets if isinstance(target, ast.Name) and target.id.isupper() and len(target.id) > 1
    }


def test_constants_that_only_their_module_reads_begin_with_an_underscore() -> None:
    readers = {
        path: names_read_by(path) for folder in (*ARROWS, "bench", "models", "tests") for path in sources(folder)
    }
    for path in (path for folder in ARROWS for path in sources(folder)):
        for name in constants_of(path):
            is_read_elsewhere = any(name in names for other, names in readers.items() if other != path)
            assert is_private(name) or is_read_elsewhere, f"{path.relative_to(ROOT)}: {name}"


def test_only_the_public_package_lists_its_names() -> None:
    listing = {
        str(path.relative_to(ROOT)) for folder in ARROWS for path in sources(folder) if "__all__" in path.read_text()
    }
    assert listing == {"echelon/__init__.py"}


def test_channels_are_opened_only_where_proxies_are_handled() -> None:
    """Only our own wires and the clients open channels; others would go through the environment's proxies."""
    opening = {
        str(path.relative_to(ROOT))
        for folder in (*ARROWS, "bench", "models", "tests")
        for path in sources(folder)
        if "insecure_channel(" in path.read_text() and path.parent != Path(__file__).parent
    }
    assert opening == {"childproc/wires.py", "echelon/channel.py"}


def test_no_file_is_too_long() -> None:
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = {name for name in listed.split() if not name.startswith(("tests/", "echelon/pb/"))}
    too_long = {name for name in files if len((ROOT / name).read_text().splitlines()) > MAX_FILE_LINES}
    assert too_long == set()


def function_lines(folder: str) -> Iterator[int]:
    for path in sources(folder):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
                yield node.end_lineno - node.lineno + 1


def test_most_functions_are_short() -> None:
    lengths = sorted(length for folder in ARROWS for length in function_lines(folder))
    p95 = lengths[-(-len(lengths) * 95 // 100) - 1]
    assert p95 <= P95_FUNCTION_LINES, f"19 of 20 functions have up to {p95} lines"


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
        ("import gateway.server", TORCH | {"ray"}),
        ("import scheduler.process.server", TORCH | {"ray", "pydantic"}),
        ("import workers.process.server", {"ray", "pydantic", "transformers"}),
    ],
)
def test_light_processes_stay_light(code: str, forbidden: set[str]) -> None:
    assert not modules_loaded_by(code) & forbidden

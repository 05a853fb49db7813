"""A session of steps keeps what it has, whatever its steps do."""

import importlib
import json
import os
import re
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
import torch

from bench.gpu_session.__main__ import main
from bench.gpu_session.needs import missing, required
from bench.gpu_session.running import RESULTS, SUMMARY, Step, first_error, run_steps
from bench.gpu_session.steps import gpu_steps
from bench.inflate import PRESETS
from bench.steps import kv_cache_bytes
from bench.tiers import Bench, limit
from cluster.processes.specs import ENGINE_ROLES
from echelon.pb.process_pb2 import EngineSpec, WorkerSpec

REPOSITORY = Path(__file__).parents[2]
FOREVER = "import time; print('up', flush=True); time.sleep(600)"


def step(name: str, code: str, limit_s: float = 60.0) -> Step:
    return Step(name=name, shows=f"{name} shows", command=[sys.executable, "-c", code], limit_s=limit_s)


def test_steps_that_pass_fail_and_hang(tmp_path: Path) -> None:
    steps = [
        step("good", "print('fine')"),
        step("bad", "import sys; print('hello'); raise KeyError('no such block')"),
        step("slow", FOREVER, limit_s=1.0),
        step("after", "print('still runs')"),
    ]
    outcomes = run_steps(steps, tmp_path, budget_s=120.0)
    assert [outcome.status for outcome in outcomes] == ["passed", "failed", "timed out", "passed"]
    assert outcomes[1].error == "KeyError: 'no such block'"
    assert (tmp_path / "good.log").read_text() == "fine\n"
    assert json.loads((tmp_path / RESULTS).read_text())[3]["name"] == "after"
    assert "first error: `KeyError: 'no such block'`" in (tmp_path / SUMMARY).read_text()


def test_what_a_step_started_ends_with_it(tmp_path: Path) -> None:
    child = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {FOREVER!r}])"
    for code in (f"{child}; print(p.pid, flush=True); p.wait()", f"{child}; print(p.pid)"):  # one hangs
        run_steps([step("parent", code, limit_s=5.0)], tmp_path, budget_s=60.0)
        pid = int((tmp_path / "parent.log").read_text().split()[0])
        ends = time.monotonic() + 60.0
        while is_running(pid):  # a signal takes a moment
            assert time.monotonic() < ends
            time.sleep(0.01)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_results_are_there_after_every_step(tmp_path: Path) -> None:
    seen: list[list[str]] = []

    def look(outcome: object) -> None:
        seen.append([each["name"] for each in json.loads((tmp_path / RESULTS).read_text())])

    run_steps([step("one", "pass"), step("two", "pass")], tmp_path, budget_s=60.0, on_outcome=look)
    assert seen == [["one"], ["one", "two"]]


def test_no_step_begins_without_time(tmp_path: Path) -> None:
    (outcome,) = run_steps([step("late", "print('ran')")], tmp_path, budget_s=1.0)
    assert outcome.status == "not run"
    assert not (tmp_path / "late.log").exists()


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("collecting\nE   assert 1 == 2\nE   more\nFAILED tests/a.py", "assert 1 == 2"),
        (
            "Traceback:\n  File\ntorch.OutOfMemoryError: CUDA out of memory",
            "torch.OutOfMemoryError: CUDA out of memory",
        ),
        ("========= Invalid __global__ read\nERROR SUMMARY: 3 errors", "ERROR SUMMARY: 3 errors"),
        ("all is well", ""),
    ],
)
def test_the_first_error_of_an_output(text: str, error: str) -> None:
    assert first_error(text) == error


def test_a_program_that_is_not_there_fails_alone(tmp_path: Path) -> None:
    absent = Step(name="absent", shows="nothing", command=["/no/such/program"], limit_s=60.0)
    outcomes = run_steps([absent, step("after", "pass")], tmp_path, budget_s=60.0)
    assert [outcome.status for outcome in outcomes] == ["failed", "passed"]
    assert "/no/such/program" in outcomes[0].error


BENCHMARKS = [each for each in gpu_steps(Path("work")) if each.command[2].startswith("bench.")]


@pytest.mark.parametrize("each", BENCHMARKS, ids=lambda each: each.name)
def test_every_benchmark_accepts_its_command_line(each: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, module, *options = each.command
    monkeypatch.setattr(sys, "argv", [module, *options])
    importlib.import_module(module).parse_arguments()


def test_steps_of_the_large_pair_have_room_for_every_seq(tmp_path: Path) -> None:
    size = PRESETS["target-8b"]
    config = json.loads((REPOSITORY / "models/demo-target/config.json").read_text())
    grown = {
        "num_hidden_layers": size.layers,
        "hidden_size": size.hidden,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.hidden // size.heads,
    }
    (tmp_path / "config.json").write_text(json.dumps(config | grown))
    # Keys and values of 8 seqs of 1024 tokens, 32 layers, 32 heads of 32 numbers of 2 bytes
    assert kv_cache_bytes([tmp_path], "bfloat16", 8) == 2 * 8 * 1024 * 32 * 32 * 32 * 2


def test_the_tiers_are_measured_with_a_full_device() -> None:
    target, draft = REPOSITORY / "models/demo-target", REPOSITORY / "models/demo-draft"
    bench = Bench(target=target, draft=draft, dtype=None, device="cuda", threads=1, vocab_size=4096)
    settings = bench.settings(device_tokens=1024, host_tokens=4096, disk=None, max_num_seqs=4)
    spec = WorkerSpec(engines=[EngineSpec(role=role) for role in ENGINE_ROLES.values()])
    limit(spec, settings)
    for role, engine in zip(ENGINE_ROLES, spec.engines, strict=True):
        assert engine.kv_cache_bytes == 1024 * settings.model(role).kv_bytes_per_token


# Imports what stands after -- where nothing is installed but the distributions before it.
IMPORTING = """
import importlib, os, sys
from importlib.metadata import packages_distributions
end = sys.argv.index("--")
installed, modules = set(sys.argv[1:end]), sys.argv[end + 1 :]
for package, distributions in packages_distributions().items():
    if not installed & {name.lower().replace("_", "-") for name in distributions} and not os.path.exists(package):
        sys.modules[package] = None
for module in modules:
    importlib.import_module(module)
"""
PROCESSES = ["cluster.local", "gateway.__main__", "gateway.requests.child", "scheduler.__main__"]


def test_processes_import_only_what_a_session_installs() -> None:
    command = [sys.executable, "-c", IMPORTING, *with_dependencies(required()), "--", *PROCESSES]
    imported = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert imported.returncode == 0, imported.stderr


def normal(name: str) -> str:
    return name.lower().replace("_", "-")


def with_dependencies(names: list[str]) -> set[str]:
    found: set[str] = set()
    new = {normal(name) for name in names}
    while new:
        name = new.pop()
        found.add(name)
        try:
            needed = requires(name) or []
        except PackageNotFoundError:  # triton, where torch is the build for CPUs
            continue
        own = (re.match(r"[\w.-]+", line) for line in needed if "extra ==" not in line)
        new |= {normal(match.group()) for match in own if match} - found
    return found


def test_a_machine_that_lacks_something_is_told_so() -> None:
    assert missing(lambda name: True, lambda: True) == []
    (lack,) = missing(lambda name: name != "pydantic", lambda: True)
    assert lack.startswith("packages are missing: pydantic; run pip install -r")
    (lack,) = missing(lambda name: True, lambda: False)
    assert "NVIDIA GPU" in lack
    (lack,) = missing(lambda name: name != "torch", lambda: pytest.fail("torch cannot be asked"))
    assert "pip install torch -r" in lack


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_nothing_runs_without_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_session", str(tmp_path)])
    assert main() == 2
    assert "CUDA device" in capsys.readouterr().err
    assert not os.listdir(tmp_path)


def test_every_step_names_what_exists(tmp_path: Path) -> None:
    """Files of tests, modules of benchmarks and models."""
    steps = gpu_steps(tmp_path)
    assert len({each.name for each in steps}) == len(steps)
    for each in steps:
        for word in each.command:
            if word.startswith(("tests/", "models/")):
                assert (REPOSITORY / word).exists(), word
            if word.startswith("bench."):
                assert (REPOSITORY / f"{word.replace('.', '/')}.py").exists(), word
    listed = {word for each in steps for word in each.command if word.startswith("tests/triton/")}
    there = {f"tests/triton/{path.name}" for path in (REPOSITORY / "tests/triton").glob("test_*.py")}
    there -= {f"tests/triton/test_{name}.py" for name in ("captured_steps", "warm_up")}  # of the interpreter alone
    assert listed == there, "a file of tests is left out, or gone"


def test_the_program_runs_chosen_steps_and_refuses_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_session", str(tmp_path), "--only", "bench-*", "--list"])
    assert main() == 0
    assert "bench-kernels" in capsys.readouterr().out
    assert not os.listdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gpu_session", str(tmp_path), "--only", "nothing"])
    with pytest.raises(SystemExit):
        main()
    assert "no step is named 'nothing'" in capsys.readouterr().err

"""A session of steps keeps what it has, whatever its steps do."""

import json
import os
import sys
import time
from pathlib import Path

import pytest

from bench.gpu_session.__main__ import main
from bench.gpu_session.running import RESULTS, SUMMARY, Step, first_error, run_steps
from bench.gpu_session.steps import gpu_steps

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
    there.remove("tests/triton/test_captured_steps.py")  # it watches the interpreter, so a GPU would skip it
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

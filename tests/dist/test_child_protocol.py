"""Gateway, scheduler and workers as their parent sees them: all follow the same protocol."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf import json_format

from childproc.edge import EXIT_PARENT_DIED
from childproc.events import EXIT_FAILED
from echelon import __version__
from echelon.pb.process_pb2 import ProcessEvent

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "models" / "demo-target"
MODULES = ["gateway", "scheduler", "workers"]
NOBODY = "127.0.0.1:1"
LIMIT_S = 60.0

# With these specs each process waits: for a scheduler, for a target, for the other rank.
WAITING = {
    "gateway": {
        "server": {"host": "127.0.0.1"},
        "modelDir": str(DEMO),
        "schedulerAddresses": [NOBODY],
        "maxModelLen": 64,
    },
    "scheduler": {
        "host": "127.0.0.1",
        "tokenizerDir": str(DEMO),
        "modelName": "demo",
        "target": {"address": NOBODY},
        "scheduler": {"maxNumSeqs": 8, "maxNumBatchedTokens": 64, "maxModelLen": 64, "maxQueue": 4},
        "maxRoundsInFlight": 2,
        "roundTimeoutS": LIMIT_S,
    },
    "workers": {"host": "127.0.0.1", "device": "cpu", "worldSize": 2, "engines": [{"model": str(DEMO)}]},
}

# A library might do this when standard output already belongs to the events.
NOISY = """
import os, runpy, sys
from childproc import edge
read_spec = edge.read_spec
def noisy(stdin, kind):
    print("a stray print", flush=True)
    os.write(1, b"a stray write\\n")
    return read_spec(stdin, kind)
edge.read_spec = noisy
runpy.run_module(sys.argv[1], run_name="__main__", alter_sys=True)
"""

pytestmark = pytest.mark.parametrize("module", MODULES)


def run(module: str, spec: object, *, code: str | None = None) -> "subprocess.CompletedProcess[str]":
    """Runs the process with one line on standard input, which then ends."""
    command = [sys.executable, "-m", module] if code is None else [sys.executable, "-c", code, module]
    line = json.dumps(spec) + "\n"
    return subprocess.run(command, cwd=ROOT, input=line, capture_output=True, text=True, timeout=LIMIT_S)


def events_of(done: "subprocess.CompletedProcess[str]") -> list[ProcessEvent]:
    """All lines of standard output; each must be an event."""
    return [json_format.Parse(line, ProcessEvent()) for line in done.stdout.splitlines()]


def test_stray_prints_do_not_reach_the_events(module: str) -> None:
    done = run(module, {"name": "noisy", "version": "0.0.1"}, code=NOISY)
    (event,) = events_of(done)
    assert event.failed.error
    assert "a stray print\na stray write\n" in done.stderr


def test_another_version_is_refused_with_one_message_even_if_its_spec_has_other_fields(module: str) -> None:
    done = run(module, {"version": "0.0.1", "fieldOfThatVersion": 1})
    (event,) = events_of(done)
    assert event.failed.error == (
        f"version: the controller runs Echelon 0.0.1, this process {__version__}; install one version everywhere"
    )
    assert done.returncode == EXIT_FAILED


@pytest.mark.parametrize("spec", [{"version": __version__, "noSuchField": 1}, ["no object"], 1])
def test_an_invalid_spec_is_reported_as_the_last_event(module: str, spec: object) -> None:
    done = run(module, spec)
    (event,) = events_of(done)
    assert event.failed.error.startswith("standard input must start with a ")
    assert "Traceback" in event.failed.detail
    assert done.returncode == EXIT_FAILED


def test_a_process_whose_parent_dies_exits_with_status_3(module: str) -> None:
    done = run(module, {"name": f"test-{module}", "version": __version__, **WAITING[module]})
    assert done.returncode == EXIT_PARENT_DIED
    assert not any(event.HasField("failed") for event in events_of(done))
    assert f"W test-{module} childproc.edge: standard input ended" in done.stderr

"""Really deploys: `echelon up`, two short completions and a short conversation, `echelon down`; nothing may be left."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import yaml

from cluster.private_ray import start_private_ray, stop_private_ray
from echelon import Client
from echelon.errors import EchelonError, InvalidRequestError
from tests.helpers.folder_oracle import Kind, Outcome

_ROOT = Path(__file__).parents[2]
_UP_LIMIT_S = 150.0
_DOWN_LIMIT_S = 60.0
_ANSWER_LIMIT_S = 60.0
_GONE_LIMIT_S = 20.0
# Whatever a process refuses, the plan should have. (It cannot know what this machine's products are like.)
_OF_A_PROCESS = re.compile(r"error: (target|draft|scheduler|gateway)-(?!.*batch_invariant: )")
_OURS = ("-m workers", "-m scheduler", "-m gateway")


@dataclass(frozen=True, slots=True)
class _Ended:
    """How a command ended; `code` is None if it had to be killed."""

    code: int | None
    out: str
    err: str


class Lane:
    """Deployments one after the other, most on one Ray; those that are told to start a Ray of their own."""

    def __init__(self, folder: Path) -> None:
        self._state_dir = folder / "state"
        self._ray = start_private_ray(folder / "ray.log")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        stop_private_ray(self._ray, grace_s=5.0)

    def deploy(self, file: Path, *, own_ray: bool) -> Outcome:
        """REFUSED: `up` says why it starts nothing. FAULT: a traceback, a hang, a process that refuses what it is
        told, a request that fails although it is right, or a process that is left."""
        _give_free_ports(file)
        address = [] if own_ray else ["--ray-address", self._ray.address]
        ended = self._echelon("up", str(file), "--json", *address, limit_s=_UP_LIMIT_S)
        outcome = _use(json.loads(ended.out)) if ended.code == 0 else _judge(ended)
        for name in [path.parent.name for path in self._state_dir.glob("*/record.json")]:
            down = self._echelon("down", name, limit_s=_DOWN_LIMIT_S)
            if down.code != 0 or ended.code != 0:
                outcome = _with_fault(
                    outcome, f"`up` exits with {ended.code}, then `down` with {down.code}: {down.err}"
                )
        if left := self._what_is_left():
            outcome = _with_fault(outcome, f"processes are left: {left}")
        return outcome

    def _echelon(self, *arguments: str, limit_s: float) -> _Ended:
        process = subprocess.Popen(
            [sys.executable, "-m", "echelon.cli.app", *arguments],
            cwd=_ROOT,
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            out, err = process.communicate(timeout=limit_s)
            return _Ended(process.returncode, out, err)
        except subprocess.TimeoutExpired:
            process.kill()
            return _Ended(None, *process.communicate())

    def _environment(self) -> dict[str, str]:
        """What names a Ray of `start_private_ray` to those who did not start it, and the state of this lane."""
        return {
            **os.environ,
            "ECHELON_STATE_DIR": str(self._state_dir),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self._ray.token,
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        }

    def _what_is_left(self) -> list[str]:
        """Command lines of what still runs after some time; it is killed."""
        deadline = time.monotonic() + _GONE_LIMIT_S
        while (left := self._processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return list(left.values())

    def _processes(self) -> dict[int, str]:
        """Those that `up` has started itself or through our Ray."""
        mine = f"ECHELON_STATE_DIR={self._state_dir}".encode()
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                variables = (folder / "environ").read_bytes().split(b"\0")
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                in_our_ray = any(self._ray.token.encode() in variable for variable in variables)
                if mine in variables or (in_our_ray and any(words in command for words in _OURS)):
                    found[int(folder.name)] = command
        return found


def _give_free_ports(file: Path) -> None:
    """For each that the file does not name: other deployments may run on this machine."""
    content = yaml.safe_load(file.read_text())
    server = content.get("server") or {}
    for key in {"grpc_port", "http_port"} - server.keys():
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            server[key] = probe.getsockname()[1]
    content["server"] = server
    file.write_text(yaml.safe_dump(content, sort_keys=False))


def _judge(up: _Ended) -> Outcome:
    """Of an `up` that does not serve."""
    if up.code is None:
        return Outcome(Kind.FAULT, f"`up` took more than {_UP_LIMIT_S:g} s: {up.err}")
    if "Traceback" in up.err or "error:" not in up.err:
        return Outcome(Kind.FAULT, f"`up` exits with {up.code}: {up.err}")
    said = up.err[up.err.rindex("error:") :].strip()
    return Outcome(Kind.FAULT if _OF_A_PROCESS.match(said) else Kind.REFUSED, said)


def _use(status: dict[str, Any]) -> Outcome:
    """What becomes of requests that are right, if the model can take them."""
    said = []
    try:
        with Client(status["endpoint"]) as client:
            options: Any = {"max_tokens": 4, "timeout_s": _ANSWER_LIMIT_S}
            for prompt in ("abc", [4, 5], [{"role": "user", "content": "abc"}]):
                try:
                    said.append(f"{client.generate(prompt, **options).token_ids}")
                except InvalidRequestError as err:
                    said.append(err.message)
    except EchelonError as err:
        return Outcome(Kind.FAULT, f"a request fails: {err}")
    return Outcome(Kind.SERVED, "; ".join(said))


def _with_fault(outcome: Outcome, text: str) -> Outcome:
    return replace(outcome, kind=Kind.FAULT, text="\n".join(filter(None, [outcome.text, text])))

"""A Ray of our own, for machines without one: started for a deployment, stopped with it, seen by nobody else.

It listens on 127.0.0.1 only, and has its own ports, its own session and its own folder, which only its owner can open.
Every process of it carries a token in its environment, so that stopping it ends these processes and no other Ray on the
machine (`ray stop` would end them all).
"""

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import StartError
from cluster.processes.child import REPOSITORY

logger = logging.getLogger(__name__)

_TOKEN_VARIABLE = "ECHELON_PRIVATE_RAY"
_SILENCE_S = 60.0  # in which a Ray that starts writes nothing into its folder: it hangs
_START_TIMEOUT_S = 300.0  # however much it writes
_POLL_S = 0.05
_CONNECT_TIMEOUT_S = 5.0  # not measured
_FAILED_GRACE_S = 10.0  # for a Ray that did not come up to end its processes in order; not measured
_TAIL_LINES = 30  # of its log, shown with the error
_OBJECT_STORE_BYTES = 100 << 20  # nothing of ours goes through it


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivateRay:
    address: str  # host:port of its GCS
    pid: int  # of `ray start --block`
    token: str
    temp_dir: str  # of mode 0700


def start_private_ray(log_path: Path) -> PrivateRay:
    """Start a head node on the loopback address and return when it answers. Raises StartError with Ray's own words."""
    token = uuid.uuid4().hex
    # Short and in /tmp, because Ray puts sockets below it and their paths may have 107 characters. Ray makes the
    # folder that it is given accessible to everybody, so it is put into a folder that only the owner can open.
    temp_dir = Path(tempfile.mkdtemp(prefix="ech-", dir="/tmp"))
    ray_dir = temp_dir / "ray"
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            _command(ray_dir),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=_environment(token),
            start_new_session=True,
        )
    try:
        address = _wait_for_address(process, ray_dir / "ray_current_cluster", log_path)
    except BaseException:
        _end(process.pid, token, temp_dir, grace_s=_FAILED_GRACE_S)
        raise
    return PrivateRay(address=address, pid=process.pid, token=token, temp_dir=str(temp_dir))


def stop_private_ray(private: PrivateRay, *, grace_s: float) -> None:
    """End its processes, whatever state they are in, and remove its folder. Idempotent."""
    _end(private.pid, private.token, Path(private.temp_dir), grace_s=grace_s)


def is_listening(address: str) -> bool:
    """Whether something accepts connections at host:port."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT_S):
            return True
    except (OSError, ValueError):
        return False


def processes_with(token: str) -> list[int]:
    """Ids of processes with the token, except this one; none on systems without /proc (macOS)."""
    wanted = f"{_TOKEN_VARIABLE}={token}".encode()
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = environ.read_bytes().split(b"\0")
        except OSError:  # another user's, or gone since
            continue
        if wanted in variables and int(environ.parent.name) != os.getpid():
            found.append(int(environ.parent.name))
    return found


def _command(ray_dir: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
        *("--port=0", "--node-ip-address=127.0.0.1", f"--temp-dir={ray_dir}"),
        *("--include-dashboard=false", "--disable-usage-stats", "--include-log-monitor=false"),
        # Ray's client server has a fixed port unless told otherwise, and takes no 0 for "any" or "none".
        *(f"--ray-client-server-port={_free_port()}", "--dashboard-agent-listen-port=0"),
        "--no-monitor",  # of the autoscaler: it has metrics at a fixed port, for everybody
        f"--object-store-memory={_OBJECT_STORE_BYTES}",
    ]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _environment(token: str) -> dict[str, str]:
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    inherited = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "RAY_TMPDIR")}
    return {
        **inherited,
        _TOKEN_VARIABLE: token,
        # Ray's name for a cluster on this machine alone. Ray then keeps 127.0.0.1 as its address, which it would
        # otherwise replace by the machine's outer one, and listens on loopback only.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        # Ray runs the code of anyone who connects, unless it asks for a token.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "PYTHONPATH": os.pathsep.join(paths),
    }


def _wait_for_address(process: subprocess.Popen[bytes], address_file: Path, log_path: Path) -> str:
    """Ray writes its address into the temp dir once its GCS answers."""
    began_s = news_s = time.monotonic()
    written = 0
    while time.monotonic() < min(news_s + _SILENCE_S, began_s + _START_TIMEOUT_S):
        if process.poll() is not None:
            raise StartError(f"Ray ended with exit status {process.returncode}", _tail(log_path))
        if address_file.is_file() and (address := address_file.read_text().strip()):
            return address
        before, written = written, _bytes_in(address_file.parent)
        if written != before:
            news_s = time.monotonic()
        time.sleep(_POLL_S)
    waited_s, silent_s = time.monotonic() - began_s, time.monotonic() - news_s
    raise StartError(
        f"Ray did not come up within {waited_s:.0f} s, and has written nothing for the last {silent_s:.0f} s; "
        f"if this machine is busy, try again; its log: {log_path}",
        _tail(log_path),
    )


def _bytes_in(folder: Path) -> int:
    """Of all files that are there now; Ray makes and removes some while one looks."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += (Path(parent) / name).lstat().st_size
    return total


def _tail(log_path: Path) -> str:
    return "\n".join(log_path.read_text(errors="replace").splitlines()[-_TAIL_LINES:])


def _end(pid: int, token: str, temp_dir: Path, *, grace_s: float) -> None:
    ours = processes_with(token)
    # `ray start --block` ends its node's processes in order; where it is gone, each is told.
    for ray_pid in [pid] if pid in ours or not Path("/proc").is_dir() else ours:
        _signal(ray_pid, signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while (ours := processes_with(token)) and time.monotonic() < deadline:
        _reap(pid)
        time.sleep(_POLL_S)
    while ours := processes_with(token):
        for left in ours:
            logger.info("process %s of the private Ray did not end in %s s; killing it", left, grace_s)
            _signal(left, signal.SIGKILL)
        _reap(pid)
        time.sleep(_POLL_S)
    _reap(pid)
    shutil.rmtree(temp_dir, ignore_errors=True)


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        logger.debug("process %s has ended by itself", pid)


def _reap(pid: int) -> None:
    """Collect the exit status where the Ray is our child; `down` usually runs in another process than `up`."""
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return

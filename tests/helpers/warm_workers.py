"""Starts workers as forks of one process that has imported torch already.

Importing it takes a core for 2.5 s, and was half of what the tests of processes cost. Everything else is as in a fresh
process: its own session, environment, standard streams, signals and exit status. The one difference is the thread pool
of OpenMP, which has the size and the manners that the tests' own environment gives it. A worker that needs another
environment when libraries are imported is a fresh process.
"""

import faulthandler
import gc
import json
import os
import runpy
import select
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NoReturn

import pytest

_ROOT = Path(__file__).parents[2]
_MODULE = "workers"
_PRELOADED = "workers.process.worker"
_MAX_ORDER_BYTES = 1 << 20
_MAX_FDS = 1 << 16
_READ_ON_IMPORT = ("TRITON_INTERPRET",)
_STATUS = struct.Struct("i")
_real_popen = subprocess.Popen


class WarmWorkers:
    """The process that is forked, started when the first worker is, and ended with this one."""

    def __init__(self) -> None:
        self._template: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._orders, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def fork(self, order: dict[str, Any], fds: list[int]) -> int:
        """Returns the pid. fds: standard input, output and error, and where the exit status shall be written."""
        with self._lock:
            if self._template is None:
                command = [sys.executable, "-m", __name__, str(self._theirs.fileno())]
                self._template = _real_popen(
                    command, cwd=_ROOT, stdin=subprocess.DEVNULL, stdout=2, pass_fds=[self._theirs.fileno()]
                )
                self._theirs.close()
            socket.send_fds(self._orders, [json.dumps(order).encode()], fds)
            pid: int
            (pid,) = _STATUS.unpack(self._orders.recv(_STATUS.size))
        return pid

    def close(self) -> None:
        self._orders.close()
        self._theirs.close()
        if self._template is not None:
            self._template.wait()


class WarmWorker:
    """What the product and the tests use of `subprocess.Popen`, for a fork."""

    def __init__(self, workers: WarmWorkers, args: list[str], options: dict[str, Any]) -> None:
        self.args = args
        self.returncode: int | None = None
        self._lock = threading.Lock()
        stdin, stdin_end = os.pipe()
        stdout_end, stdout = os.pipe()
        self._status, status = os.pipe()
        order = {
            "env": dict(options.get("env") or os.environ),
            "cwd": str(options.get("cwd") or os.getcwd()),
            "new_session": bool(options.get("start_new_session")),
        }
        self.pid = workers.fork(order, [stdin, stdout, options["stderr"].fileno(), status])
        for fd in (stdin, stdout, status):
            os.close(fd)
        text = bool(options.get("text"))
        self.stdin: IO[Any] = os.fdopen(stdin_end, "w" if text else "wb")
        self.stdout: IO[Any] = os.fdopen(stdout_end, "r" if text else "rb")

    def poll(self) -> int | None:
        return self._wait(0)

    def wait(self, timeout: float | None = None) -> int:
        status = self._wait(timeout)
        if status is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(self.args, timeout)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):  # it has ended, and its status is on the way
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _wait(self, timeout: float | None) -> int | None:
        """Several threads may wait: the first reads the status."""
        if self.returncode is None and select.select([self._status], [], [], timeout)[0]:
            with self._lock:
                if self.returncode is None:
                    (self.returncode,) = _STATUS.unpack(os.read(self._status, _STATUS.size))
        return self.returncode

    def __del__(self) -> None:
        os.close(self._status)


@contextmanager
def warm_workers() -> Iterator[None]:
    """Within the block, `python -m workers` is a fork."""
    workers = WarmWorkers()
    imported_with = {name: os.environ.get(name) for name in _READ_ON_IMPORT}

    def can_fork(args: Any, options: dict[str, Any]) -> bool:
        environment = options.get("env") or os.environ
        has_log = hasattr(options.get("stderr"), "fileno")  # what a WarmWorker can do
        is_worker = args == [sys.executable, "-m", _MODULE]
        return is_worker and has_log and all(environment.get(name) == was for name, was in imported_with.items())

    class Popen(_real_popen):  # type: ignore[misc, valid-type]
        def __new__(cls, args: Any, **options: Any) -> Any:
            if can_fork(args, options):
                return WarmWorker(workers, args, options)
            return super().__new__(cls)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", Popen)
        yield
    workers.close()


def _serve(orders: socket.socket) -> None:
    """Fork for each order; tell of each fork how it ended. Returns when nobody can order any more."""
    running: dict[int, tuple[int, int]] = {}  # by pidfd: pid, and where to write its status
    with selectors.DefaultSelector() as selector:
        selector.register(orders, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fd in running:
                    selector.unregister(key.fd)
                    _tell_end(key.fd, *running.pop(key.fd))
                    continue
                order, fds, _, _ = socket.recv_fds(orders, _MAX_ORDER_BYTES, 4)
                if not order:
                    return
                pid = os.fork()
                if pid == 0:
                    _become_worker(json.loads(order), fds)
                for fd in fds[:3]:
                    os.close(fd)
                pidfd = os.pidfd_open(pid)
                running[pidfd] = (pid, fds[3])
                selector.register(pidfd, selectors.EVENT_READ)
                orders.send(_STATUS.pack(pid))


def _tell_end(pidfd: int, pid: int, status_fd: int) -> None:
    _, status = os.waitpid(pid, 0)
    os.close(pidfd)
    os.write(status_fd, _STATUS.pack(os.waitstatus_to_exitcode(status)))
    os.close(status_fd)


def _become_worker(order: dict[str, Any], fds: list[int]) -> NoReturn:
    try:
        if order["new_session"]:
            os.setsid()
        for number, fd in enumerate(fds[:3]):
            os.dup2(fd, number)
        os.closerange(3, _MAX_FDS)
        os.environ.clear()
        os.environ.update(order["env"])
        os.chdir(order["cwd"])
        if os.environ.get("PYTHONFAULTHANDLER"):
            faulthandler.enable()
        sys.argv = [_MODULE]
        runpy.run_module(_MODULE, run_name="__main__", alter_sys=True)
        os._exit(0)
    except BaseException:  # noqa: BLE001  # whatever it is must not go on in the copy of `_serve`
        traceback.print_exc()
        os._exit(1)


if __name__ == "__main__":
    __import__(_PRELOADED)
    gc.freeze()  # a collection in a fork would copy all of it
    _serve(socket.socket(fileno=int(sys.argv[1])))

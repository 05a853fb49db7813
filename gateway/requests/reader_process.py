"""The gateway's end of a process that reads requests (`gateway/requests/child.py`)."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from google.protobuf import json_format

from echelon.pb.process_pb2 import GatewaySpec
from gateway.requests import frames
from gateway.requests.forms import Form

_REPOSITORY = Path(__file__).resolve().parents[2]
_LOAD_LIMIT_S = 120.0
MEMORY_BYTES = 1 << 30  # in addition to what the process has after loading


class ReaderLostError(Exception):
    """The process has ended, or does not answer. The message says which."""


class ReaderProcess:
    """Answers one request at a time. After a ReaderLostError there is nothing left to do but to `end` it."""

    def __init__(self, process: "subprocess.Popen[bytes]", link: socket.socket) -> None:
        self._process = process
        self._link = link

    @classmethod
    async def start(cls, spec: GatewaySpec, *, cpu_limit_s: float, niceness: int) -> "ReaderProcess":
        """Returns once it has loaded what it needs. Raises ReaderLostError."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs:
            process = await asyncio.to_thread(_spawn, spec, theirs.fileno(), f"{cpu_limit_s:g}", str(niceness))
        reader = cls(process, ours)
        try:
            loaded = await reader._limited(frames.receive_async(ours), _LOAD_LIMIT_S)
        except BaseException:
            await reader.end()
            raise
        assert loaded == frames.LOADED, "the first message says that it has loaded"
        return reader

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    async def ask(self, form: Form, request: bytes, *, limit_s: float) -> bytes:
        """The bytes of a ReadAnswer. Raises ReaderLostError."""
        return await self._limited(self._exchange(form, request), limit_s)

    async def end(self) -> None:
        """Kills it, whatever it does."""
        self._process.kill()
        self._link.close()
        await asyncio.to_thread(self._process.wait)

    async def _exchange(self, form: Form, request: bytes) -> bytes:
        await frames.send_async(self._link, form.value)
        await frames.send_async(self._link, request)
        return await frames.receive_async(self._link)

    async def _limited(self, answer: Coroutine[Any, Any, bytes], limit_s: float) -> bytes:
        try:
            return await asyncio.wait_for(answer, limit_s)
        except TimeoutError as err:
            raise ReaderLostError(f"its process did not answer within {limit_s:g} s") from err
        except frames.LinkLostError as err:
            status = await asyncio.to_thread(self._process.wait)
            raise ReaderLostError(_end_text(status)) from err


def _end_text(status: int) -> str:
    """Libraries that get no memory abort, and the kernel kills."""
    if status >= 0:
        return f"its process ended with status {status}"
    name = signal.Signals(-status).name
    return f"its process ended by {name}, as it does when it needs more than {MEMORY_BYTES >> 20} MiB of memory"


def _spawn(spec: GatewaySpec, link: int, *arguments: str) -> "subprocess.Popen[bytes]":
    """A new interpreter, because a copy of this process would have only one of gRPC's threads."""
    paths = [str(_REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        [sys.executable, "-m", "gateway.requests.child", str(link), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,  # its events: what happens to it is seen on the socket
        pass_fds=[link],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TOKENIZERS_PARALLELISM": "false"},
    )
    assert process.stdin is not None, "stdin is a pipe"
    process.stdin.write(json_format.MessageToJson(spec, indent=None).encode() + b"\n")
    process.stdin.flush()
    return process

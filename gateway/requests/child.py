"""`python -m gateway.requests.child SOCKET CPU_SECONDS NICENESS`: reads requests for a gateway, one after the other.

Chat templates and tokenisers are code of others that runs on texts of others, so a request may take for ever, all
memory or the whole process. Here that costs nobody else anything: `gateway/requests/lane.py` gives the process up and
starts another. The spec comes on standard input, as for every child process.
"""

import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import grpc

from childproc import edge
from echelon.pb.process_pb2 import GatewaySpec
from echelon.pb.reading_pb2 import ReadAnswer
from echelon.pb.scheduler_pb2 import RequestError
from gateway.requests import frames
from gateway.requests.forms import Form, read_request
from gateway.requests.reader_process import MEMORY_BYTES
from gateway.requests.refusal import READ_LESS, Refusal, invalid
from gateway.requests.validation import RequestValidator, build_validator

logger = logging.getLogger(__name__)


def main() -> None:
    link, cpu_limit_s, niceness = socket.socket(fileno=int(sys.argv[1])), float(sys.argv[2]), int(sys.argv[3])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the gateway too, which ends us
    os.nice(niceness)
    edge.run(GatewaySpec, lambda spec, events: _serve(link, build_validator(spec), cpu_limit_s))


def _serve(link: socket.socket, validator: RequestValidator, cpu_limit_s: float) -> None:
    _limit_memory()
    frames.send(link, frames.LOADED)
    while True:
        form = Form(frames.receive(link))
        frames.send(link, _answer(form, frames.receive(link), validator, cpu_limit_s))


def _answer(form: Form, data: bytes, validator: RequestValidator, cpu_limit_s: float) -> bytes:
    try:
        with _limited_time(cpu_limit_s):
            return ReadAnswer(reading=read_request(form, data, validator)).SerializeToString()
    except Refusal as err:
        refusal = err
    except TimeoutError as err:
        refusal = invalid(f"request: {err}")
    except MemoryError:
        refusal = invalid(f"request: reading it takes more than {MEMORY_BYTES >> 20} MiB; {READ_LESS}")
    except Exception as err:
        logger.exception("a request could not be read")
        refusal = Refusal(grpc.StatusCode.INTERNAL, f"the request could not be read: {type(err).__name__}: {err}")
    error = RequestError(code=refusal.code.value[0], message=refusal.message)
    return ReadAnswer(refusal=error).SerializeToString()


@contextmanager
def _limited_time(cpu_limit_s: float) -> Iterator[None]:
    """TimeoutError in the body once this process has computed for so long; a call into C is not interrupted."""

    def give_up(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"reading it takes more than {cpu_limit_s:g} s of computing; {READ_LESS}")

    signal.signal(signal.SIGPROF, give_up)
    signal.setitimer(signal.ITIMER_PROF, cpu_limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    statm = Path("/proc/self/statm")
    if statm.exists():  # Linux; elsewhere the limit of address space is not kept anyway
        in_use = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (in_use + MEMORY_BYTES,) * 2)


if __name__ == "__main__":
    main()

"""The edge of a child process: where it begins, and the few ways in which it ends."""

import asyncio
import logging
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable
from io import BufferedReader, FileIO
from types import FrameType
from typing import NoReturn

from childproc.events import EventWriter
from childproc.spec import S, read_spec
from childproc.updates import Updates

logger = logging.getLogger(__name__)

EXIT_PARENT_DIED = 3


def run(kind: type[S], serve: Callable[[S, EventWriter], None], updates: Updates | None = None) -> NoReturn:
    """Runs `serve` with the spec that standard input holds, then ends the process.

    Args:
        kind: the message that the spec is.
        serve: returns when the process has served. A ValueError that it raises is written for the user and reported
            as it stands; any other exception is reported with its type.
        updates: gets what the parent says later. None: it says nothing to such a process.
    """
    events = EventWriter.on_stdout()
    signal.signal(signal.SIGTERM, _exit_at_once)
    # Not sys.stdin: a daemon thread that holds its lock aborts the interpreter's own shutdown.
    stdin = BufferedReader(FileIO(sys.stdin.fileno(), closefd=False))
    if not select.select([stdin], [], [], 0)[0]:
        events.waiting()
    if not stdin.peek(1):
        os._exit(EXIT_PARENT_DIED)  # it was a spare that nobody has used
    try:
        spec = read_spec(stdin, kind)
        _configure_logging(spec.name)
        _exit_with_parent(stdin, updates or Updates())
        serve(spec, events)
    except ValueError as err:
        events.fail(str(err))
    except Exception as err:
        logger.exception("this process failed")
        events.fail(f"{type(err).__name__}: {err}")
    sys.stderr.flush()
    os._exit(0)  # not sys.exit: threads of gloo and gRPC have nothing left to do and must not delay the end


def stop_signal() -> asyncio.Event:
    """An event of the running loop that SIGTERM and SIGINT set; they no longer end the process by themselves."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    return stopped


def on_terminate(act: Callable[[], None]) -> None:
    """Call `act`, on a thread of its own, when SIGTERM comes. From the main thread.

    A handler runs only when the main thread runs Python again. A signal that comes just before that thread waits for a
    lock, or that another thread receives, would have to wait for ever.
    """
    receiving, sending = socket.socketpair()
    sending.setblocking(False)
    signal.set_wakeup_fd(sending.detach(), warn_on_full_buffer=False)  # written to at once, by whichever thread
    signal.signal(signal.SIGTERM, lambda signum, frame: None)

    def watch() -> None:
        while signal.SIGTERM not in receiving.recv(64):
            pass
        act()

    threading.Thread(target=watch, name="terminate", daemon=True).start()


def _exit_at_once(signum: int, frame: FrameType | None) -> None:
    os._exit(0)


def _exit_with_parent(stdin: "BufferedReader[FileIO]", updates: Updates) -> None:
    """From now on, the end of standard input ends this process at once: nothing may outlive its parent.

    `stdin`: that which the spec was read from; it may have read the first updates already.
    """

    def watch() -> None:
        while data := stdin.read1(4096):
            updates.feed(data)
        logger.warning("standard input ended: the parent died")
        os._exit(EXIT_PARENT_DIED)

    threading.Thread(target=watch, name="parent watch", daemon=True).start()


def _configure_logging(name: str) -> None:
    """Logs go to standard error, with the name of the process."""
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format=f"%(asctime)s %(levelname).1s {name} %(name)s: %(message)s"
    )

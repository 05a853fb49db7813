"""SIGTERM ends a worker also while its main thread waits for a lock, and whichever thread receives the signal."""

import subprocess
import sys

PROGRAM = """
import os, signal, threading
from childproc import edge

edge.on_terminate(lambda: os._exit(7))
threading.Timer(0.1, signal.raise_signal, [signal.SIGTERM]).start()  # received by the timer's thread
lock = threading.Lock()
lock.acquire()
lock.acquire()
"""


def test_the_signal_acts_while_the_main_thread_waits() -> None:
    assert subprocess.run([sys.executable, "-c", PROGRAM], timeout=60, check=False).returncode == 7

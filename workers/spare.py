"""`python -m workers.spare`: a rank that is started before it is needed, and waits for its spec.

It imports on a thread of low priority, so that this slows nothing that serves. A process could not take its own
priority back; a thread just ends.
"""

import contextlib
import os
import select
import sys
import threading

_LOWEST = 19
_LOOK_S = 0.2


def _import() -> None:
    with contextlib.suppress(OSError):  # only Linux has priorities of threads
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST)
    import workers.process.worker  # noqa: F401

    if not os.environ.get("CUDA_VISIBLE_DEVICES"):
        _load_kernels()


def _load_kernels() -> None:
    """Those of CPUs."""
    from kernels.native.library import CompileError, load_library

    with contextlib.suppress(CompileError):  # whoever needs them says so
        load_library()


def _has_parent() -> bool:
    """Whether somebody still holds the other end of standard input."""
    watched = select.poll()
    watched.register(sys.stdin.fileno(), select.POLLHUP)
    return not watched.poll(0)


def main() -> None:
    importing = threading.Thread(target=_import, name="imports", daemon=True)
    importing.start()
    while importing.is_alive():
        importing.join(_LOOK_S)
        if not _has_parent():
            os._exit(0)
    from workers.process.worker import main as work

    work()


if __name__ == "__main__":
    main()

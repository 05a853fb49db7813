"""Replicas come and go with the load."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from cluster.errors import StartError
from cluster.processes.scaling import Scaling

logger = logging.getLogger(__name__)

_INTERVAL_S = 1.0
_RETRY_S = 30.0  # after a change that failed: devices may have become free; not measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    num_replicas: int  # that serve
    num_requests: int | None  # that wait or run; None: not known


class Scaler:
    """Looks at the load every second, from a thread, until `stop`. One change is made at a time, in a thread of its
    own, because replicas take long to start; those that are not needed any more by then are given up."""

    def __init__(
        self,
        scaling: Scaling,
        *,
        look: Callable[[], Load],
        change: Callable[[int], None],
        give_up: Callable[[], None],
        note: Callable[[str], None],
    ) -> None:
        """
        Args:
            look: the load now.
            change: makes it so many replicas and blocks meanwhile; raises StartError.
            give_up: ends a `change` that adds replicas, before they serve.
            note: tells people what happens.
        """
        self._scaling = scaling
        self._look, self._change, self._give_up, self._note = look, change, give_up, note
        self._changing: threading.Thread | None = None
        self._aim = 0  # of the change under way
        self._not_before_s = 0.0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="scaler", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Return when no change is under way; replicas that do not serve yet are given up."""
        self._stopped.set()
        self._thread.join()
        while self._changing is not None and self._changing.is_alive():
            self._give_up()
            self._changing.join(_INTERVAL_S)

    def _watch(self) -> None:
        while not self._stopped.wait(_INTERVAL_S):
            try:
                self._follow(self._look(), time.monotonic())
            except Exception:  # the edge of the thread: without it, replicas would follow the load no more
                logger.exception("the load could not be followed; it is looked at again")

    def _follow(self, load: Load, now: float) -> None:
        is_changing = self._changing is not None and self._changing.is_alive()
        if load.num_requests is None:
            return
        wanted = self._scaling.wanted(self._aim if is_changing else load.num_replicas, load.num_requests, now)
        if is_changing:
            if wanted <= load.num_replicas < self._aim:
                self._give_up()
        elif wanted != load.num_replicas and now >= self._not_before_s:
            self._note(f"{load.num_replicas} -> {wanted} replicas, for {load.num_requests} requests")
            self._aim = wanted
            self._changing = threading.Thread(target=self._make, args=(wanted,), name="scale", daemon=True)
            self._changing.start()

    def _make(self, number: int) -> None:
        try:
            self._change(number)
        except StartError as err:
            self._fail(number, str(err))
        except Exception as err:  # the edge of the thread: without a word, it would be tried every second
            logger.exception("the change to %d replicas broke", number)
            self._fail(number, repr(err))
        else:
            self._note(f"there are {number} replicas")

    def _fail(self, number: int, error: str) -> None:
        self._not_before_s = time.monotonic() + _RETRY_S
        self._note(f"there are no {number} replicas: {error}")

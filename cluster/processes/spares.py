"""Spares: processes that are started before they are needed.

Each has imported what takes long, and waits for its spec.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from google.protobuf.message import Message

from cluster.errors import StartError
from cluster.planning.plan import Bundle
from cluster.processes.child import ChildProcess
from echelon.pb.process_pb2 import ProcessEvent, SpareNews

logger = logging.getLogger(__name__)

_LOOK_S = 0.5
# Neither is measured.
_FIRST_DELAY_S, _MOST_DELAY_S = 2.0, 300.0
_STABLE_S = 60.0

Number = int | Literal["auto"]


def with_spares(bundles: Iterable[Bundle], number: Number) -> list[str]:
    """The ranks for each of which a spare is kept: `number` on each node, targets first, since a lost draft holds up no
    stream. `auto`: all target ranks, because a group that has lost one is started again as a whole."""
    ordered = sorted(bundles, key=lambda bundle: bundle.group != "target")
    if number == "auto":
        return [bundle.name for bundle in ordered if bundle.group == "target"]
    chosen, num_on = [], Counter[str]()
    for bundle in ordered:
        num_on[bundle.node_id] += 1
        if num_on[bundle.node_id] <= number:
            chosen.append(bundle.name)
    return chosen


def delay_s(num_ended: int) -> float:
    """How long to wait before another spare is started, after so many in a row that nobody has used have ended."""
    return min(_FIRST_DELAY_S * 2.0 ** min(num_ended - 1, 32), _MOST_DELAY_S)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """All that decides over a process before it has its spec."""

    module: str
    name: str
    log_dir: Path
    spare_module: str = ""  # the same process, imported at low priority; empty: no spare can be kept
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ahead:
    """A process without a spec."""

    child: ChildProcess
    recipe: Recipe
    is_spare: bool  # kept in the background; otherwise its start is under way

    def can_be(self, recipe: Recipe) -> bool:
        """A spare that is still importing at low priority would be slower than a new process."""
        return self.recipe == recipe and self.child.poll() is None and (self.child.is_waiting or not self.is_spare)


class SpareKeeper:
    """Starts the processes of one name, one after the other, and keeps the next one ready if that is wanted.

    Thread-safe. What becomes of the spare is said among the events of the process that runs.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._recipe: Recipe | None = None  # of the latest process
        self._child: ChildProcess | None = None
        self._ahead: _Ahead | None = None
        self._is_wanted = False
        self._thread: threading.Thread | None = None

    def prepare(self, recipe: Recipe) -> None:
        """`start` will follow: the process imports meanwhile, unless a spare has. Raises StartError."""
        with self._changed:
            if self._ahead is None or not self._ahead.can_be(recipe):
                self._end_ahead()
                self._ahead = _start_ahead(recipe, is_spare=False)
            self._is_wanted = False

    def start(self, recipe: Recipe, spec: Message, *, log_name: str, devices: str = "") -> ChildProcess:
        """A process with this spec; the spare, if there is one that can be it. Raises StartError.

        No other spare is kept until that is asked for again.
        """
        log_path = recipe.log_dir / log_name
        with self._changed:
            self._is_wanted = False
            ahead = self._ahead
            if ahead is not None and ahead.can_be(recipe):
                self._ahead, child = None, ahead.child
                child.begin(spec, log_path=log_path, devices=devices)
                if ahead.is_spare:
                    child.say(ProcessEvent(spare=SpareNews(used=True)))
            else:
                self._end_ahead()
                child = ChildProcess(
                    recipe.module, spec, name=recipe.name, log_path=log_path, env=recipe.env, devices=devices
                )
            self._recipe, self._child = recipe, child
            self._changed.notify_all()
        return child

    def keep(self, is_wanted: bool) -> None:
        """Whether to keep a process ready that could be the next one like the latest."""
        with self._changed:
            self._is_wanted = is_wanted and self._recipe is not None and bool(self._recipe.spare_module)
            if not self._is_wanted:
                self._end_ahead()
            elif self._thread is None:
                self._thread = threading.Thread(target=self._keep, name="spare", daemon=True)
                self._thread.start()
            else:
                self._say(_state_of(self._ahead))  # for a controller that does not know it yet
            self._changed.notify_all()

    def _keep(self) -> None:
        num_ended = 0
        with self._changed:
            while self._is_wanted:
                began_s = time.monotonic()
                if self._keep_one():
                    num_ended = 0
                    continue
                num_ended = 1 if time.monotonic() - began_s > _STABLE_S else num_ended + 1
                self._changed.wait_for(lambda: not self._is_wanted, delay_s(num_ended))
            self._thread = None

    def _keep_one(self) -> bool:
        """Until it is used or unwanted; False: it has ended by itself."""
        assert self._recipe is not None, "spares are kept of what runs"
        try:
            self._ahead = spare = self._ahead or _start_ahead(self._recipe, is_spare=True)
        except StartError as err:
            logger.warning("there is no spare: %s", err)
            return False
        told = ""
        while self._ahead is spare:
            if spare.child.poll() is not None:
                logger.warning("the spare of %s has ended: %s", self._recipe.name, spare.child.stderr_tail())
                self._end_ahead()
                return False
            if told != (told := _state_of(spare)):
                self._say(told)
            self._changed.wait(_LOOK_S)
        return True

    def _end_ahead(self) -> None:
        if self._ahead is not None:
            self._ahead.child.stop(grace_s=0.0)
            self._ahead.child.log_path.unlink(missing_ok=True)
            self._ahead = None
            self._say("")

    def _say(self, state: str) -> None:
        if self._child is not None:
            self._child.say(ProcessEvent(spare=SpareNews(state=state)))


def _start_ahead(recipe: Recipe, *, is_spare: bool) -> _Ahead:
    module = recipe.spare_module if is_spare else recipe.module
    log_path = recipe.log_dir / f"{recipe.name}.spare.log"
    child = ChildProcess(module, None, name=recipe.name, log_path=log_path, env=recipe.env)
    return _Ahead(child=child, recipe=recipe, is_spare=is_spare)


def _state_of(ahead: _Ahead | None) -> str:
    if ahead is None:
        return ""
    return "ready" if ahead.child.is_waiting else "starting"

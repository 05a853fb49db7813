"""Which nodes of the plan are lost."""

import logging
import socket
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.exceptions import RayError

logger = logging.getLogger(__name__)

_INTERVAL_S = 1.0
_CONNECT_TIMEOUT_S = 1.0
_MAX_REFUSALS = 2  # in a row: Ray itself takes some 15 s to notice that a raylet has died


class NodeWatch:
    """Looks every second, from a thread, until `stop`. A node that is lost never comes back: one that is started again
    has another id."""

    def __init__(self, used: Callable[[], Mapping[str, str]], on_lost: Callable[[Mapping[str, str]], None]) -> None:
        """
        Args:
            used: addresses of the nodes that matter, by id.
            on_lost: told why, by id, of all of them that are lost, again and again: something may just have been
                started there.
        """
        self._used, self._on_lost = used, on_lost
        self._refusals: Counter[str] = Counter()
        self._lost: dict[str, str] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="nodes", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> Mapping[str, str]:
        """Why, by node id; they are never forgotten."""
        return dict(self._lost)

    def stop(self) -> None:
        self._stopped.set()

    def _watch(self) -> None:
        while not self._stopped.wait(_INTERVAL_S):
            try:
                self._look()
            except (RayError, OSError):
                logger.exception("Ray does not say which nodes there are; it is asked again")
            except Exception:  # the edge of the thread: without it, no lost node would ever be noticed
                logger.exception("lost nodes could not be noticed; they are looked for again")

    def _look(self) -> None:
        nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
        known = {node["NodeID"]: node for node in nodes}
        used = self._used()
        for node_id, address in used.items():
            if node_id not in self._lost and self._is_lost(known.get(node_id)):
                self._lost[node_id] = f"node {node_id[:8]} ({address}) is lost"
                logger.warning("%s", self._lost[node_id])
        if lost := {node_id: why for node_id, why in self._lost.items() if node_id in used}:
            self._on_lost(lost)

    def _is_lost(self, node: Mapping[str, Any] | None) -> bool:
        if node is None or not node["Alive"]:
            return True
        node_id = node["NodeID"]
        if _refuses(node["NodeManagerAddress"], node["NodeManagerPort"]):
            self._refusals[node_id] += 1
        else:
            del self._refusals[node_id]
        return self._refusals[node_id] >= _MAX_REFUSALS


def _refuses(host: str, port: int) -> bool:
    """Whether the machine is there, but nobody listens. Anything else is for Ray to judge."""
    try:
        socket.create_connection((host, port), timeout=_CONNECT_TIMEOUT_S).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False

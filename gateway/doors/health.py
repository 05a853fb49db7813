"""grpc.health.v1: Watch streams every change, and a slow watcher holds nobody up."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
from grpc_health.v1 import health_pb2

from gateway.requests.refusal import shown

Context = grpc.aio.ServicerContext[Any, Any]

_LIVENESS = ""
READINESS = "echelon.v1.Inference"


class Health:
    """Two services: "" is SERVING while this process lives, `echelon.v1.Inference` while a request would be served.

    grpcio-health-checking's own asyncio servicer writes to a watcher under the lock that a change of status needs: a
    watcher that stops reading would freeze the health of everybody. Here a change is an event that is set and replaced.
    """

    def __init__(self) -> None:
        self._serving = {_LIVENESS: True, READINESS: False}
        self._schedulers: dict[str, bool] = {}
        self._changed = asyncio.Event()
        self._closed = False

    def set(self, service: str, serving: bool) -> None:
        if not self._closed and self._serving[service] != serving:
            self._serving[service] = serving
            self._wake_watchers()

    def note_schedulers(self, ready: dict[str, bool]) -> None:
        """By address: whether each would serve a request. The controller asks for them, as services of these names."""
        self._schedulers = dict.fromkeys(ready, False) if self._closed else ready

    def close(self) -> None:
        """NOT_SERVING for good; watchers are told and their streams end, so that a server can stop."""
        self._serving = dict.fromkeys(self._serving, False)
        self._schedulers = dict.fromkeys(self._schedulers, False)
        self._closed = True
        self._wake_watchers()

    def _wake_watchers(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _status(self, service: str) -> Any:
        response = health_pb2.HealthCheckResponse
        serving = self._serving.get(service, self._schedulers.get(service))
        if serving is None:
            return response.SERVICE_UNKNOWN
        return response.SERVING if serving else response.NOT_SERVING

    async def Check(self, request: Any, context: Context) -> Any:
        if request.service not in self._serving and request.service not in self._schedulers:
            known = ", ".join(repr(name) for name in self._serving)
            await context.abort(grpc.StatusCode.NOT_FOUND, f"service {shown(request.service)} is not one of {known}")
        return health_pb2.HealthCheckResponse(status=self._status(request.service))

    async def Watch(self, request: Any, context: Context) -> AsyncIterator[Any]:
        told = None
        while True:
            changed = self._changed  # taken before the status is read: no change falls between the two
            status, is_last = self._status(request.service), self._closed
            if status != told:
                yield health_pb2.HealthCheckResponse(status=status)
                told = status
            if is_last:
                return
            await changed.wait()

"""What a gateway tells those who watch its health."""

from typing import Any

from grpc_health.v1 import health_pb2

from gateway.doors.health import READINESS, Health

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
CONTEXT: Any = None  # used only to refuse unknown services


def request() -> Any:
    return health_pb2.HealthCheckRequest(service=READINESS)


async def test_a_watcher_that_is_slow_hears_the_end_too() -> None:
    health = Health()
    health.set(READINESS, True)
    watch = health.Watch(request(), CONTEXT)
    assert (await anext(watch)).status == SERVING
    health.close()  # while that answer is still in flight
    assert [response.status async for response in watch] == [NOT_SERVING]


async def test_closed_is_closed() -> None:
    health = Health()
    health.set(READINESS, True)
    health.close()
    health.set(READINESS, False)
    health.set(READINESS, True)  # a scheduler came back meanwhile
    assert (await health.Check(request(), CONTEXT)).status == NOT_SERVING
    assert [response.status async for response in health.Watch(request(), CONTEXT)] == [NOT_SERVING]

"""What a gateway tells those who watch its health."""

from typing import Any

from grpc_health.v1 import health_pb2

from gateway.doors.health import READINESS, Health

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
CONTEXT: Any = None  # used only to refuse unknown services


def request() -> Any:
    return health_pb2.HealthCheckRequest(service=READINESS)


async def test_a_slow_watcher_hears_the_end_too() -> None:
    health = Health()
    health.set(READINESS, True)
    watch = health.Watch(request(), CONTEXT)
    assert (await anext(watch)).status == SERVING
    health.close()  # while that answer is still in flight
    assert [response.status async for response in watch] == [NOT_SERVING]


async def test_a_closed_health_service_stays_closed() -> None:
    health = Health()
    health.set(READINESS, True)
    health.close()
    health.set(READINESS, False)
    health.set(READINESS, True)  # a scheduler came back meanwhile
    assert (await health.Check(request(), CONTEXT)).status == NOT_SERVING
    assert [response.status async for response in health.Watch(request(), CONTEXT)] == [NOT_SERVING]


async def test_the_controller_learns_whether_a_gateway_uses_a_scheduler() -> None:
    health = Health()
    asked = health_pb2.HealthCheckRequest(service="127.0.0.1:1")
    health.note_schedulers({"127.0.0.1:1": False})
    assert (await health.Check(asked, CONTEXT)).status == NOT_SERVING
    health.note_schedulers({"127.0.0.1:1": True})
    assert (await health.Check(asked, CONTEXT)).status == SERVING
    health.close()
    health.note_schedulers({"127.0.0.1:1": True})
    assert (await health.Check(asked, CONTEXT)).status == NOT_SERVING

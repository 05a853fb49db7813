"""A Ray that cannot be joined is named at once, with what to do; Ray itself would wait for minutes."""

import re
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager

import grpc
import pytest
import ray
from ray.core.generated import gcs_service_pb2

from cluster.errors import StartError
from cluster.on_ray import joining


@contextmanager
def gcs(*, version: str = ray.__version__, asks_for_token: bool = False, is_ray: bool = True) -> Iterator[str]:
    """The address of a server that answers as a GCS does. It knows one call only."""

    def check_alive(request: object, context: grpc.ServicerContext) -> gcs_service_pb2.CheckAliveReply:  # type: ignore[name-defined]
        if asks_for_token:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "token is missing")
        return gcs_service_pb2.CheckAliveReply(ray_version=version)  # type: ignore[attr-defined]

    handler = grpc.unary_unary_rpc_method_handler(
        check_alive,
        request_deserializer=gcs_service_pb2.CheckAliveRequest.FromString,  # type: ignore[attr-defined]
        response_serializer=gcs_service_pb2.CheckAliveReply.SerializeToString,  # type: ignore[attr-defined]
    )
    service = "ray.rpc.NodeInfoGcsService" if is_ray else "somebody.Else"
    with ThreadPoolExecutor(1) as pool:
        server = grpc.server(pool)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {"CheckAlive": handler}),))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield f"127.0.0.1:{port}"
        server.stop(None)


@contextmanager
def silent() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize(
    ("server", "reason"),
    [
        (silent(), "does not answer as the GCS of a Ray (Deadline Exceeded); give host:port as `ray start` prints it"),
        (gcs(is_ray=False), "does not answer as the GCS of a Ray (Method not found!); give host:port"),
        (gcs(version="2.9.3"), f"it has version 2.9.3, and here is {ray.__version__}; use the same"),
        (gcs(asks_for_token=True), "token is missing; set RAY_AUTH_MODE=token and the cluster's own RAY_AUTH_TOKEN"),
    ],
)
def test_a_ray_that_cannot_be_joined(
    server: AbstractContextManager[str], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joining, "_ANSWER_S", 0.3)
    with server as address:
        expected = re.escape(f"cannot join the Ray cluster at {address}: ") + ".*" + re.escape(reason)
        with pytest.raises(StartError, match=expected), joining.connected(address):
            pass

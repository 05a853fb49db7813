"""Joining a Ray as a driver on one of its nodes.

Ray waits for minutes for a cluster that does not answer, and ends the process if a node does not. So the cluster and
the node are asked first.
"""

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import grpc
import ray
from ray._private import ray_constants, services
from ray._private.grpc_utils import init_grpc_channel
from ray._raylet import AuthenticationTokenLoader, Config, GcsClient  # type: ignore[attr-defined]  # compiled
from ray.core.generated import gcs_service_pb2
from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub
from ray.exceptions import RayError

from cluster.errors import StartError
from cluster.on_ray.cluster import NAMESPACE
from cluster.processes.child import REPOSITORY

_ANSWER_S = 4  # for each of three questions; they take milliseconds
_CHANNEL_OPTIONS = (("grpc.enable_http_proxy", 0),)


@contextmanager
def connected(address: str, *, token: str = "") -> Iterator[None]:
    """A connection to the Ray at `address` (host:port), left open where the caller had it open before.

    `token` is that of a Ray which asks for one; otherwise Ray's own variables and files say. Raises StartError.
    """
    if ray.is_initialized():
        here = ray.get_runtime_context().gcs_address
        if here != address:
            raise StartError(f"this process is connected to the Ray at {here}, not to {address}; use another process")
        yield
        return
    restore = _sigterm_handler()
    with _authenticated(token):
        try:
            _check_cluster(address)
            _check_node(address)
            ray.init(
                address=address,
                namespace=NAMESPACE,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env=_runtime_env(),
            )
            restore()
        except (RayError, ConnectionError, RuntimeError, ValueError) as err:
            raise StartError(f"cannot join the Ray cluster at {address}: {err}") from err
        try:
            yield
        finally:
            ray.shutdown()
            restore()


def _sigterm_handler() -> Callable[[], None]:
    """What puts the handler of SIGTERM back. Ray takes it for drivers, to exit at once, and resets it at the end."""
    if threading.current_thread() is not threading.main_thread():
        return lambda: None  # Ray leaves it alone, too
    handler = signal.getsignal(signal.SIGTERM)

    def restore() -> None:
        signal.signal(signal.SIGTERM, handler)

    return restore


def _check_cluster(address: str) -> None:
    """Raises ConnectionError if no Ray of our version answers."""
    with init_grpc_channel(address, _CHANNEL_OPTIONS) as channel:
        try:
            nodes = NodeInfoGcsServiceStub(channel)  # type: ignore[no-untyped-call]
            answer = nodes.CheckAlive(gcs_service_pb2.CheckAliveRequest(), timeout=_ANSWER_S)  # type: ignore[attr-defined]
        except grpc.RpcError as err:
            raise ConnectionError(_why_no_answer(err)) from err
    if answer.ray_version != ray.__version__:
        raise ConnectionError(f"it has version {answer.ray_version}, and here is {ray.__version__}; use the same")


def _why_no_answer(error: grpc.RpcError) -> str:
    if error.code() is grpc.StatusCode.UNAUTHENTICATED:
        return f"{error.details()}; set RAY_AUTH_MODE=token and the cluster's own RAY_AUTH_TOKEN"
    return (
        f"what listens there does not answer as the GCS of a Ray ({error.details()}); give host:port as `ray start` "
        "prints it, or leave --ray-address and RAY_ADDRESS out to use a private Ray"
    )


def _check_node(address: str) -> None:
    """Raises ConnectionError unless the node that Ray will choose on this machine answers."""
    gcs = GcsClient(address=address)
    try:
        node = services.get_node_to_connect_for_driver(gcs, timeout_seconds=_ANSWER_S)
    except RuntimeError as err:
        raise ConnectionError("this machine is not a node of it; run echelon on a node, or `ray start` one") from err
    where = f"{node.node_manager_address}:{node.node_manager_port}"
    with init_grpc_channel(where, _CHANNEL_OPTIONS) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=_ANSWER_S)
        except grpc.FutureTimeoutError as err:
            raise ConnectionError(f"its node on this machine, at {where}, does not answer; restart it") from err


@contextmanager
def _authenticated(token: str) -> Iterator[None]:
    """Ray reads its token from the environment once per process. This reads it again and restores it afterwards.

    A Ray with a token is one of our own (private_ray.py) and really listens on 127.0.0.1, which Ray would replace.
    """
    if not token:
        yield
        return
    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")
    before = {name: os.environ[name] for name in names if name in os.environ}
    spans_machines = ray_constants.ENABLE_RAY_CLUSTER
    os.environ.update(zip(names, ("token", token), strict=True))
    ray_constants.ENABLE_RAY_CLUSTER = False
    _reread_token()
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)
        os.environ.update(before)
        ray_constants.ENABLE_RAY_CLUSTER = spans_machines
        _reread_token()


def _reread_token() -> None:
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def _runtime_env() -> dict[str, Any]:
    """How Ray's workers find our code: an installed Echelon by itself, a bare checkout by its path.

    An empty one is worth having: Ray keeps idle workers ready for it, which halves the time to start an actor.
    """
    try:
        metadata.distribution("echelon")
    except metadata.PackageNotFoundError:
        paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {"env_vars": {"PYTHONPATH": os.pathsep.join(paths)}}
    return {}

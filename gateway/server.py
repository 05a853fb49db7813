"""Assembles a gateway: its gRPC server, its links to schedulers, its health."""

import asyncio
import contextlib
import logging
import time
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha._async import ReflectionServicer

from childproc.ports import try_bind
from echelon.pb import control_pb2, inference_pb2, process_pb2
from gateway.doors.control_servicer import ControlServicer
from gateway.doors.health import READINESS, Health
from gateway.doors.http_server import HttpServer
from gateway.doors.inference_servicer import InferenceServicer
from gateway.doors.listening import bind_problem, join
from gateway.doors.service_handlers import service_handlers
from gateway.metrics import RequestMetrics
from gateway.replicas.metrics import ReplicaCollector
from gateway.replicas.replicas import read_replicas
from gateway.replicas.scheduler_link import SchedulerLink
from gateway.requests.reading import BULK_WAITING_BYTES, RequestReader
from gateway.requests.validation import RequestValidator, build_validator

logger = logging.getLogger(__name__)

_INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["Inference"]
_HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"]
_CONTROL = control_pb2.DESCRIPTOR.services_by_name["Control"]
_REFLECTION = reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"]
_SERVICES = tuple(service.full_name for service in (_INFERENCE, _CONTROL, _HEALTH, _REFLECTION))
# Of a request: eight times what a token of text takes. grpc copies a message while nothing else runs, a few ms a MiB,
# so beyond 16 MiB there is less to spare, down to twice what a token takes.
_BYTES_PER_TOKEN, _LEAST_BYTES_PER_TOKEN = 32, 8
_LEAST_MAX_MESSAGE_BYTES, _GENEROUS_MAX_MESSAGE_BYTES = 1 << 20, 16 << 20
_NOTICE_S = 3.0  # for clients and load balancers to hear that the gateway stops


class StartupError(ValueError):
    """The gateway cannot start; the message says what to change."""


class Gateway:
    """One gateway. `start` within a running event loop, then `drain`; both once.

    Raises StartupError, or another ValueError, naming the file or the YAML key, when it cannot be built or started.
    """

    def __init__(self, spec: process_pb2.GatewaySpec) -> None:
        _check_spec(spec)
        self._spec = spec
        self._health = Health()
        self._links = [SchedulerLink(address, on_change=self._update_readiness) for address in spec.scheduler_addresses]
        self._link_tasks: list[asyncio.Task[None]] = []
        self._became_ready = asyncio.Event()
        self._metrics = RequestMetrics(spec.model_name)
        self._http: HttpServer | None = None
        validator = build_validator(spec)
        self._reader = RequestReader(spec, validator)
        self._servicer = InferenceServicer(
            self._reader, self._links, info=_model_info(spec, validator), metrics=self._metrics
        )
        self._server = grpc.aio.server(options=_server_options(_max_message_bytes(spec)))
        self._control = ControlServicer(self._links, model_name=spec.model_name)
        self._server.add_generic_rpc_handlers(
            (
                service_handlers(_INFERENCE, self._servicer, undecoded={"Generate"}),
                service_handlers(_CONTROL, self._control),
                service_handlers(_HEALTH, self._health),
                service_handlers(_REFLECTION, ReflectionServicer(_SERVICES)),
            )
        )

    async def start(self) -> str:
        """Listens and connects. Returns host:port; a port that is taken raises StartupError naming it."""
        port = self._bind()
        self._http = self._bind_http()
        await self._server.start()
        if self._http is not None:
            await self._http.start()
        self._link_tasks = [asyncio.create_task(link.run()) for link in self._links]
        return join(self._spec.server.host, port)

    def open_reader(self) -> None:
        """Starts the processes that read long requests and conversations; without this, the first of these does."""
        self._reader.open()

    async def wait_until_ready(self) -> None:
        """Returns once a scheduler would serve a request."""
        await self._became_ready.wait()

    async def drain(self, grace_s: float) -> None:
        """Takes no new requests, lets those that run finish within `grace_s`, then closes everything."""
        self._servicer.refuse_new_requests()
        self._control.end_recordings()
        self._health.close()
        began_s = time.monotonic()
        # A server that stops drops newcomers without a word. So it first goes on for a while, and says why they are
        # refused; then their channels are told to go elsewhere.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._servicer.wait_until_idle(), min(grace_s, _NOTICE_S))
        await self._server.stop(max(0.0, grace_s - (time.monotonic() - began_s)))
        await self._reader.close()
        if self._http is not None:
            await self._http.stop()
        for task in self._link_tasks:
            task.cancel()
        await asyncio.gather(*self._link_tasks, return_exceptions=True)

    def _bind(self) -> int:
        host, port = self._spec.server.host, self._spec.server.grpc_port
        try:
            bound = self._server.add_insecure_port(join(host, port))
        except RuntimeError:
            bound = 0  # what grpc returned before it raised
        if not bound:
            raise StartupError(_why_not_bound(host, port))
        return bound

    def _bind_http(self) -> HttpServer | None:
        host, port = self._spec.server.host, self._spec.server.http_port
        if not port:
            return None
        collector = ReplicaCollector(self._spec.model_name)

        async def refresh() -> None:
            collector.replicas = await read_replicas(self._links)

        self._metrics.registry.register(collector)
        try:
            return HttpServer(host, port, self._metrics.registry, refresh=refresh)
        except OSError as err:
            raise StartupError(bind_problem(host, port, err, key="server.http_port")) from err

    def _update_readiness(self) -> None:
        ready = any(link.ready for link in self._links)
        self._health.set(READINESS, ready)
        if ready:
            self._became_ready.set()


def _check_spec(spec: process_pb2.GatewaySpec) -> None:
    if not spec.scheduler_addresses:
        raise StartupError("scheduler_addresses: is empty; a gateway needs a scheduler")
    if not Path(spec.model_dir).is_dir():
        raise StartupError(f"model_dir: {spec.model_dir} is no folder on this node")


def _model_info(spec: process_pb2.GatewaySpec, validator: RequestValidator) -> inference_pb2.ModelInfo:
    return inference_pb2.ModelInfo(
        model=spec.model_name,
        max_model_len=spec.max_model_len,
        vocab_size=spec.vocab_size,
        eos_token_ids=validator.tokenizer.eos_token_ids(spec.vocab_size),
        has_chat_template=validator.tokenizer.chat_template is not None,
    )


def _max_message_bytes(spec: process_pb2.GatewaySpec) -> int:
    generous = min(max(_BYTES_PER_TOKEN * spec.max_model_len, _LEAST_MAX_MESSAGE_BYTES), _GENEROUS_MAX_MESSAGE_BYTES)
    needed = min(_LEAST_BYTES_PER_TOKEN * spec.max_model_len, BULK_WAITING_BYTES)
    return spec.max_message_bytes or max(generous, needed)


def _server_options(max_message_bytes: int) -> list[tuple[str, int]]:
    return [
        ("grpc.so_reuseport", 0),  # two gateways on one port would each get half of the clients
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", -1),
        # A client whose machine vanished sends no reset: without pings its requests would run to their end.
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ]


def _why_not_bound(host: str, port: int) -> str:
    """grpc says only that it failed; the operating system says why."""
    try:
        try_bind(host, port)
    except OSError as err:
        return bind_problem(host, port, err, key="server.grpc_port")
    return f"cannot listen on {join(host, port)}; change server.host or server.grpc_port"

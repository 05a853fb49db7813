"""Assembles a gateway: its gRPC server, its links to schedulers, its health."""

import asyncio
import contextlib
import logging
import sqlite3
import time
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha._async import ReflectionServicer

from childproc.ports import reachable_host, try_bind
from childproc.tls_identity import TlsFileError
from childproc.tokens_file import TokensFileError
from echelon.pb import control_pb2, inference_pb2, jobs_pb2, process_pb2
from gateway.access.audit import AuditFileError, AuditLog
from gateway.access.tls_files import TlsFiles
from gateway.access.tokens import Tokens
from gateway.core import Core
from gateway.doors.control_servicer import ControlServicer
from gateway.doors.grpc_access import TokenInterceptor, tls_credentials
from gateway.doors.health import READINESS, Health
from gateway.doors.http_app import build_app
from gateway.doors.http_server import HttpServer
from gateway.doors.inference_servicer import InferenceServicer
from gateway.doors.jobs_servicer import JobsServicer
from gateway.doors.listening import bind_problem, join
from gateway.doors.openai.job_worker import JobWorker
from gateway.doors.service_handlers import service_handlers
from gateway.job_metrics import JobCollector
from gateway.jobs.jobs import JobNumbers, Jobs, Limits
from gateway.jobs.schema import StoreError
from gateway.metrics import RequestMetrics
from gateway.models import Models
from gateway.operations import Operations
from gateway.replicas.events import EventLog
from gateway.replicas.links import Links
from gateway.replicas.metrics import ReplicaCollector
from gateway.replicas.replicas import read_replicas
from gateway.replicas.topology import Topology
from gateway.requests.reading import BULK_WAITING_BYTES
from gateway.requests.refusal import Refusal

logger = logging.getLogger(__name__)

_INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["Inference"]
_HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"]
_CONTROL = control_pb2.DESCRIPTOR.services_by_name["Control"]
_JOBS = jobs_pb2.DESCRIPTOR.services_by_name["Jobs"]
_REFLECTION = reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"]
_SERVICES = tuple(service.full_name for service in (_INFERENCE, _JOBS, _CONTROL, _HEALTH, _REFLECTION))
# Of a request: eight times what a token of text takes. grpc copies a message while nothing else runs, a few ms a MiB,
# so beyond 16 MiB there is less to spare, down to twice what a token takes.
_BYTES_PER_TOKEN, _LEAST_BYTES_PER_TOKEN = 32, 8
_LEAST_MAX_MESSAGE_BYTES, _GENEROUS_MAX_MESSAGE_BYTES = 1 << 20, 16 << 20
_JOB_NUMBERS_S = 1.0  # for which a scrape waits for them
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
        self._audit = _open_audit(spec)
        self._tls, self._tokens = _open_tls(spec), _open_tokens(spec, self._audit)
        self._health = Health()
        events = EventLog()
        self._links = Links(
            spec.scheduler_addresses,
            model_id=spec.model_id,
            model_name=spec.model_name,
            on_change=self._update_readiness,
            keeps_requests=spec.keeps_requests,
            events=events,
            identity=spec.identity,
        )
        self._topology = Topology(spec)
        self._models = Models(spec)
        self._operations = Operations(self._links, self._topology, events, model_name=lambda: self._models.name)
        self._became_ready = asyncio.Event()
        self._metrics = RequestMetrics(spec.model_name)
        self._http: HttpServer | None = None
        self._core = Core(self._models, self._links, self._metrics, self._audit)
        self._jobs = self._build_jobs()
        servicer = InferenceServicer(self._core, self._models, self._tokens)
        self._server = grpc.aio.server(
            interceptors=[TokenInterceptor(self._tokens)], options=_server_options(_max_message_bytes(spec))
        )
        self._inside: grpc.aio.Server | None = None
        self.inside_address = ""  # once started: where the controller asks for health, if the ports speak TLS
        self._server.add_generic_rpc_handlers(
            (
                service_handlers(_INFERENCE, servicer, undecoded={"Generate"}),
                service_handlers(_CONTROL, ControlServicer(self._operations, self._tokens)),
                service_handlers(_HEALTH, self._health),
                service_handlers(_REFLECTION, ReflectionServicer(_SERVICES)),
            )
        )
        if self._jobs is not None:
            servicer_of_jobs = JobsServicer(self._jobs, self._tokens)
            handlers = service_handlers(_JOBS, servicer_of_jobs, undecoded={"SubmitJob"})
            self._server.add_generic_rpc_handlers((handlers,))

    async def start(self) -> str:
        """Listens and connects. Returns host:port; a port that is taken raises StartupError naming it."""
        await self._open_jobs()
        port = self._bind()
        self._http = self._bind_http()
        await self._server.start()
        if self._http is not None:
            await self._http.start()
        if self._tls is not None:
            await self._start_inside()
        self._links.start()
        return join(reachable_host(self._spec.server.host, self._spec.inside_host), port)

    def on_update(self, update: process_pb2.ProcessUpdate) -> None:
        """The parent says what has changed."""
        if update.HasField("spares"):
            self._metrics.note_spares(ready=update.spares.num_ready, wanted=update.spares.num_wanted)
        if update.HasField("scheduler"):
            if update.scheduler.HasField("model"):
                self._models.learn(update.scheduler.model, on_loaded=self._update_readiness)
            self._links.on_update(update.scheduler)
            self._topology.on_update(update.scheduler)
            if all(link.is_retiring for link in self._links):
                self._became_ready.set()

    def open_reader(self) -> None:
        """Starts the processes that read long requests and conversations; without this, the first of these does."""
        self._models.open()

    async def wait_until_ready(self) -> None:
        """Returns once a scheduler would serve a request, or all are drained: then none is to get one."""
        await self._became_ready.wait()

    async def drain(self, grace_s: float) -> None:
        """Takes no new requests, lets those that run finish within `grace_s`, then closes everything."""
        self._core.refuse_new_requests()
        if self._jobs is not None:
            await self._jobs.close()
        self._operations.end_recordings()
        self._health.close()
        began_s = time.monotonic()
        # A server that stops drops newcomers without a word. So it first goes on for a while, and says why they are
        # refused; then their channels are told to go elsewhere.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._core.wait_until_idle(), min(grace_s, _NOTICE_S))
        remaining_s = max(0.0, grace_s - (time.monotonic() - began_s))
        http_stopped = self._http.stop(remaining_s) if self._http is not None else asyncio.sleep(0)
        inside_stopped = self._inside.stop(None) if self._inside is not None else asyncio.sleep(0)
        await asyncio.gather(self._server.stop(remaining_s), http_stopped, inside_stopped)
        await self._models.close()
        await self._links.close()

    def _build_jobs(self) -> Jobs | None:
        """Their requests have a core of their own: they do not count as live, and a drain does not wait for them."""
        if not self._spec.HasField("jobs"):
            return None
        section = self._spec.jobs
        core = Core(self._models, self._links, RequestMetrics(self._spec.model_name), self._audit)
        limits = Limits(
            max_running=section.max_running,
            max_line_bytes=_max_message_bytes(self._spec),
            max_bytes=section.max_bytes,
            retention_s=section.retention_s,
        )
        return Jobs(Path(section.path), JobWorker(core, model=lambda: self._models.name), limits)

    async def _open_jobs(self) -> None:
        if self._jobs is None:
            return
        try:
            await self._jobs.open()
        except (OSError, StoreError) as err:
            raise StartupError(f"jobs.path: {err}") from err

    async def _start_inside(self) -> None:
        """The controller has no certificate, and whether a gateway answers is no secret."""
        host = self._spec.inside_host or "127.0.0.1"
        self._inside = grpc.aio.server()
        self._inside.add_generic_rpc_handlers((service_handlers(_HEALTH, self._health),))
        self.inside_address = join(host, self._inside.add_insecure_port(join(host, 0)))
        await self._inside.start()

    def _bind(self) -> int:
        host, port = self._spec.server.host, self._spec.server.grpc_port
        try:
            if self._tls is None:
                bound = self._server.add_insecure_port(join(host, port))
            else:
                bound = self._server.add_secure_port(join(host, port), tls_credentials(self._tls))
        except RuntimeError:
            bound = 0  # what grpc returned before it raised
        if not bound:
            raise StartupError(_why_not_bound(host, port))
        return bound

    def _bind_http(self) -> HttpServer | None:
        host, port = self._spec.server.host, self._spec.server.http_port
        if not port:
            return None
        collector, of_jobs = ReplicaCollector(), JobCollector(lambda: self._models.name)

        async def refresh() -> None:
            names = [link.model_name for link in self._links]
            collector.replicas = list(zip(names, await read_replicas(self._links), strict=True))
            of_jobs.numbers = await self._job_numbers()

        self._metrics.registry.register(collector)
        self._metrics.registry.register(of_jobs)
        max_bytes = _max_message_bytes(self._spec)
        registry = self._metrics.registry
        app = build_app(
            self._core,
            self._models,
            registry,
            self._tokens,
            operations=self._operations,
            jobs=self._jobs,
            refresh=refresh,
            max_bytes=max_bytes,
        )
        try:
            return HttpServer(host, port, app, self._tls)
        except OSError as err:
            raise StartupError(bind_problem(host, port, err, key="server.http_port")) from err

    async def _job_numbers(self) -> JobNumbers | None:
        """None: this gateway has no jobs, another owns them, or their disk does not answer."""
        if self._jobs is None:
            return None
        try:
            async with asyncio.timeout(_JOB_NUMBERS_S):
                return await self._jobs.numbers()
        except Refusal:
            return None
        except (sqlite3.Error, TimeoutError) as err:
            logger.warning("metrics lack the jobs, which cannot be counted: %r", err)
            return None

    def _update_readiness(self) -> None:
        ever_ready = [link.model_id for link in self._links if link.was_ready]
        self._models.choose([link.model_id for link in self._links], ever_ready)
        self._metrics.use(self._models.name)
        current = self._models.current_id
        self._health.note_schedulers({link.address: link.ready and link.model_id == current for link in self._links})
        ready = any(link.ready and link.model_id == current for link in self._links)
        self._health.set(READINESS, ready)
        if ready:
            self._became_ready.set()


def _check_spec(spec: process_pb2.GatewaySpec) -> None:
    if not spec.scheduler_addresses:
        raise StartupError("scheduler_addresses: is empty; a gateway needs a scheduler")
    if not Path(spec.model_dir).is_dir():
        raise StartupError(f"model_dir: {spec.model_dir} is not a folder on this node")


def _open_tls(spec: process_pb2.GatewaySpec) -> TlsFiles | None:
    if not spec.server.HasField("tls"):
        return None
    try:
        return TlsFiles(spec.server.tls)
    except TlsFileError as err:
        raise StartupError(f"server.tls.{err}") from err


def _open_audit(spec: process_pb2.GatewaySpec) -> AuditLog:
    try:
        return AuditLog(Path(spec.server.audit_file) if spec.server.audit_file else None, spec.name)
    except AuditFileError as err:
        raise StartupError(f"server.audit_file: {err}") from err


def _open_tokens(spec: process_pb2.GatewaySpec, audit: AuditLog) -> Tokens:
    if not spec.server.HasField("auth"):
        return Tokens(None)
    try:
        return Tokens(Path(spec.server.auth.tokens_file), audit)
    except TokensFileError as err:
        raise StartupError(f"server.auth.tokens_file: {err}") from err


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
        ("grpc.server_handshake_timeout_ms", 10_000),
    ]


def _why_not_bound(host: str, port: int) -> str:
    """grpc says only that it failed; the operating system says why."""
    try:
        try_bind(host, port)
    except OSError as err:
        return bind_problem(host, port, err, key="server.grpc_port")
    return f"cannot listen on {join(host, port)}; change server.host or server.grpc_port"

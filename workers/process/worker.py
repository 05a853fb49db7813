"""One rank of a worker group, from its spec to its end."""

import logging
import os
import threading
import time
from collections.abc import Callable

import torch

from childproc import edge
from childproc.events import EventWriter
from childproc.spec import SpecError
from echelon import __version__
from echelon.pb.process_pb2 import WorkerSpec
from echelon.pb.worker_pb2 import WorkerInfo
from workers.process import round_channel
from workers.process.cohort import Cohort
from workers.process.load import Engines, OnProgress, load_engines
from workers.process.run_loop import RunLoop, Stop, follow
from workers.process.server import ServerThread
from workers.trace import Tracer

logger = logging.getLogger(__name__)

# None of these times is measured.
STOP_GRACE_S = 5.0  # for streams to end, and for a follower to hear from its leader that it may go
_CLOSE_GRACE_S = 3.0  # for all tiers of a rank to finish the moves that have begun
_DEFAULT_COLLECTIVE_TIMEOUT_S = 30.0  # without one in the spec
BuildEngines = Callable[[WorkerSpec, Cohort, OnProgress], Engines]
Fail = Callable[[str], None]


def main(build_engines: BuildEngines = load_engines) -> None:
    """Run the worker that standard input describes; ends the process.

    Args:
        build_engines: makes the engines of this rank. A benchmark of rounds passes one that makes instant engines.
    """
    edge.run(WorkerSpec, lambda spec, events: _work(_checked(spec), events, build_engines))


def _checked(spec: WorkerSpec) -> WorkerSpec:
    if not spec.engines:
        raise SpecError("engines: is empty, a worker runs one or more")
    if spec.rank >= max(1, spec.world_size):
        raise SpecError(f"rank: {spec.rank}, must be below world_size {spec.world_size}")
    spec.collective_timeout_s = spec.collective_timeout_s or _DEFAULT_COLLECTIVE_TIMEOUT_S
    return spec


def _work(spec: WorkerSpec, events: EventWriter, build_engines: BuildEngines) -> None:
    _bind_to_device(spec)
    cohort = Cohort.open(spec)
    if cohort.store_address and spec.rank == 0:
        events.store_opened(cohort.store_address)
    cohort.join(spec)
    if spec.rank == 0:
        leader = round_channel.Leader.accept(cohort, spec.host, spec.collective_timeout_s)
        engines = build_engines(spec, cohort, events.progress)
        cohort.limit_waits(spec.collective_timeout_s)
        _lead(spec, leader, engines, events, tracer=cohort.tracer)
    else:
        follower = round_channel.Follower.connect(cohort, spec.collective_timeout_s)
        engines = build_engines(spec, cohort, events.progress)
        cohort.limit_waits(spec.collective_timeout_s)
        _follow(spec, follower, engines, events, tracer=cohort.tracer)


def _bind_to_device(spec: WorkerSpec) -> None:
    if spec.cpu_ids:
        os.sched_setaffinity(0, spec.cpu_ids)  # before torch starts its threads, which inherit it
    if spec.threads:
        torch.set_num_threads(spec.threads)
    if spec.device == "cuda":
        torch.cuda.set_device(0)


def _lead(
    spec: WorkerSpec, channel: round_channel.Leader, engines: Engines, events: EventWriter, *, tracer: Tracer
) -> None:
    info = _info(spec, engines)
    loop = RunLoop(engines, channel, tracer)
    server = ServerThread(info, channel.silence, loop.submit, spec.identity)
    failing = threading.Lock()

    def fail(error: str) -> None:
        """Called from any thread; acts once. Tells streams and health, then the parent, then ends the process."""
        failing.acquire()  # never released: a second caller waits for the end
        server.fail(error)
        events.fail(error)

    address = server.start(spec.host)
    edge.on_terminate(lambda: loop.submit(Stop()))
    channel.watch(fail)
    events.ready(address, info)
    logger.info("serving on %s", address)
    try:
        loop.run()
    except round_channel.LostRank as err:
        fail(str(err))
    except Exception as err:  # noqa: BLE001  # whatever it is, the ranks no longer agree: the incarnation ends
        fail(f"a round failed on rank 0: {type(err).__name__}: {err}")
    channel.stop()
    server.stop(STOP_GRACE_S)
    _close_tiers(engines)


def _follow(
    spec: WorkerSpec, channel: round_channel.Follower, engines: Engines, events: EventWriter, *, tracer: Tracer
) -> None:
    edge.on_terminate(_exit_after_leader)
    channel.watch(events.fail)
    events.ready("", _info(spec, engines))
    try:
        follow(engines, channel, tracer)
    except round_channel.LostRank as err:
        events.fail(str(err))
    except Exception as err:  # noqa: BLE001  # as in _lead
        events.fail(f"a round failed on rank {spec.rank}: {type(err).__name__}: {err}")
    _close_tiers(engines)


def _close_tiers(engines: Engines) -> None:
    """Disks that hang must not keep the process from ending within its grace."""
    movers = [engine.mover for engine in engines.values() if engine.mover is not None]
    for mover in movers:
        mover.close(_CLOSE_GRACE_S / len(movers))


def _exit_after_leader() -> None:
    """A group is stopped by a signal to all its ranks. The leader ends its round and says stop; leave it that time."""
    time.sleep(STOP_GRACE_S)
    os._exit(0)


def _info(spec: WorkerSpec, engines: Engines) -> WorkerInfo:
    return WorkerInfo(
        version=__version__,
        incarnation=spec.incarnation,
        world_size=spec.world_size,
        device=spec.device,
        engines=[engine.info for engine in engines.values()],
    )

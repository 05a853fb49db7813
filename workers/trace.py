"""What a rank did and when, in a round that asks for it."""

import time
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType

import torch
from torch import Tensor

from echelon.pb.worker_pb2 import Span
from workers.collectives import Group

_NOT_RECORDED = nullcontext()


class Tracer:
    """Spans of one rank, recorded between `start` and `stop`; otherwise `span` costs a check and an empty context.
    For the thread that runs rounds. Spans may nest; worker.proto defines their names."""

    def __init__(self, rank: int = 0) -> None:
        self.is_on = False
        self._rank = rank
        self._spans: list[Span] = []
        self._started_ns = 0

    def start(self) -> None:
        """A round begins."""
        self.is_on = True
        self._spans = []
        self._started_ns = time.monotonic_ns()

    def stop(self) -> list[Span]:
        """The spans of the round, in the order in which they ended."""
        self.is_on = False
        return self._spans

    def span(self, name: str) -> AbstractContextManager[None]:
        """Record a span around the block, under this name."""
        return _Recording(self, name) if self.is_on else _NOT_RECORDED

    def now_ns(self) -> int:
        """Time since the round began. Kernels run after their launch, so a traced round waits for them at both ends of
        each span. That makes it slower, but only then do the spans say when the device worked."""
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch has it without types
            torch.cuda.synchronize()
        return time.monotonic_ns() - self._started_ns

    def add(self, name: str, start_ns: int) -> None:
        """Record that something has ended now."""
        self._spans.append(Span(rank=self._rank, name=name, start_ns=start_ns, run_ns=self.now_ns() - start_ns))


class _Recording:
    def __init__(self, tracer: Tracer, name: str) -> None:
        self._tracer = tracer
        self._name = name
        self._start_ns = 0

    def __enter__(self) -> None:
        self._start_ns = self._tracer.now_ns()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._tracer.add(self._name, self._start_ns)


class TracedGroup:
    """A Group whose collectives count as waiting: for late ranks, and for the wire."""

    def __init__(self, group: Group, tracer: Tracer) -> None:
        self._group = group
        self._tracer = tracer
        self.rank: int = group.rank
        self.size: int = group.size

    def all_reduce(self, x: Tensor) -> Tensor:
        with self._tracer.span("wait"):
            return self._group.all_reduce(x)

    def all_gather(self, x: Tensor) -> Tensor:
        with self._tracer.span("wait"):
            return self._group.all_gather(x)

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        with self._tracer.span("wait"):
            return self._group.broadcast(x, source)

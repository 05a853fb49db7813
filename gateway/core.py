"""What every door does with a request: has it read, gives it to a scheduler, and returns the replies."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence
from functools import partial

import grpc

from childproc.tokens_file import Scope
from echelon.pb.inference_pb2 import GenerateChunk, GenerateComplete
from echelon.pb.reading_pb2 import Reading
from echelon.pb.scheduler_pb2 import RequestError, Submit
from gateway.access.audit import AuditLog
from gateway.access.caller import Caller
from gateway.metrics import RequestMetrics
from gateway.models import Models
from gateway.replicas.links import Links
from gateway.replicas.mailbox import Mailbox
from gateway.replicas.routing import Matches
from gateway.replicas.scheduler_link import SchedulerLink
from gateway.requests.forms import Form
from gateway.requests.refusal import Refusal, status_code

_AT_ONCE = 32  # requests that are submitted before others have their turn


class Core:
    """Requests of all doors of one gateway; the scheduler decides how they run."""

    def __init__(self, models: Models, links: Links, metrics: RequestMetrics, audit: AuditLog) -> None:
        self._models = models
        self._links = links
        self._metrics = metrics
        self._audit = audit
        self._draining = False
        self._callers: dict[str, Caller] = {}  # by the id of each request that runs
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def num_replicas(self) -> int:
        return len(self._links)

    @property
    def num_ready_replicas(self) -> int:
        return sum(link.ready for link in self._links)

    def refuse_new_requests(self) -> None:
        self._draining = True

    async def wait_until_idle(self) -> None:
        """Until no request runs."""
        await self._idle.wait()

    def now(self) -> float:
        """By the clock of `arrived_s`, seconds."""
        return self._metrics.now()

    async def read(self, form: Form, data: bytes) -> Reading:
        """Raises Refusal."""
        with self._counting_refusals():
            return await self._models.read(form, data)

    @contextlib.asynccontextmanager
    async def run(
        self, submits: Sequence[Submit], caller: Caller, *, arrived_s: float, remaining_s: float | None
    ) -> AsyncIterator["Replies"]:
        """Inside the block they run; who leaves it before their end cancels them. Raises Refusal.

        `remaining_s` is the time until their deadline.
        """
        replies = Replies()
        with contextlib.ExitStack() as running:
            for number, submit in enumerate(submits):
                if number % _AT_ONCE == _AT_ONCE - 1:
                    await asyncio.sleep(0)
                if remaining_s is not None:
                    submit.timeout_s = remaining_s
                submit.tenant, submit.cache_salt = caller.name, caller.salt(submit.cache_salt)
                matches = await self._links.find_matches(submit)
                running.enter_context(self._running(submit, matches, caller, replies.add(), arrived_s))
            yield replies

    @contextlib.contextmanager
    def _running(
        self, submit: Submit, matches: Matches, caller: Caller, mailbox: Mailbox, arrived_s: float
    ) -> Iterator[None]:
        with contextlib.ExitStack() as limits:
            with self._counting_refusals():
                link = self._choose_link(submit, matches)
                limits.enter_context(caller.running())
                meter = self._metrics.start(arrived_s, partial(self._audit.request_ended, submit))
                link.submit(submit, mailbox, meter)
            self._callers[submit.request_id] = caller
            self._idle.clear()
            try:
                yield
            finally:
                self._abandon(submit.request_id)
                del self._callers[submit.request_id]
                if not self._callers:
                    self._idle.set()

    def _abandon(self, request_id: str) -> None:
        """Its client has left, perhaps before the end. It may have moved to another scheduler meanwhile."""
        link = self._link_of(request_id)
        if link is not None:
            link.abandon(request_id)

    def is_running(self, request_id: str) -> bool:
        return self._link_of(request_id) is not None

    def link_of(self, request_id: str, caller: Caller) -> SchedulerLink | None:
        """Where a request runs, if it does and is the caller's own; operators may touch all."""
        is_allowed = self._callers.get(request_id) is caller or caller.may(Scope.ADMIN)
        return self._link_of(request_id) if is_allowed else None

    def _link_of(self, request_id: str) -> SchedulerLink | None:
        return next((link for link in self._links if link.knows(request_id)), None)

    def check_ready(self) -> None:
        """Raises Refusal if no request would be served now."""
        self._check_open()
        current = self._models.current_id
        if not any(link.ready and link.model_id == current for link in self._links):
            raise self._nobody_is_ready(current)

    def _check_open(self) -> None:
        if self._draining:
            raise Refusal(grpc.StatusCode.UNAVAILABLE, "this gateway is shutting down; try again later")

    def _nobody_is_ready(self, model_id: str) -> Refusal:
        reasons = [f"{link.address}: {link.not_ready_reason}" for link in self._links if link.model_id == model_id]
        why = "; ".join(reasons) or "another model took the place of this one; send the request again"
        return Refusal(grpc.StatusCode.UNAVAILABLE, f"no scheduler is ready ({why})")

    def _choose_link(self, submit: Submit, matches: Matches) -> SchedulerLink:
        if self.is_running(submit.request_id):
            raise Refusal(
                grpc.StatusCode.ALREADY_EXISTS,
                f"request_id: {submit.request_id!r} is the id of a request that is running",
            )
        self._check_open()
        link = self._links.choose(submit, matches)
        if link is None:
            raise self._nobody_is_ready(submit.model_id)
        return link

    @contextlib.contextmanager
    def _counting_refusals(self) -> Iterator[None]:
        try:
            yield
        except Refusal as refusal:
            self._metrics.count_error(refusal.code)
            raise


class Replies:
    """What schedulers answer to requests that one client waits for; they are numbered in the order of `add`."""

    def __init__(self) -> None:
        self._filled = asyncio.Event()
        self._mailboxes: list[Mailbox] = []

    def add(self) -> Mailbox:
        """For the replies to one more request."""
        self._mailboxes.append(Mailbox(self._filled))
        return self._mailboxes[-1]

    async def __aiter__(self) -> AsyncIterator[tuple[int, GenerateChunk | GenerateComplete]]:
        """With the number of the request. Raises Refusal where one of them fails."""
        unfinished = dict(enumerate(self._mailboxes))
        while unfinished:
            await self._filled.wait()
            self._filled.clear()
            for number, mailbox in list(unfinished.items()):
                chunks, final = mailbox.take()
                for chunk in chunks:
                    yield number, chunk
                if isinstance(final, RequestError):
                    raise Refusal(status_code(final.code), final.message)
                if final is not None:
                    del unfinished[number]
                    yield number, final

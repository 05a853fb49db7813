"""The links to all schedulers, which come and go with the replicas."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from typing import overload

from echelon.pb.process_pb2 import ProcessIdentity, SchedulerUpdate
from echelon.pb.scheduler_pb2 import Submit
from gateway.replicas.events import EventLog, StatusWatch
from gateway.replicas.progress import RunningRequest
from gateway.replicas.routing import Matches, Router, find_matches
from gateway.replicas.scheduler_link import SchedulerLink


class Links(Sequence[SchedulerLink]):
    """By replica. `start` within a running event loop, then `close`; both once."""

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        model_id: str,
        model_name: str,
        on_change: Callable[[], None],
        keeps_requests: bool,
        events: EventLog,
        identity: ProcessIdentity | None = None,
    ) -> None:
        """`on_change` is called when a link becomes ready, or is so no more."""
        self._routers: dict[str, Router] = {}  # by the id of their model
        self._events = events
        self._identity = identity
        self._on_change = on_change
        self._keeps_requests = keeps_requests
        self._links = [self._open(replica, address, model_id, model_name) for replica, address in enumerate(addresses)]
        self._tasks: dict[SchedulerLink, asyncio.Task[None]] = {}
        self._is_started = False  # replicas may come before

    def start(self) -> None:
        self._is_started = True
        for link in self._links:
            self._run(link)

    async def close(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def find_matches(self, submit: Submit) -> Matches:
        """How much of a new request's prompt each replica has cached."""
        links = self._of_model(submit.model_id)
        return await find_matches(links[0].model_name, submit, links) if links else {}

    def choose(self, submit: Submit, matches: Matches) -> SchedulerLink | None:
        """Where a new request goes; None if it would be served nowhere."""
        links = self._of_model(submit.model_id)
        accepting = [link for link in links if link.accepts_requests]
        candidates = [link for link in accepting if link.ready] or accepting or self._last_resort(submit, links)
        if not candidates:
            return None
        return self._routers.setdefault(submit.model_id, Router()).choose(matches, candidates)

    def _of_model(self, model_id: str) -> list[SchedulerLink]:
        return [link for link in self._links if link.model_id == model_id]

    def _last_resort(self, submit: Submit, links: Sequence[SchedulerLink]) -> list[SchedulerLink]:
        """For a request that was read for a model just before another took its place: what still finishes its own."""
        is_changing = any(link.model_id != submit.model_id and link.accepts_requests for link in self._links)
        return [link for link in links if is_changing and link.takes_requests]

    def on_update(self, update: SchedulerUpdate) -> None:
        """The parent says what has become of a scheduler."""
        if update.replica == len(self._links) and update.address:
            self._add(update)
        elif update.replica < len(self._links):
            self._tell(self._links[update.replica], update)

    def _tell(self, link: SchedulerLink, update: SchedulerUpdate) -> None:
        match update.WhichOneof("state"):
            case "address":
                if update.HasField("model") and update.model.model_id != link.model_id:
                    # A controller was lost before it wrote down that a replica is gone; the next one counts it again.
                    link.model_id, link.model_name = update.model.model_id, update.model.model_name
                    link.hand_over()
                if update.address != link.address:
                    self._events.info(update.replica, f"its scheduler was started again at {update.address}")
                link.redirect(update.address)
            case "given_up":
                self._events.error(update.replica, f"its scheduler is given up: {update.given_up}")
                link.give_up(f"scheduler {link.address}: {update.given_up}")
            case "retiring":
                if update.retiring != link.is_retiring:
                    news = "no new requests" if update.retiring else "requests again"
                    self._events.info(update.replica, f"gets {news}")
                link.retire(update.retiring)
            case "removed":
                self._events.info(update.replica, "removed")
                self._remove(link)

    def _open(self, replica: int, address: str, model_id: str, model_name: str) -> SchedulerLink:
        return SchedulerLink(
            address,
            StatusWatch(self._events, replica),
            on_change=self._on_change,
            on_refusal=self._move,
            keeps_requests=self._keeps_requests,
            identity=self._identity,
            model=(model_id, model_name),
        )

    def _add(self, update: SchedulerUpdate) -> None:
        model = update.model
        link = self._open(len(self._links), update.address, model.model_id, model.model_name)
        self._events.info(len(self._links), "added")
        self._links.append(link)
        if self._is_started:
            self._run(link)

    def _remove(self, link: SchedulerLink) -> None:
        self._links.remove(link)
        link.hand_over()
        if link in self._tasks:
            self._tasks[link].cancel()  # until it has ended, `close` waits for it
        served = {each.model_id for each in self._links}
        self._routers = {model_id: router for model_id, router in self._routers.items() if model_id in served}
        self._on_change()

    def _run(self, link: SchedulerLink) -> None:
        task = self._tasks[link] = asyncio.create_task(link.run())
        task.add_done_callback(lambda _: self._tasks.pop(link))

    def _move(self, request_id: str, running: RunningRequest) -> bool:
        """To a link of its model that has not refused it, from where its client is. False: there is none."""
        links = [link for link in self._of_model(running.progress.model_id) if link.accepts_requests]
        links = [link for link in links if link not in running.refused_by]
        if not links:
            return False
        min(links, key=lambda link: (not link.ready, link.load)).take_over(request_id, running)
        return True

    def __len__(self) -> int:
        return len(self._links)

    def __iter__(self) -> Iterator[SchedulerLink]:
        return iter(self._links)

    @overload
    def __getitem__(self, replica: int) -> SchedulerLink: ...
    @overload
    def __getitem__(self, replica: slice) -> Sequence[SchedulerLink]: ...
    def __getitem__(self, replica: int | slice) -> SchedulerLink | Sequence[SchedulerLink]:
        return self._links[replica]

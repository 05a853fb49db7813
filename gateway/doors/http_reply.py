"""The answer to one HTTP request, whole or as server-sent events."""

from collections.abc import AsyncIterator

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gateway.doors.events import Event, NamedEvent

_STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # nginx passes events on as they come
}


class HttpReply:
    """One of its methods answers; `fail` may follow on `stream`."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.headers: dict[str, str] = {}  # of whatever is answered
        self._asgi = (scope, receive, send)
        self._send = send
        self._streams = False

    async def json(self, text: str) -> None:
        await Response(text, headers=self.headers, media_type="application/json")(*self._asgi)

    async def stream(self, events: AsyncIterator[Event]) -> None:
        """The head is sent with the first event: until then a problem still has a status of its own."""
        async for event in events:
            if not self._streams:
                self._streams = True
                headers = [(k.encode(), v.encode()) for k, v in {**_STREAM_HEADERS, **self.headers}.items()]
                await self._send({"type": "http.response.start", "status": 200, "headers": headers})
            await self._send_event(event)
        await self._send({"type": "http.response.body", "body": b""})

    async def fail(self, response: Response, event: Event) -> None:
        """Answers with `response`; a stream that has begun ends with `event`."""
        if not self._streams:
            response.headers.update(self.headers)
            await response(*self._asgi)
            return
        await self._send_event(event)
        await self._send({"type": "http.response.body", "body": b""})

    async def _send_event(self, event: Event) -> None:
        name, data = event if isinstance(event, NamedEvent) else ("", event)
        text = f"event: {name}\ndata: {data}\n\n" if name else f"data: {data}\n\n"
        await self._send({"type": "http.response.body", "body": text.encode(), "more_body": True})

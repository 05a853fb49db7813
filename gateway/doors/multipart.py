"""A form with a file, as browsers and OpenAI's clients upload one: read as it comes, never held."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from gateway.doors.http_errors import HttpProblem
from gateway.requests.refusal import invalid, shown

_PIECE_BYTES = 1 << 20
_PIECE_S = 60.0  # for the next bytes to arrive
_MAX_FIELDS, _MAX_FIELD_BYTES = 32, 4096  # of parts that are no file


class UploadForm:
    """`open` it, then read all `pieces`; then all `fields` are there. Raises HttpProblem and Refusal."""

    def __init__(self, request: Request) -> None:
        self.fields: dict[str, str] = {}
        self.file_name: str | None = None  # None: no file has come yet
        self._stream = request.stream()
        self._pieces: deque[bytes] = deque()
        self._header = [b"", b""]  # name and value of the one that is being read
        self._part: dict[str, bytes] = {}  # its headers
        self._field: str | None = None  # the part is this field; None: it is the file
        self._value = b""
        self._has_ended = False
        self._parser = MultipartParser(_boundary(request), self._callbacks())

    async def open(self) -> str:
        """Reads up to the file, and returns its name."""
        while self.file_name is None:
            await self._receive()
        return self.file_name

    async def pieces(self) -> AsyncIterator[bytes]:
        """The content of the file."""
        while not self._has_ended:
            size = sum(map(len, self._pieces))
            if size >= _PIECE_BYTES:
                yield self._take()
            await self._receive()
        yield self._take()

    def _take(self) -> bytes:
        data = b"".join(self._pieces)
        self._pieces.clear()
        return data

    async def _receive(self) -> None:
        try:
            async with asyncio.timeout(_PIECE_S):
                data = await anext(self._stream)
            self._parser.write(data)
        except TimeoutError as err:
            raise HttpProblem(408, f"request: nothing of its body came for {_PIECE_S:g} s") from err
        except StopAsyncIteration as err:
            missing = "its end" if self.file_name is not None else "the field `file`"
            raise invalid(f"request: the form came without {missing}") from err
        except MultipartParseError as err:
            raise invalid(f"request: is not a form: {err}") from err

    # -- what the parser finds ----------------------------------------------------------------------------------------

    def _callbacks(self) -> Any:
        return {
            "on_part_begin": self._begin_part,
            "on_header_field": self._on_header_name,
            "on_header_value": self._on_header_value,
            "on_header_end": self._end_header,
            "on_headers_finished": self._end_headers,
            "on_part_data": self._on_data,
            "on_part_end": self._end_part,
            "on_end": self._end,
        }

    def _begin_part(self) -> None:
        self._part, self._value, self._field = {}, b"", None

    def _on_header_name(self, data: bytes, start: int, end: int) -> None:
        self._header[0] += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header[1] += data[start:end]

    def _end_header(self) -> None:
        name, value = self._header
        self._part[name.decode("latin-1").lower()] = value
        self._header = [b"", b""]

    def _end_headers(self) -> None:
        _, options = parse_options_header(self._part.get("content-disposition", b""))
        name = options.get(b"name", b"").decode(errors="replace")
        if name != "file":
            self._field = name
        elif self.file_name is not None:
            raise invalid("file: came twice; upload one file at a time")
        else:
            self.file_name = options.get(b"filename", b"upload").decode(errors="replace")

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        if self._field is None:
            self._pieces.append(data[start:end])
            return
        self._value += data[start:end]
        if len(self._value) > _MAX_FIELD_BYTES:
            raise invalid(f"{self._field}: must have at most {_MAX_FIELD_BYTES} bytes")

    def _end_part(self) -> None:
        if self._field is None:
            return
        if len(self.fields) == _MAX_FIELDS:
            raise invalid(f"request: must have at most {_MAX_FIELDS} fields")
        self.fields[self._field] = self._value.decode(errors="replace")

    def _end(self) -> None:
        self._has_ended = True


def check_origin(request: Request) -> None:
    """A page of another site can make a browser send a form without asking us. Raises HttpProblem."""
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
        raise HttpProblem(403, f"origin: {shown(origin)} is another site, and pages of others may not upload files")


def _boundary(request: Request) -> bytes:
    """Raises HttpProblem."""
    given = request.headers.get("content-type", "")
    kind, options = parse_options_header(given)
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise HttpProblem(415, f"content-type: must be multipart/form-data with a boundary, got {shown(given)}")
    return boundary

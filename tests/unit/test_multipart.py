"""Uploads of files over HTTP, read piece by piece."""

from typing import Any

import pytest
from starlette.requests import Request

from gateway.doors.http_errors import HttpProblem
from gateway.doors.multipart import UploadForm, check_origin
from gateway.requests.refusal import Refusal

pytestmark = pytest.mark.asyncio
KIND = "multipart/form-data; boundary=xyz"
FILE = b'--xyz\r\nContent-Disposition: form-data; name="file"; filename="in.jsonl"\r\n\r\none\r\n--xy\r\ntwo\r\n'
PURPOSE = b'--xyz\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
END = b"--xyz--\r\n"


def request(*pieces: bytes, **headers: str) -> Request:
    left = list(pieces)

    async def receive() -> dict[str, Any]:
        body = left.pop(0) if left else b""
        return {"type": "http.request", "body": body, "more_body": bool(left)}

    given = {"content-type": KIND} | {name.replace("_", "-"): value for name, value in headers.items()}
    raw = [(name.encode(), value.encode()) for name, value in given.items()]
    return Request({"type": "http", "headers": raw}, receive)


async def read(form: UploadForm) -> tuple[str, bytes, dict[str, str]]:
    name = await form.open()
    return name, b"".join([piece async for piece in form.pieces()]), form.fields


@pytest.mark.parametrize("data", [FILE + PURPOSE + END, PURPOSE + FILE + END], ids=["file first", "file last"])
async def test_a_form_is_the_same_however_it_is_split(data: bytes) -> None:
    expected = ("in.jsonl", b"one\r\n--xy\r\ntwo", {"purpose": "batch"})
    assert await read(UploadForm(request(*(data[i : i + 1] for i in range(len(data)))))) == expected
    for place in range(1, len(data)):
        assert await read(UploadForm(request(data[:place], data[place:]))) == expected


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (PURPOSE + END, "request: the form came without the field `file`"),
        (FILE + PURPOSE, "request: the form came without its end"),
        (FILE + FILE + END, "file: came twice"),
        (b"nonsense", "request: is not a form"),
        (PURPOSE.replace(b"batch", b"x" * 5000) + FILE + END, "purpose: must have at most 4096 bytes"),
        (
            PURPOSE * 40 + b"".join(PURPOSE.replace(b"purpose", b"p%d" % i) for i in range(40)) + FILE + END,
            "at most 32",
        ),
    ],
)
async def test_a_form_that_is_none_is_refused(data: bytes, problem: str) -> None:
    with pytest.raises(Refusal, match=problem):
        await read(UploadForm(request(data)))


async def test_another_content_type_is_refused() -> None:
    for kind in ("application/json", "multipart/form-data"):
        with pytest.raises(HttpProblem, match="content-type: must be multipart/form-data"):
            UploadForm(request(content_type=kind))


async def test_pages_of_other_sites_may_not_upload() -> None:
    check_origin(request(host="a:1"))
    check_origin(request(host="a:1", origin="http://a:1"))
    for origin in ("http://b:1", "http://a:2", "null"):
        with pytest.raises(HttpProblem, match="another site"):
            check_origin(request(host="a:1", origin=origin))


async def test_a_large_file_is_not_held() -> None:
    head, tail = FILE.split(b"one")[0], b"\r\n" + PURPOSE + END
    piece = b"x" * 65_536
    form = UploadForm(request(head, *([piece] * 64), tail))
    await form.open()
    sizes = [len(part) async for part in form.pieces()]
    assert sum(sizes) == 64 * len(piece)
    assert max(sizes) < 1_200_000
    assert form.fields == {"purpose": "batch"}

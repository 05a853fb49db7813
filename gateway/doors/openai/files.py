"""OpenAI's /v1/files: inputs and results of batches."""

from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from gateway.doors.http_access import caller_of
from gateway.doors.multipart import UploadForm, check_origin
from gateway.doors.openai.paging import page_of, write_page
from gateway.jobs.jobs import Jobs
from gateway.jobs.records import FileRecord, Purpose
from gateway.requests.refusal import invalid, shown

_PATH = "/v1/files"


class FilePaths:
    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs

    def routes(self) -> list[Route]:
        return [
            Route(_PATH, self.upload, methods=["POST"]),
            Route(_PATH, self.list),
            Route(f"{_PATH}/{{id}}", self.read),
            Route(f"{_PATH}/{{id}}", self.delete, methods=["DELETE"]),
            Route(f"{_PATH}/{{id}}/content", self.content),
        ]

    async def upload(self, request: Request) -> Response:
        check_origin(request)
        form = UploadForm(request)
        name = await form.open()
        record = await self._jobs.upload(_for_batches(form), owner=caller_of(request).name, name=name)
        return JSONResponse(_object(record))

    async def list(self, request: Request) -> Response:
        page = page_of(request)
        purpose = request.query_params.get("purpose", "")
        records = await self._jobs.files(caller_of(request).sees, page, purpose)
        return write_page([_object(record) for record in records], page)

    async def read(self, request: Request) -> Response:
        return JSONResponse(_object(await self._record(request)))

    async def delete(self, request: Request) -> Response:
        file_id = request.path_params["id"]
        await self._jobs.delete_file(file_id, caller_of(request).sees)
        return JSONResponse({"id": file_id, "object": "file", "deleted": True})

    async def content(self, request: Request) -> Response:
        record = await self._record(request)
        headers = {"content-length": str(record.num_bytes)}
        return StreamingResponse(self._jobs.content(record), headers=headers, media_type="application/octet-stream")

    async def _record(self, request: Request) -> FileRecord:
        return await self._jobs.file(request.path_params["id"], caller_of(request).sees)


async def _for_batches(form: UploadForm) -> AsyncIterator[bytes]:
    """The file's content. Raises Refusal at its end for another purpose."""
    async for piece in form.pieces():
        yield piece
    purpose = form.fields.get("purpose", "")
    if purpose != Purpose.BATCH:
        raise invalid(f'purpose: must be "batch", got {shown(purpose)}')


def _object(record: FileRecord) -> dict[str, Any]:
    return {
        "id": record.id,
        "object": "file",
        "bytes": record.num_bytes,
        "created_at": record.created_at,
        "expires_at": None,
        "filename": record.name,
        "purpose": record.purpose,
        "status": "processed",
    }

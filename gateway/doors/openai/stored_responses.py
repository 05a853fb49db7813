"""Responses of /v1/responses, read again and deleted."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gateway.doors.http_access import caller_of
from gateway.doors.http_errors import HttpProblem
from gateway.doors.openai.response_store import ResponseStore


class StoredResponses:
    def __init__(self, store: ResponseStore) -> None:
        self._store = store

    async def read(self, request: Request) -> Response:
        stored = self._store.get(caller_of(request).name, request.path_params["id"])
        if stored is None:
            raise _unknown(request)
        return Response(stored.response, media_type="application/json")

    async def delete(self, request: Request) -> Response:
        response_id = request.path_params["id"]
        if not self._store.drop(caller_of(request).name, response_id):
            raise _unknown(request)
        return JSONResponse({"id": response_id, "object": "response", "deleted": True})


def _unknown(request: Request) -> HttpProblem:
    return HttpProblem(404, f"id: response {request.path_params['id']!r} is not known")

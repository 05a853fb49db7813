"""The paths that the gateway serves over HTTP."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import echelon
from gateway.access.tokens import Tokens
from gateway.core import Core
from gateway.doors import http_errors
from gateway.doors.anthropic.api import MessagesApi
from gateway.doors.generating import Api, GenerateEndpoint
from gateway.doors.http_access import TokenMiddleware
from gateway.doors.http_control import control_routes
from gateway.doors.http_exchange import BodyReader
from gateway.doors.http_ui import ui_routes
from gateway.doors.json_text import to_json, write_list
from gateway.doors.openai.api import ChoicesApi
from gateway.doors.openai.batches import BatchPaths
from gateway.doors.openai.files import FilePaths
from gateway.doors.openai.response_store import ResponseStore
from gateway.doors.openai.responses import ResponsesApi
from gateway.doors.openai.shapes import ChatShape, CompletionShape
from gateway.doors.openai.stored_responses import StoredResponses
from gateway.doors.openapi import openapi_document
from gateway.jobs.jobs import Jobs
from gateway.models import Models
from gateway.operations import Operations
from gateway.requests.forms import Form
from gateway.requests.refusal import Refusal

_HANDLERS: dict[Any, Any] = {
    HTTPException: http_errors.answer_http_exception,
    http_errors.HttpProblem: http_errors.answer_problem,
    Refusal: http_errors.answer_refusal,
    ClientDisconnect: http_errors.answer_nobody,
    Exception: http_errors.answer_failure,
}


def build_app(
    core: Core,
    models: Models,
    registry: CollectorRegistry,
    tokens: Tokens,
    *,
    operations: Operations,
    jobs: Jobs | None,
    refresh: Callable[[], Awaitable[None]],
    max_bytes: int,
) -> Starlette:
    """`refresh` is awaited before each scrape of `registry`; `max_bytes` limits a request's body."""
    bodies = BodyReader(max_bytes)
    model = _ModelPaths(core, models, bodies)
    turn = asyncio.Lock()  # scrapes that come at once are rendered in different passes of the loop

    async def metrics(request: Request) -> Response:
        """On the event loop: rendering takes a few milliseconds, and a thread would hold up the loop for longer."""
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        async with turn:
            await refresh()
            text = encode(registry)
        return Response(text, headers={"content-type": content_type})

    document = json.dumps(openapi_document(has_jobs=jobs is not None))

    async def openapi(request: Request) -> Response:
        return Response(document, media_type="application/json")

    routes = [
        *model.generating(),
        Route("/v1/models", model.models),
        Route("/v1/models/{name:path}", model.model),
        Route("/tokenize", model.tokenize, methods=["POST"]),
        Route("/detokenize", model.detokenize, methods=["POST"]),
        Route("/health", model.health),
        Route("/live", _live),
        Route("/version", _version),
        Route("/openapi.json", openapi),
        Route("/metrics", metrics),
        *_job_routes(jobs, bodies),
        *control_routes(operations, jobs),
        *ui_routes(),
    ]
    middleware = [Middleware(TokenMiddleware, tokens=tokens)]
    return Starlette(routes=routes, middleware=middleware, exception_handlers=_HANDLERS)


def _job_routes(jobs: Jobs | None, bodies: BodyReader) -> list[Route]:
    return [] if jobs is None else [*FilePaths(jobs).routes(), *BatchPaths(jobs, bodies).routes()]


async def _live(request: Request) -> Response:
    return JSONResponse({"status": "alive"})


async def _version(request: Request) -> Response:
    return JSONResponse({"version": echelon.__version__})


class _ModelPaths:
    """What concerns the model that is served."""

    def __init__(self, core: Core, models: Models, bodies: BodyReader) -> None:
        self._core = core
        self._models = models
        self._bodies = bodies
        self._created = int(time.time())

    def _card(self) -> dict[str, Any]:
        info = self._models.info
        return {
            "id": info.model,
            "object": "model",
            "created": self._created,
            "owned_by": "echelon",
            "root": info.model,
            "parent": None,
            "max_model_len": info.max_model_len,
        }

    def generating(self) -> list[Route]:
        """The paths where text is generated, and those of what was."""
        store = ResponseStore(time.monotonic)

        def name() -> str:
            return self._models.name

        apis: dict[str, Api] = {
            "/v1/completions": ChoicesApi(Form.COMPLETION, CompletionShape(), name),
            "/v1/chat/completions": ChoicesApi(Form.CHAT, ChatShape(), name),
            "/v1/responses": ResponsesApi(name, store),
            "/v1/messages": MessagesApi(name),
        }
        responses = StoredResponses(store)
        return [
            Route("/v1/messages/count_tokens", self.count_tokens, methods=["POST"]),
            Route("/v1/responses/{id}", responses.read),
            Route("/v1/responses/{id}", responses.delete, methods=["DELETE"]),
            *(
                Route(path, GenerateEndpoint(core=self._core, api=api, bodies=self._bodies), methods=["POST"])
                for path, api in apis.items()
            ),
        ]

    async def count_tokens(self, request: Request) -> Response:
        reading = await self._core.read(Form.COUNT_TOKENS, await self._bodies.read(request))
        return JSONResponse({"input_tokens": len(reading.submits[0].prompt_token_ids)})

    async def health(self, request: Request) -> Response:
        """Whether a request would be served."""
        self._core.check_ready()
        return JSONResponse({"status": "ready"})

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self._models.name:
            raise http_errors.HttpProblem(
                404, f"model: {name!r} is not served here; this server has {self._models.name!r}"
            )
        return JSONResponse(self._card())

    async def tokenize(self, request: Request) -> Response:
        reading = await self._core.read(Form.TOKENIZE, await self._bodies.read(request))
        tokens = reading.submits[0].prompt_token_ids
        answer = {"count": len(tokens), "max_model_len": self._models.info.max_model_len}
        return Response(to_json({**answer, "tokens": await write_list(tokens, str)}), media_type="application/json")

    async def detokenize(self, request: Request) -> Response:
        reading = await self._core.read(Form.DETOKENIZE, await self._bodies.read(request))
        return Response(json.dumps({"prompt": reading.text}), media_type="application/json")

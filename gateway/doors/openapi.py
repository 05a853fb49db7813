"""The OpenAPI document of the HTTP API, made of the bodies that it reads."""

import re
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

import echelon
from gateway.requests.anthropic.messages import MessagesBody, PromptBody
from gateway.requests.openai.bodies import (
    BatchBody,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
    TokenizeChatBody,
)
from gateway.requests.openai.responses import ResponseBody

_JSON, _STREAM, _TEXT = "application/json", "text/event-stream", "text/plain"
_FORM, _BYTES = "multipart/form-data", "application/octet-stream"
_REF = "#/components/schemas/{model}"
_POSTS: tuple[tuple[str, str, tuple[type[BaseModel], ...], tuple[str, ...]], ...] = (
    ("/v1/completions", "Continue prompts.", (CompletionBody,), (_JSON, _STREAM)),
    ("/v1/chat/completions", "Answer a conversation.", (ChatBody,), (_JSON, _STREAM)),
    ("/v1/responses", "Answer a conversation, which later requests can continue.", (ResponseBody,), (_JSON, _STREAM)),
    ("/v1/messages", "Answer a conversation in Anthropic's form.", (MessagesBody,), (_JSON, _STREAM)),
    ("/v1/messages/count_tokens", "The number of tokens of such a conversation.", (PromptBody,), (_JSON,)),
    ("/tokenize", "The token ids of a text or a conversation.", (TokenizeBody, TokenizeChatBody), (_JSON,)),
    ("/detokenize", "The text of token ids.", (DetokenizeBody,), (_JSON,)),
)
_GETS = (
    ("/v1/models", "The served model.", _JSON),
    ("/v1/models/{name}", "The served model, if it has this name.", _JSON),
    ("/health", "Whether a request would be served.", _JSON),
    ("/live", "Whether the process answers.", _JSON),
    ("/version", "The version of Echelon.", _JSON),
    ("/metrics", "Prometheus metrics.", _TEXT),
    ("/control/status", "The state of the replicas, what runs where, running requests and the last events.", _JSON),
    ("/control/jobs", "Jobs that have not ended, and the last that have.", _JSON),
    ("/control/rounds", "The rounds of a replica as they happen.", _STREAM),
    ("/openapi.json", "This document.", _JSON),
)
_JOB_POSTS = (("/v1/batches", "Run all requests of a file.", (BatchBody,), (_JSON,)),)
_JOB_GETS = (
    ("/v1/batches/{id}", "A batch.", _JSON),
    ("/v1/files/{id}", "A file.", _JSON),
    ("/v1/files/{id}/content", "The content of a file.", _BYTES),
)
_UPLOAD = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {"file": {"type": "string", "format": "binary"}, "purpose": {"const": "batch"}},
}
_PAGED = [
    {"name": "limit", "in": "query", "schema": {"type": "integer", "minimum": 1, "maximum": 1000}},
    {"name": "after", "in": "query", "schema": {"type": "string"}},
    {"name": "order", "in": "query", "schema": {"enum": ["asc", "desc"]}},
]
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}


def openapi_document(*, has_jobs: bool) -> dict[str, Any]:
    posts, gets = (_POSTS + _JOB_POSTS, _GETS + _JOB_GETS) if has_jobs else (_POSTS, _GETS)
    bodies = [(body, "validation") for _, _, alternatives, _ in posts for body in alternatives]
    refs, definitions = models_json_schema(bodies, ref_template=_REF)  # type: ignore[arg-type]
    paths: dict[str, Any] = {path: {"get": _get(path, summary, content)} for path, summary, content in gets}
    for path, summary, alternatives, content in posts:
        schemas = [refs[body, "validation"] for body in alternatives]
        schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
        body = {"required": True, "content": {_JSON: {"schema": schema}}}
        paths[path] = {"post": {"summary": summary, "requestBody": body, "responses": _responses(*content)}}
    if has_jobs:
        _add_jobs(paths)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Echelon", "version": echelon.__version__},
        "paths": paths,
        "components": {"schemas": {**definitions["$defs"], "Error": _ERROR}},
    }


def _add_jobs(paths: dict[str, Any]) -> None:
    """What the tables above have no words for."""
    for path, summary in (("/v1/files", "The files."), ("/v1/batches", "The batches.")):
        paths.setdefault(path, {})["get"] = {**_get(path, summary, _JSON), "parameters": _PAGED}
    upload = {"required": True, "content": {_FORM: {"schema": _UPLOAD}}}
    paths["/v1/files"]["post"] = {"summary": "Upload a file.", "requestBody": upload, "responses": _responses(_JSON)}
    paths["/v1/files/{id}"]["delete"] = _get("/v1/files/{id}", "Delete a file.", _JSON)
    cancel = "/v1/batches/{id}/cancel"
    paths[cancel] = {"post": _get(cancel, "Cancel a batch.", _JSON)}


def _get(path: str, summary: str, content: str) -> dict[str, Any]:
    operation: dict[str, Any] = {"summary": summary, "responses": _responses(content)}
    for name in re.findall(r"\{(\w+)\}", path):
        operation["parameters"] = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}}]
    if path == "/control/rounds":
        number = {"type": "integer", "minimum": 0, "maximum": 999999}
        operation["parameters"] = [{"name": "replica", "in": "query", "schema": number}]
    return operation


def _responses(*content: str) -> dict[str, Any]:
    error = {"description": "An error", "content": {_JSON: {"schema": {"$ref": _REF.format(model="Error")}}}}
    return {"200": {"description": "The answer", "content": {kind: {} for kind in content}}, "default": error}

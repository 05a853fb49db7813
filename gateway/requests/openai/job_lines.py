"""The input of a job: lines as in the files of OpenAI's batches, each a request to one of the paths of this API."""

import json
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field

from checkpoint.chat_template import ChatTemplate
from echelon.pb.reading_pb2 import JobLine, Reading
from gateway.requests.openai.bodies import ApiObject, parse_body
from gateway.requests.openai.chat import SpecialId, ask_chat
from gateway.requests.openai.completion import ask_completion
from gateway.requests.openai.reading import Asked, read_asked
from gateway.requests.refusal import Refusal, invalid, shown
from gateway.requests.validation import RequestValidator

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
ENDPOINTS = (COMPLETIONS, CHAT)
_SEED_BYTES = 8
_MAX_CUSTOM_ID_CHARS = 512


class LineBody(ApiObject):
    custom_id: Annotated[str, Field(min_length=1, max_length=_MAX_CUSTOM_ID_CHARS)]
    method: Literal["POST"] = "POST"
    url: str
    body: dict[str, Any]


def join_lines(endpoint: str, lines: bytes) -> bytes:
    """What `read_lines` reads: whole lines, all to one endpoint unless that is empty."""
    return endpoint.encode() + b"\n" + lines


def read_lines(data: bytes) -> Reading:
    """Which requests are there, as far as the lines themselves show."""
    endpoint, _, lines = data.partition(b"\n")
    found, start = [], 0
    for number, line in enumerate(lines.split(b"\n")):
        if line.strip():
            found.append(_find(line, endpoint.decode(), number, start))
        start += len(line) + 1
    return Reading(lines=found)


def _find(line: bytes, endpoint: str, number: int, start: int) -> JobLine:
    found = JobLine(number=number, start=start, num_bytes=len(line))
    try:
        found.custom_id = _parse(line, endpoint).custom_id
    except Refusal as refusal:
        found.problem = refusal.message
    return found


def _parse(line: bytes, endpoint: str) -> LineBody:
    """Raises Refusal."""
    body = parse_body(LineBody, line)
    if body.url not in ENDPOINTS:
        raise invalid(f"url: must be {' or '.join(ENDPOINTS)}, got {shown(body.url)}")
    if endpoint and body.url != endpoint:
        raise invalid(f"url: must be that of the job, {endpoint}, got {shown(body.url)}")
    if body.body.get("stream"):
        raise invalid("body.stream: must be false, because results of jobs are not streamed")
    return body


def join_item(seed: int, line: bytes) -> bytes:
    """What `read_item` reads; `seed` is for a request that brings none."""
    return seed.to_bytes(_SEED_BYTES) + line


def read_item(
    data: bytes, template: ChatTemplate | None, special_id: SpecialId, validator: RequestValidator
) -> Reading:
    """Raises Refusal, which names fields of the line's body."""
    line = _parse(data[_SEED_BYTES:], "")
    if line.body.get("seed") is None:
        line.body["seed"] = int.from_bytes(data[:_SEED_BYTES])
    ask: dict[str, Callable[[bytes], Asked]] = {
        COMPLETIONS: ask_completion,
        CHAT: lambda body: ask_chat(body, template, special_id),
    }
    reading = read_asked(ask[line.url](json.dumps(line.body).encode()), validator)
    reading.endpoint = line.url
    return reading

"""OpenAI's /v1/completions and /v1/chat/completions."""

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from echelon.pb.reading_pb2 import Reading
from gateway.access.caller import Caller
from gateway.core import Replies
from gateway.doors.events import Event
from gateway.doors.http_errors import HttpProblem, error_body
from gateway.doors.http_exchange import Call
from gateway.doors.openai.answers import Answer
from gateway.doors.openai.events import answer_events
from gateway.doors.openai.shapes import Shape
from gateway.doors.openai.whole import whole_answer
from gateway.requests.forms import Form


class ChoicesApi:
    """Answers have a choice for each sample of each prompt."""

    def __init__(self, form: Form, shape: Shape, model: Callable[[], str]) -> None:
        self.form = form
        self._shape = shape
        self._model = model

    def prepare(self, data: bytes, caller: Caller) -> bytes:
        return data

    def answer(self, reading: Reading, call: Call, caller: Caller) -> "ChoicesAnswer":
        return ChoicesAnswer(Answer(self._shape, reading, answer_id=call.request_id, model=self._model()))

    def error_body(self, problem: HttpProblem) -> dict[str, Any]:
        return error_body(problem)

    def error_event(self, problem: HttpProblem) -> Event:
        return json.dumps(error_body(problem))


class ChoicesAnswer:
    def __init__(self, answer: Answer) -> None:
        self._answer = answer

    async def whole(self, replies: Replies) -> str:
        return await whole_answer(self._answer, replies)

    def events(self, replies: Replies) -> AsyncIterator[Event]:
        return answer_events(self._answer, replies)

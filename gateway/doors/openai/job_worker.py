"""Items of jobs as requests like any other: read by the same readers, answered in the same shapes."""

import json
import secrets
from collections.abc import Callable

import grpc

from echelon.pb.access_pb2 import TokenRecord
from gateway.access.caller import Caller
from gateway.core import Core
from gateway.doors.http_errors import error_body, problem_of
from gateway.doors.openai.answers import Answer
from gateway.doors.openai.shapes import ChatShape, CompletionShape, Shape
from gateway.doors.openai.whole import whole_answer
from gateway.jobs.lines import answered, item_id, item_seed
from gateway.jobs.records import Item, Job, Result
from gateway.jobs.worker import FoundLine
from gateway.requests.forms import Form
from gateway.requests.openai.job_lines import CHAT, COMPLETIONS, join_item, join_lines
from gateway.requests.refusal import Refusal

_SHAPES: dict[str, Shape] = {COMPLETIONS: CompletionShape(), CHAT: ChatShape()}
# What the request itself is to blame for, whenever it runs. INTERNAL: it had numbers that are not finite, or whatever
# computed it died each time. Another try would take the deployment down again.
_FINAL = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INTERNAL)


class JobWorker:
    """See gateway/jobs/worker.py."""

    def __init__(self, core: Core, *, model: Callable[[], str]) -> None:
        self._core = core
        self._model = model

    async def find(self, job: Job, lines: bytes) -> list[FoundLine]:
        reading = await self._core.read(Form.JOB_LINES, join_lines(job.order.endpoint, lines))
        return [
            FoundLine(item=Item(line.number, line.start, line.num_bytes, line.custom_id), problem=line.problem)
            for line in reading.lines
        ]

    async def run(self, job: Job, item: Item, line: bytes) -> Result:
        try:
            return await self._answer(job, item, line)
        except Refusal as refusal:
            if refusal.code in _FINAL:
                return self.failed(job, item, refusal)
            raise

    def failed(self, job: Job, item: Item, refusal: Refusal) -> Result:
        problem = problem_of(refusal)
        return answered(job, item, problem.status, json.dumps(error_body(problem)))

    async def _answer(self, job: Job, item: Item, line: bytes) -> Result:
        """Raises Refusal."""
        core, name = self._core, item_id(job, item.number)
        reading = await core.read(Form.JOB_ITEM, join_item(item_seed(job, item.number), line))
        for number, submit in enumerate(reading.submits):
            # A scheduler may still run what an earlier process has asked of it.
            submit.request_id = f"{name}-{number}-{secrets.token_hex(4)}"
            submit.is_background = True
        answer = Answer(_SHAPES[reading.endpoint], reading, answer_id=name, model=self._model(), created=job.created_at)
        # Limits of the token are for its live requests.
        caller = Caller(TokenRecord(name=job.order.owner, cache_salt=job.order.salt))
        async with core.run(reading.submits, caller, arrived_s=core.now(), remaining_s=None) as replies:
            body = await whole_answer(answer, replies)
        usage = answer.usage()
        return answered(
            job,
            item,
            200,
            body,
            prompt_tokens=usage["prompt_tokens"],
            completion_tokens=usage["completion_tokens"],
        )

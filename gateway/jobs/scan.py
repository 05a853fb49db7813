"""Finds the items of a job in its input, a few lines at a time, and goes on where an earlier process was lost."""

import asyncio
import dataclasses
from collections.abc import Sequence
from typing import Any

from gateway.jobs.errors import DuplicateError
from gateway.jobs.folder import JobsFolder
from gateway.jobs.records import Item, Job
from gateway.jobs.store import JobStore
from gateway.jobs.store_thread import StoreThread
from gateway.jobs.worker import FoundLine, Worker

_BLOCK_BYTES = 128 << 10
_MOST_PROBLEMS = 20


class BadInputError(Exception):
    """The input of a job cannot be used. `problems` are objects as OpenAI's batches list them."""

    def __init__(self, problems: Sequence[dict[str, Any]]) -> None:
        self.problems = problems
        super().__init__(problems[0]["message"])


async def scan(job: Job, folder: JobsFolder, store: StoreThread, worker: Worker, *, max_line_bytes: int) -> Job:
    """The job with all its items. Raises BadInputError, and Refusal for reasons that pass."""
    while block := await _read_lines(job, folder, max_line_bytes):
        found = [_from_start(line, job) for line in await worker.find(job, block)]
        if bad := [line for line in found if line.problem]:
            raise BadInputError([_problem(line.item, line.problem) for line in bad[:_MOST_PROBLEMS]])
        items = [line.item for line in found]
        num_lines = block.count(b"\n") + (not block.endswith(b"\n"))
        try:
            job = await store.call(JobStore.add_items, job.id, items, num_lines=num_lines, num_bytes=len(block))
        except DuplicateError as err:
            message = f"custom_id: {err.item.custom_id!r} is the custom_id of an earlier line; each needs its own"
            raise BadInputError([_problem(err.item, message)]) from err
    if not job.total:
        raise BadInputError([{"code": "empty_file", "line": None, "message": "the file has no line", "param": None}])
    return job


async def _read_lines(job: Job, folder: JobsFolder, max_line_bytes: int) -> bytes:
    """The next whole lines, about a block of them; empty at the end."""
    block, wanted = b"", _BLOCK_BYTES
    while True:
        block = await asyncio.to_thread(folder.read, job.order.input_file, job.scanned_bytes, wanted)
        is_end = len(block) < wanted
        if is_end or b"\n" in block:
            break
        if len(block) > max_line_bytes:
            item = Item(job.scanned_lines, job.scanned_bytes, len(block), "")
            raise BadInputError([_problem(item, f"request: must have at most {max_line_bytes} bytes")])
        wanted *= 4
    return block if is_end else block[: block.rindex(b"\n") + 1]


def _from_start(line: FoundLine, job: Job) -> FoundLine:
    item = line.item
    moved = Item(job.scanned_lines + item.number, job.scanned_bytes + item.start, item.num_bytes, item.custom_id)
    return dataclasses.replace(line, item=moved)


def _problem(item: Item, message: str) -> dict[str, Any]:
    field = message.partition(":")[0]
    return {"code": "invalid_line", "line": item.number + 1, "message": message, "param": field}

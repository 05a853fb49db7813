"""Lines of a job's results, as in the files of OpenAI's batches. They say nothing that depends on when an item ran."""

import hashlib
import json

from gateway.jobs.records import Item, Job, JobStatus, Result

_WHY_NOT_RUN = {
    JobStatus.CANCELLING: ("batch_cancelled", "the job was cancelled before this item had ended"),
    JobStatus.FINALIZING: ("batch_expired", "the job's time was over before this item had ended"),
}


def item_id(job: Job, number: int) -> str:
    """What the answer to an item is called."""
    return f"{job.id.removeprefix('batch_')}-{number}"


def item_seed(job: Job, number: int) -> int:
    """64 bits, of an item that brings no seed of its own."""
    return int.from_bytes(hashlib.sha256(f"{job.order.seed}:{number}".encode()).digest()[:8])


def answered(
    job: Job, item: Item, status: int, body: str, *, prompt_tokens: int = 0, completion_tokens: int = 0
) -> Result:
    """`body`: JSON, of the answer or of the error that the request got."""
    request_id = json.dumps(item_id(job, item.number))
    response = f'{{"status_code": {status}, "request_id": {request_id}, "body": {body}}}'
    return Result(
        job=job.id,
        number=item.number,
        line=_line(job, item, response, "null"),
        is_error=status != 200,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
    )


def not_run(job: Job, item: Item) -> Result:
    """For an item of a job that stops."""
    code, message = _WHY_NOT_RUN[job.status]
    error = json.dumps({"code": code, "message": message})
    return Result(job=job.id, number=item.number, line=_line(job, item, "null", error), is_error=True)


def _line(job: Job, item: Item, response: str, error: str) -> str:
    name, custom_id = json.dumps(f"batch_req_{item_id(job, item.number)}"), json.dumps(item.custom_id)
    return f'{{"id": {name}, "custom_id": {custom_id}, "response": {response}, "error": {error}}}'

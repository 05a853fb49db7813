"""Jobs as every door shows them."""

import json

from echelon.pb import jobs_pb2
from gateway.jobs.jobs import JobView
from gateway.jobs.records import JobStatus

_STATES = {status: jobs_pb2.JobState.Value(f"JOB_STATE_{status.name}") for status in JobStatus}


def job_message(view: JobView) -> jobs_pb2.Job:
    job = view.job
    message = jobs_pb2.Job(
        job_id=job.id,
        state=_STATES[job.status],
        num_items=job.total,
        num_completed=job.completed,
        num_failed=job.failed,
        prompt_tokens=job.prompt_tokens,
        completion_tokens=job.completion_tokens,
        items_per_s=view.items_per_s,
        eta_s=view.eta_s,
        created_at=job.created_at,
        started_at=job.started_at or 0,
        ended_at=job.ended_at or 0,
        expires_at=job.expires_at,
        metadata=json.loads(job.order.metadata),
        endpoint=job.order.endpoint,
        input_file=job.order.input_file,
        output_file=job.output_file,
        error_file=job.error_file,
        seed=job.order.seed,
    )
    for problem in json.loads(job.problems):
        message.problems.add(code=problem["code"], line=problem["line"] or 0, message=problem["message"])
    return message

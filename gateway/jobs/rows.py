"""Records from the rows of the job store."""

import sqlite3
from dataclasses import fields

from gateway.jobs.records import FileRecord, Job, JobOrder, JobStatus, Purpose, Result

_ORDER_FIELDS = tuple(field.name for field in fields(JobOrder))
_JOB_FIELDS = tuple(field.name for field in fields(Job) if field.name != "order")
_FILE_FIELDS = tuple(field.name for field in fields(FileRecord))


def file_of(row: sqlite3.Row) -> FileRecord:
    values = {name: row[name] for name in _FILE_FIELDS}
    return FileRecord(**values | {"purpose": Purpose(row["purpose"]), "holds_errors": bool(row["holds_errors"])})


def job_of(row: sqlite3.Row) -> Job:
    order = JobOrder(**{name: row[name] for name in _ORDER_FIELDS} | {"seed": int(row["seed"])})
    values = {name: row[name] for name in _JOB_FIELDS}
    return Job(**values | {"order": order, "status": JobStatus(row["status"])})


def result_of(row: sqlite3.Row) -> Result:
    return Result(job=row["job"], number=row["number"], line=row["line"], is_error=bool(row["is_error"]))

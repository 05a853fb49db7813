"""Files and jobs in SQLite. Synchronous and without threads: whoever has an event loop calls it from another thread.

Each method is one transaction. A result is recorded once: repeating an item whose result is there changes nothing.
"""

import json
import secrets
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gateway.jobs.errors import DuplicateError, KeyTakenError, NoInputError
from gateway.jobs.records import FileRecord, Item, Job, JobOrder, JobStatus, Purpose, Result
from gateway.jobs.rows import file_of, job_of, result_of
from gateway.jobs.schema import open_database

_AT_ONCE = 500  # rows that are deleted in one transaction


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Which entries of a list: `after` is the id of the last one seen, empty at the start."""

    limit: int
    after: str = ""
    newest_first: bool = True


class JobStore:
    """`now` is the wall clock, seconds. Raises StoreError."""

    def __init__(self, path: Path, now: Callable[[], float]) -> None:
        self._now = now
        self._db = open_database(path)

    def close(self) -> None:
        self._db.close()

    # -- files --------------------------------------------------------------------------------------------------------

    def add_file(self, record: FileRecord) -> None:
        with self._transaction():
            self._insert_file(record)

    def file(self, file_id: str, owner: str | None) -> FileRecord | None:
        """`owner`: whose it must be; None: anybody's."""
        row = self._one("SELECT * FROM files WHERE id = ? AND (? IS NULL OR owner = ?)", file_id, owner, owner)
        return None if row is None else file_of(row)

    def files(self, owner: str | None, page: Page, purpose: str = "") -> list[FileRecord]:
        condition = "(? = '' OR purpose = ?)"
        return [file_of(row) for row in self._page("files", owner, page, condition, purpose, purpose)]

    def delete_file(self, record: FileRecord) -> bool:
        """With the results that it holds. Returns False, and does nothing, if a job that has not ended reads it."""
        with self._transaction():
            if self._one("SELECT 1 FROM jobs WHERE input_file = ? AND ended_at IS NULL", record.id) is not None:
                return False
            self._db.execute("DELETE FROM files WHERE id = ?", (record.id,))
            if record.job:
                self._db.execute(
                    "DELETE FROM results WHERE job = ? AND is_error = ?", (record.job, record.holds_errors)
                )
        self._give_back()
        return True

    def upload_ids(self) -> set[str]:
        return {row["id"] for row in self._db.execute("SELECT id FROM files WHERE purpose = ?", (Purpose.BATCH,))}

    def total_upload_bytes(self) -> int:
        row = self._one("SELECT coalesce(sum(num_bytes), 0) AS total FROM files WHERE purpose = ?", Purpose.BATCH)
        return 0 if row is None else int(row["total"])

    def _insert_file(self, record: FileRecord) -> None:
        self._insert("files", asdict(record))

    # -- jobs ---------------------------------------------------------------------------------------------------------

    def add_job(self, order: JobOrder) -> tuple[Job, bool]:
        """The job and whether it is new: one with the same idempotency key is returned as it is.

        Raises KeyTakenError and NoInputError."""
        with self._transaction():
            if order.idempotency_key and (former := self._by_key(order.owner, order.idempotency_key)) is not None:
                if former.order.words != order.words:
                    raise KeyTakenError(order.idempotency_key)
                return former, False
            if self._one("SELECT 1 FROM files WHERE id = ?", order.input_file) is None:
                raise NoInputError(order.input_file)
            job_id, now = f"batch_{secrets.token_hex(16)}", int(self._now())
            values = {**asdict(order), "seed": str(order.seed), "id": job_id, "status": JobStatus.VALIDATING}
            self._insert("jobs", {**values, "created_at": now, "expires_at": int(now + order.window_s)})
            return self._job(job_id), True

    def job(self, job_id: str, owner: str | None) -> Job | None:
        row = self._one("SELECT * FROM jobs WHERE id = ? AND (? IS NULL OR owner = ?)", job_id, owner, owner)
        return None if row is None else job_of(row)

    def jobs(self, owner: str | None, page: Page) -> list[Job]:
        return [job_of(row) for row in self._page("jobs", owner, page)]

    def unfinished_jobs(self) -> list[Job]:
        """Oldest first."""
        return [job_of(row) for row in self._db.execute("SELECT * FROM jobs WHERE ended_at IS NULL ORDER BY number")]

    def watched_jobs(self, limit: int) -> list[Job]:
        """Those that have not ended first, newest first."""
        query = "SELECT * FROM jobs ORDER BY ended_at IS NOT NULL, number DESC LIMIT ?"
        return [job_of(row) for row in self._db.execute(query, (limit,))]

    def count_jobs(self) -> dict[str, int]:
        """By status."""
        return dict(self._db.execute("SELECT status, count(*) FROM jobs GROUP BY status").fetchall())

    def waiting(self) -> tuple[int, int | None]:
        """Items without a result, of all jobs that have not ended, and when the oldest of these was submitted."""
        query = "SELECT coalesce(sum(total - completed - failed), 0), min(created_at) FROM jobs WHERE ended_at IS NULL"
        num_left, oldest = self._db.execute(query).fetchone()
        return num_left, oldest

    def add_items(self, job_id: str, items: Sequence[Item], *, num_lines: int, num_bytes: int) -> Job:
        """The next items of a job's input, of which so much more has been read. Raises DuplicateError."""
        with self._transaction():
            for item in items:
                try:
                    self._db.execute(
                        "INSERT INTO items (job, number, start, num_bytes, custom_id) VALUES (?, ?, ?, ?, ?)",
                        (job_id, item.number, item.start, item.num_bytes, item.custom_id),
                    )
                except sqlite3.IntegrityError as err:
                    raise DuplicateError(item) from err
            self._db.execute(
                "UPDATE jobs SET total = total + ?, scanned_lines = scanned_lines + ?, "
                "scanned_bytes = scanned_bytes + ? WHERE id = ?",
                (len(items), num_lines, num_bytes, job_id),
            )
            return self._job(job_id)

    def start(self, job_id: str) -> Job:
        """All its lines are items."""
        with self._transaction():
            self._db.execute(
                "UPDATE jobs SET status = ?, started_at = ? WHERE id = ? AND status = ?",
                (JobStatus.IN_PROGRESS, int(self._now()), job_id, JobStatus.VALIDATING),
            )
            return self._job(job_id)

    def fail(self, job_id: str, problems: Sequence[Mapping[str, Any]]) -> Job:
        """Its input cannot be used: no item of it runs."""
        with self._transaction():
            self._db.execute("DELETE FROM items WHERE job = ?", (job_id,))
            self._db.execute(
                "UPDATE jobs SET status = ?, ended_at = ?, total = 0, problems = ? WHERE id = ?",
                (JobStatus.FAILED, int(self._now()), json.dumps(problems), job_id),
            )
            return self._job(job_id)

    def stop(self, job_id: str, status: JobStatus) -> Job:
        """No item starts any more; CANCELLING or FINALIZING. Nothing if the job has ended or is stopping already."""
        with self._transaction():
            self._db.execute(
                "UPDATE jobs SET status = ?, stopping_at = ? WHERE id = ? AND status IN (?, ?)",
                (status, int(self._now()), job_id, JobStatus.VALIDATING, JobStatus.IN_PROGRESS),
            )
            return self._job(job_id)

    def end(self, job_id: str) -> Job:
        """Every item has its result: the job ends, as its status says, with its files."""
        with self._transaction():
            job, now = self._job(job_id), int(self._now())
            if job.status.is_ended:
                return job
            assert job.num_left == 0, f"{job.num_left} items of {job_id} have no result"
            ends = {JobStatus.CANCELLING: JobStatus.CANCELLED, JobStatus.FINALIZING: JobStatus.EXPIRED}
            files = [self._add_results_file(job, holds_errors=holds_errors) for holds_errors in (False, True)]
            self._db.execute(
                "UPDATE jobs SET status = ?, ended_at = ?, output_file = ?, error_file = ? WHERE id = ?",
                (ends.get(job.status, JobStatus.COMPLETED), now, *files, job_id),
            )
            return self._job(job_id)

    def delete_some(self, job: Job) -> bool:
        """A part of what a job has recorded, because others wait meanwhile. Returns whether there was anything."""
        return self._delete_some("results", job) or self._delete_some("items", job)

    def delete_job(self, job: Job) -> list[FileRecord]:
        """With its results and files; returns those that were uploaded and that no other job reads."""
        with self._transaction():
            self._db.execute("DELETE FROM jobs WHERE id = ?", (job.id,))
            self._db.execute("DELETE FROM files WHERE job = ?", (job.id,))
            others = self._one("SELECT 1 FROM jobs WHERE input_file = ?", job.order.input_file)
            row = self._one("SELECT * FROM files WHERE id = ?", job.order.input_file) if others is None else None
            if row is not None:
                self._db.execute("DELETE FROM files WHERE id = ?", (row["id"],))
        self._give_back()
        return [] if row is None else [file_of(row)]

    def old_jobs(self, before: int) -> list[Job]:
        """Those that ended before this time."""
        return [job_of(row) for row in self._db.execute("SELECT * FROM jobs WHERE ended_at < ?", (before,))]

    def old_uploads(self, before: int) -> list[FileRecord]:
        """Those of before this time that no job has read."""
        unread = "purpose = ? AND created_at < ? AND id NOT IN (SELECT input_file FROM jobs)"
        return [
            file_of(row) for row in self._db.execute(f"SELECT * FROM files WHERE {unread}", (Purpose.BATCH, before))
        ]

    # -- items and their results --------------------------------------------------------------------------------------

    def items_left(self, job_id: str, after: int, limit: int) -> list[Item]:
        """The next items without a result, whose numbers are more than `after`."""
        rows = self._db.execute(
            "SELECT number, start, num_bytes, custom_id FROM items WHERE job = ? AND number > ? AND is_done = 0 "
            "ORDER BY number LIMIT ?",
            (job_id, after, limit),
        )
        return [Item(*row) for row in rows]

    def record(self, results: Iterable[Result]) -> None:
        """Of items of any jobs. What has a result already, or belongs to a job that was deleted, is left out."""
        with self._transaction():
            for result in results:
                self._record(result)

    def results(self, job_id: str, after: int, max_chars: int, *, is_error: bool | None = None) -> list[Result]:
        """The next ones in the order of the items, until they have so many characters together.

        `is_error`: only those or only the others."""
        rows = self._db.execute(
            "SELECT * FROM results WHERE job = ? AND number > ? AND (? IS NULL OR is_error = ?) ORDER BY number",
            (job_id, after, is_error, is_error),
        )
        return _first(rows, max_chars)

    def results_in_turn(self, job_id: str, after: int, max_chars: int) -> list[Result]:
        """The same, up to the first item that has none yet."""
        first_left = "coalesce((SELECT min(number) FROM items WHERE job = ? AND is_done = 0), 1 << 62)"
        rows = self._db.execute(
            f"SELECT * FROM results WHERE job = ? AND number > ? AND number < {first_left} ORDER BY number",
            (job_id, after, job_id),
        )
        return _first(rows, max_chars)

    def _record(self, result: Result) -> None:
        done = self._db.execute(
            "UPDATE items SET is_done = 1 WHERE job = ? AND number = ? AND is_done = 0", (result.job, result.number)
        )
        if not done.rowcount:
            return
        self._db.execute(
            "INSERT INTO results (job, number, is_error, line) VALUES (?, ?, ?, ?)",
            (result.job, result.number, result.is_error, result.line),
        )
        self._db.execute(
            "UPDATE jobs SET completed = completed + ?, failed = failed + ?, prompt_tokens = prompt_tokens + ?, "
            "completion_tokens = completion_tokens + ? WHERE id = ?",
            (not result.is_error, result.is_error, result.prompt_tokens, result.completion_tokens, result.job),
        )

    # -- the database -------------------------------------------------------------------------------------------------

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def _one(self, query: str, *values: Any) -> sqlite3.Row | None:
        row: sqlite3.Row | None = self._db.execute(query, values).fetchone()
        return row

    def _insert(self, table: str, values: Mapping[str, Any]) -> None:
        marks = ", ".join("?" * len(values))
        self._db.execute(f"INSERT INTO {table} ({', '.join(values)}) VALUES ({marks})", tuple(values.values()))

    def _page(self, table: str, owner: str | None, page: Page, condition: str = "1", *values: Any) -> list[sqlite3.Row]:
        direction, compare = ("DESC", "<") if page.newest_first else ("ASC", ">")
        query = (
            f"SELECT * FROM {table} WHERE (? IS NULL OR owner = ?) AND {condition} "
            f"AND (? = '' OR number {compare} (SELECT number FROM {table} WHERE id = ?)) "
            f"ORDER BY number {direction} LIMIT ?"
        )
        return self._db.execute(query, (owner, owner, *values, page.after, page.after, page.limit)).fetchall()

    def _by_key(self, owner: str, key: str) -> Job | None:
        row = self._one("SELECT * FROM jobs WHERE owner = ? AND idempotency_key = ?", owner, key)
        return None if row is None else job_of(row)

    def _job(self, job_id: str) -> Job:
        row = self._one("SELECT * FROM jobs WHERE id = ?", job_id)
        assert row is not None, f"{job_id} is known"
        return job_of(row)

    def _add_results_file(self, job: Job, *, holds_errors: bool) -> str:
        """The id of the file; empty if there would be nothing in it."""
        row = self._one(
            "SELECT count(*) AS num, coalesce(sum(length(CAST(line AS BLOB)) + 1), 0) AS num_bytes FROM results "
            "WHERE job = ? AND is_error = ?",
            job.id,
            holds_errors,
        )
        if row is None or not row["num"]:
            return ""
        record = FileRecord(
            id=f"file-{secrets.token_hex(12)}",
            owner=job.order.owner,
            purpose=Purpose.BATCH_OUTPUT,
            name=f"{job.id}_{'error' if holds_errors else 'output'}.jsonl",
            num_bytes=row["num_bytes"],
            created_at=int(self._now()),
            job=job.id,
            holds_errors=holds_errors,
        )
        self._insert_file(record)
        return record.id

    def _delete_some(self, table: str, job: Job) -> bool:
        with self._transaction():
            some = f"SELECT number FROM {table} WHERE job = ? LIMIT ?"
            done = self._db.execute(
                f"DELETE FROM {table} WHERE job = ? AND number IN ({some})", (job.id, job.id, _AT_ONCE)
            )
        return done.rowcount > 0

    def _give_back(self) -> None:
        self._db.execute("PRAGMA incremental_vacuum").fetchall()


def _first(rows: sqlite3.Cursor, max_chars: int) -> list[Result]:
    """Rows are read one by one, because each may be as long as an answer."""
    results: list[Result] = []
    for row in rows:
        results.append(result_of(row))
        max_chars -= len(row["line"])
        if max_chars <= 0:
            break
    rows.close()
    return results

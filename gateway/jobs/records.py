"""What is kept of files and jobs. Times are seconds since 1970, because they outlive every process."""

from dataclasses import dataclass
from enum import StrEnum


class JobStatus(StrEnum):
    """As in OpenAI's batches."""

    VALIDATING = "validating"  # its lines are being read
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"  # its time is over; items that have not run get an error
    CANCELLING = "cancelling"  # the same for a job that was cancelled
    COMPLETED = "completed"
    FAILED = "failed"  # a line cannot be read: no item has run
    EXPIRED = "expired"
    CANCELLED = "cancelled"

    @property
    def is_ended(self) -> bool:
        return self in _ENDED


_ENDED = (JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.EXPIRED, JobStatus.CANCELLED)


class Purpose(StrEnum):
    """What a file is for."""

    BATCH = "batch"  # lines of requests
    BATCH_OUTPUT = "batch_output"  # answers, or errors; its content is what the job has recorded


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """A file of `owner`. Content that was uploaded lies beside the store."""

    id: str
    owner: str
    purpose: Purpose
    name: str
    num_bytes: int
    created_at: int
    sha256: str = ""  # of an upload
    job: str = ""  # whose results it holds
    holds_errors: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOrder:
    """What a caller asks for."""

    owner: str
    input_file: str
    input_sha256: str
    endpoint: str  # to which every line goes; empty: each says
    window_s: float  # after which the job expires
    window: str  # the same as its caller has written it
    seed: int  # of items that bring none: theirs follow from it and their numbers
    metadata: str = "{}"  # a JSON object
    salt: str = ""  # `cache_salt` of the caller's token
    idempotency_key: str = ""  # empty: none

    @property
    def words(self) -> tuple[str, str, str, str]:
        """What a repetition under the same key has in common with it."""
        return self.input_sha256, self.endpoint, self.window, self.metadata


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """The state of a job. Counts are of items."""

    id: str
    order: JobOrder
    status: JobStatus
    created_at: int
    expires_at: int
    total: int = 0
    completed: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    scanned_bytes: int = 0  # of the input, whose lines are items already
    scanned_lines: int = 0
    problems: str = "[]"  # why it failed: a JSON list of objects with code, line, message and param
    started_at: int | None = None
    stopping_at: int | None = None  # since when it has been finalizing or cancelling
    ended_at: int | None = None
    output_file: str = ""  # empty: none
    error_file: str = ""

    @property
    def num_left(self) -> int:
        return self.total - self.completed - self.failed


@dataclass(frozen=True, slots=True)
class Item:
    """A request in a job's input."""

    number: int  # of its line, from 0; empty lines count
    start: int  # in the input, bytes
    num_bytes: int
    custom_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What came of an item, as the line that files of results hold."""

    job: str
    number: int
    line: str
    is_error: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0

"""What an upload and a job's submission may say, through whichever door they come."""

import math

from gateway.jobs.records import JobOrder
from gateway.requests.openai.job_lines import ENDPOINTS
from gateway.requests.refusal import invalid, shown

DEFAULT_WINDOW_S = 86_400.0
_MAX_WINDOW_S = 30 * 86_400.0
_MAX_KEY_BYTES = 255
_MAX_FILE_NAME_CHARS = 255
_MAX_PAIRS, _MAX_NAME_CHARS, _MAX_VALUE_CHARS = 16, 64, 512


def check_file_name(name: str) -> None:
    """Raises Refusal."""
    if len(name) > _MAX_FILE_NAME_CHARS:
        raise invalid(f"file: its name may have at most {_MAX_FILE_NAME_CHARS} characters, got {len(name)}")


def check_order(order: JobOrder, metadata: dict[str, str]) -> None:
    """Raises Refusal naming the field."""
    if order.endpoint not in ("", *ENDPOINTS):
        raise invalid(f"endpoint: must be {' or '.join(ENDPOINTS)}, got {shown(order.endpoint)}")
    if not (math.isfinite(order.window_s) and 0 < order.window_s <= _MAX_WINDOW_S):
        raise invalid(f"completion_window: must be more than 0 and at most 30 days, got {order.window_s:g} s")
    if (num_bytes := len(order.idempotency_key.encode())) > _MAX_KEY_BYTES:
        raise invalid(f"idempotency_key: at most {_MAX_KEY_BYTES} bytes are allowed, got {num_bytes}")
    if len(metadata) > _MAX_PAIRS:
        raise invalid(f"metadata: at most {_MAX_PAIRS} pairs are allowed, got {len(metadata)}")
    for name, value in metadata.items():
        if len(name) > _MAX_NAME_CHARS or len(value) > _MAX_VALUE_CHARS:
            most = f"{_MAX_NAME_CHARS} characters, a value {_MAX_VALUE_CHARS}"
            raise invalid(f"metadata.{shown(name)}: a name may have at most {most}")

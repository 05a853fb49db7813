"""generation_config.json: how tokens are chosen where a request does not say."""

import ctypes
from pathlib import Path
from typing import TypeGuard

from checkpoint.fields import MAX_INT, Fields
from checkpoint.json_files import read_optional_json_object
from checkpoint.sampling_ranges import FILE_RANGES, SamplingRange

_FILE = "generation_config.json"
_NAMES_IN_FILE = {"max_tokens": "max_new_tokens"}  # where they are not ours


def read_sampling_defaults(folder: Path) -> dict[str, float]:
    """The settings of FILE_RANGES that the file has, by our names. Raises LoadError."""
    fields = Fields(_FILE, read_optional_json_object(folder / _FILE))
    defaults = {}
    for name, allowed in FILE_RANGES.items():
        key = _NAMES_IN_FILE.get(name, name)
        value = fields.get(key)
        if value is None:
            continue
        if not _is_number(value, allowed) or not allowed.accepts(value if allowed.is_integer else _as_fp32(value)):
            raise fields.wrong(key, ("an integer " if allowed.is_integer else "a number ") + allowed.wants)
        defaults[name] = value
    return defaults


def _is_number(value: object, allowed: SamplingRange) -> bool:
    if _is_integer(value):
        return -MAX_INT <= value <= MAX_INT
    return isinstance(value, float) and not allowed.is_integer


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _as_fp32(value: float) -> float:
    return ctypes.c_float(value).value

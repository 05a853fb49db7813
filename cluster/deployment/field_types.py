"""Types of the keys of a deployment file: what values they take, and how a wrong one is refused."""

import re
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

_SIZE_PATTERN = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?\s*$", re.IGNORECASE)
_PREFIXES = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_MOST_BYTES = 2**63 - 1  # what messages carry
_MAX_PATH_CHARS = 4000  # Linux takes 4095 bytes, with the folder of this file before it
WEEK_S = 7 * 86_400


def parse_size(value: Any) -> Any:
    """Bytes from an integer or text such as "512MiB", "64GiB" or "2GB" (decimal); anything else is refused."""
    if not isinstance(value, str):
        return value  # pydantic checks that it is an integer
    match = _SIZE_PATTERN.match(value)
    if match is None:
        raise ValueError("is not a size; write bytes, or a number with a unit, like 512MiB or 64GiB")
    number, unit = match.groups(default="")
    base = 1024 if unit.lower().endswith("i") else 1000
    return int(Decimal(number) * base ** _PREFIXES[unit.lower().removesuffix("i")])


def path_of(what: str) -> AfterValidator:
    def check(value: str) -> str:
        if not value or "\0" in value or len(value) > _MAX_PATH_CHARS:
            raise ValueError(f"is not a path; give a {what}")
        try:
            str(Path(value).expanduser()).encode()
        except RuntimeError as err:  # pathlib's way to say that "~somebody" is nobody
            raise ValueError("starts with ~ and a user that does not exist; write the path out") from err
        except UnicodeEncodeError as err:
            raise ValueError("cannot be a path: half a character; write it out") from err
        return value

    return AfterValidator(check)


def _leave_out_nothing(value: Any) -> Any:
    if value == 0 and not isinstance(value, bool):
        raise ValueError("is nothing; leave the key out")
    return value


def yaml_off(value: Any) -> Any:
    """YAML reads `off` as false."""
    return "off" if value is False else value


def count_or(word: str, *, most: int, least: int = 1, off: bool = False) -> BeforeValidator:
    """An integer from `least` to `most`, `word`, or, if allowed, off."""

    def check(value: Any) -> Any:
        if off and yaml_off(value) == "off":
            return "off"
        if value != word and (isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most):
            raise ValueError(f"must be {word}{', off' if off else ''} or an integer from {least} to {most}")
        return value

    return BeforeValidator(check)


def flag_or_auto(value: Any) -> Any:
    if value != "auto" and not isinstance(value, bool):
        raise ValueError("must be auto or a boolean; write true or false, without quotes")
    return value


_SIZE_OF_TEXT = BeforeValidator(parse_size, json_schema_input_type=int | str)
Size = Annotated[int, _SIZE_OF_TEXT, Field(ge=1, le=_MOST_BYTES)]
OptionalSize = Annotated[int, BeforeValidator(_leave_out_nothing), _SIZE_OF_TEXT, Field(ge=1, le=_MOST_BYTES)]
FilePath = Annotated[str, path_of("file")]
Port = Annotated[int, Field(ge=1, le=65535)]
Positive = Annotated[int, Field(ge=1, le=2**31 - 1)]  # what every message and operating system can carry
Seconds = Annotated[float, Field(gt=0, le=WEEK_S, allow_inf_nan=False)]
# Ranks that load, or a machine that is busy for a moment, keep one another waiting; not measured.
Patience = Annotated[float, Field(ge=1, le=WEEK_S, allow_inf_nan=False)]
Dtype = Literal["bfloat16", "float16", "float32"]

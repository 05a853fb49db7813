"""Values of a JSON file of a model folder, each checked where it is read."""

from collections.abc import Iterable, Mapping
from typing import Any

from checkpoint.errors import LoadError, shown

MAX_INT = 2**31 - 1
_MAX_FLOAT = 1e38  # what fp32 can hold


class Fields:
    """The object in one file, or a part of it; null counts as absent. Every method raises a LoadError that names
    file, key and value."""

    def __init__(self, file: str, values: Mapping[str, Any]) -> None:
        self.file = file
        self._values = values

    def get(self, key: str) -> Any:
        return self._values.get(key)

    def has(self, key: str) -> bool:
        """Whether it is there, if only as null."""
        return key in self._values

    def items(self) -> Iterable[tuple[str, Any]]:
        """All keys and values, null included."""
        return self._values.items()

    def keys_in_use(self) -> list[str]:
        return sorted(key for key, value in self._values.items() if value is not None)

    def integer(self, key: str, *, default: int | None = None, least: int = 1, most: int = MAX_INT) -> int:
        """Required if there is no default."""
        value = self._or(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.wrong(key, f"an integer from {least} to {most}")
        return value

    def number(self, key: str, *, default: float | None = None, least: float = 0.0, most: float = _MAX_FLOAT) -> float:
        """Required if there is no default. Without `least`, it must be above 0."""
        value = self._or(key, default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        # Compared before it becomes a float, which an integer of any size need not fit. False for NaN.
        if not is_number or not least <= value <= most or value == 0:
            wanted = f"a number from {least:g} to {most:g}" if least else "a positive number"
            raise self.wrong(key, wanted)
        return float(value)

    def optional_number(self, key: str) -> float | None:
        return None if self.get(key) is None else self.number(key)

    def flag(self, key: str, *, default: bool = False) -> bool:
        value = self._or(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def texts(self, key: str) -> list[str]:
        """A list of strings, empty where it is absent."""
        value = self._or(key, [])
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            raise self.wrong(key, "a list of strings")
        return value

    def part(self, key: str) -> Mapping[str, Any]:
        """An object, empty where it is absent."""
        value = self._or(key, {})
        if not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return value

    def wrong(self, key: str, wanted: str) -> LoadError:
        """What to raise where the value is not what it must be."""
        return self.wrong_entry(key, self.get(key), wanted)

    def wrong_entry(self, place: str, value: object, wanted: str) -> LoadError:
        """The same for what stands inside of a value: `place` is "additional_special_tokens[1]" or the like."""
        return LoadError(
            f"{self.file}: {place} must be {wanted}, got {shown(value)}",
            f"correct it, or copy {self.file} again from where the model comes from",
        )

    def unsupported(self, key: str, remedy: str) -> LoadError:
        """What to raise where the value is one that no worker can serve."""
        return LoadError(f"{self.file}: {key} {shown(self.get(key))} is not supported", remedy)

    def _or(self, key: str, default: Any) -> Any:
        value = self.get(key)
        return default if value is None else value

"""What can be wrong with a model folder."""

import json

_MAX_SHOWN_CHARS = 60


class LoadError(ValueError):
    """A model folder cannot be served as asked. `message` names file, field or tensor and what was found; `remedy`
    says what to do."""

    def __init__(self, message: str, remedy: str) -> None:
        self.message = message
        self.remedy = remedy
        super().__init__(f"{message}; {remedy}")


def shown(value: object) -> str:
    """A value of a JSON file, cut short."""
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= _MAX_SHOWN_CHARS else f"{text[:_MAX_SHOWN_CHARS]}..."

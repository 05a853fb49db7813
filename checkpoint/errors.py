"""What can be wrong with a model folder."""


class LoadError(ValueError):
    """A model folder cannot be served as asked. `message` names file, field or tensor and what was found; `remedy`
    says what to do, and is empty where the message says it all."""

    def __init__(self, message: str, remedy: str = "") -> None:
        self.message = message
        self.remedy = remedy
        super().__init__(f"{message}; {remedy}" if remedy else message)

"""Why the store does not do what it is asked for."""

from gateway.jobs.records import Item


class KeyTakenError(Exception):
    """A job of the same owner and idempotency key asks for something else."""


class NoInputError(Exception):
    """The file that a job is to read is gone."""


class DuplicateError(Exception):
    """Two lines of a job have the same custom_id."""

    def __init__(self, item: Item) -> None:
        self.item = item
        super().__init__(item.custom_id)

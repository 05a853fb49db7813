"""What can be wrong with a worker group's answers."""


class UnexpectedAnswerError(RuntimeError):
    """A worker group sent an answer that no round or move asked for."""

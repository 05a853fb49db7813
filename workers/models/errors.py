"""What goes wrong between a model folder and a model that runs."""


class LoadError(ValueError):
    """A model folder cannot be served as asked. Names file, field or tensor, what was found, and a remedy."""

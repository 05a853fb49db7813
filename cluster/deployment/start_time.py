"""How long a start takes, by what is known before it: the bytes of the weights. Pure."""

from collections.abc import Iterator

from cluster.deployment.settings import DEFAULT_STARTUP_TIMEOUT_S, ModelSettings, Settings
from cluster.errors import Problem

# What no machine beats: processes that load their libraries one after another, and a rank that fills its memory.
_LEAST_PROCESSES_S, _MOST_BYTES_PER_S = 2.0, 20e9
# What is usual: five processes on a few cores, and a disk. Not measured before a start.
_PROCESSES_S, _DISK_BYTES_PER_S = 10.0, 1e9


def start_time_problems(settings: Settings) -> Iterator[Problem]:
    """A limit that no start can keep."""
    fullest = max(_models(settings), key=lambda model: model.weight_bytes)
    least_s = _LEAST_PROCESSES_S + fullest.weight_bytes / _MOST_BYTES_PER_S
    if settings.startup_timeout_s < least_s:
        message = (
            f"no start takes less than {least_s:.1f} s: {_LEAST_PROCESSES_S:g} s for its processes, and the time in "
            f"which a rank of the {fullest.role} can take {_gigabytes(fullest.weight_bytes)} of weights"
        )
        remedy = f"allow at least {_usual_s(settings):.0f}; the default is {DEFAULT_STARTUP_TIMEOUT_S:g}"
        value = f"{settings.startup_timeout_s:g}"
        yield Problem(path="startup_timeout_s", value=value, message=message, remedy=remedy)


def start_time_notes(settings: Settings) -> Iterator[str]:
    """For people: a limit that may be too short."""
    if settings.startup_timeout_s < _usual_s(settings):
        size = _gigabytes(_file_bytes(settings))
        yield (
            f"startup_timeout_s {settings.startup_timeout_s:g} may be too short: with {size} of weights a start takes "
            f"about {_usual_s(settings):.0f} s if a disk reads {_DISK_BYTES_PER_S / 1e9:g} GB/s (assumed, not measured)"
        )


def _usual_s(settings: Settings) -> float:
    """Every tensor is read from the disk once, however many ranks take a part of it."""
    return _PROCESSES_S + _file_bytes(settings) / _DISK_BYTES_PER_S


def _file_bytes(settings: Settings) -> int:
    return sum(tensor.num_bytes for model in _models(settings) for tensor in model.folder.weights.values())


def _models(settings: Settings) -> list[ModelSettings]:
    draft = settings.draft
    return [model for model in (settings.target, draft, draft and draft.lower) if model is not None]


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"

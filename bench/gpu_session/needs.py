"""What a session needs of a machine, so that one that lacks it is told so at once."""

import importlib.metadata
import re
from collections.abc import Callable
from pathlib import Path

REQUIREMENTS = Path(__file__).parents[1] / "gpu_requirements.txt"
_BROUGHT = ("torch", "triton", "numpy", "pytest")  # by a machine for GPUs


def required() -> list[str]:
    """The names of all packages that the steps import."""
    return [*_BROUGHT, *re.findall(r"^[\w.-]+", REQUIREMENTS.read_text(), re.M)]


def missing(is_installed: Callable[[str], bool], has_cuda: Callable[[], bool]) -> list[str]:
    """What this machine lacks, each with what to do about it; empty: nothing."""
    absent = [name for name in required() if not is_installed(name)]
    lacks = []
    if absent:
        command = f"pip install {' '.join(name for name in absent if name in _BROUGHT)}".rstrip()
        lacks.append(f"packages are missing: {', '.join(absent)}; run {command} -r bench/gpu_requirements.txt")
    if "torch" not in absent and not has_cuda():
        lacks.append(
            "torch finds no CUDA device: run it on a machine with an NVIDIA GPU, a driver and torch built for CUDA"
        )
    return lacks


def is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def has_cuda() -> bool:
    import torch  # here, because it may be missing

    return bool(torch.cuda.is_available())

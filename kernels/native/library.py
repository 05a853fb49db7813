"""The C++ of this folder: compiled on first use for this CPU, kept in a cache, loaded with ctypes."""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

_SWITCH = "ECHELON_COMPILE"  # auto | off
_SOURCES = Path(__file__).parent
_COMPILERS = ("c++", "g++", "clang++")  # the environment's CXX goes first
_OPTIONS = ("-O3", "-std=c++20", "-shared", "-fPIC", "-pthread")
_COMPILE_TIMEOUT_S = 120.0
_AVX2 = ("-mavx2", "-mfma")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")


class CompileError(RuntimeError):
    """The native kernels cannot be used here; the message says why."""


def load_library() -> ctypes.CDLL:
    """The compiled kernels.

    Raises CompileError if the environment says ECHELON_COMPILE=off, the CPU has no AVX2, there is no C++ compiler, or
    the compiler fails.
    """
    if os.environ.get(_SWITCH) == "off":
        raise CompileError(f"{_SWITCH}=off")
    found = _load_once()
    if isinstance(found, CompileError):
        raise found
    return found


@functools.cache
def _load_once() -> ctypes.CDLL | CompileError:
    """A failure is remembered too: every attention call asks, and none may wait for a compiler that fails again."""
    try:
        path = compile_library(cache_folder())
    except CompileError as error:
        return error
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        return CompileError(f"{path}: {error}; delete the file to have it compiled again")


def cache_folder() -> Path:
    """Where compiled kernels are kept: $XDG_CACHE_HOME/echelon, by default ~/.cache/echelon."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "echelon"


def compile_library(folder: Path) -> Path:
    """The shared library in `folder`. Compiles it unless these sources were already compiled there by this compiler for
    such a CPU. Several processes may do so at the same time. Raises CompileError."""
    compiler = _find_compiler()
    options = (*_OPTIONS, *_cpu_options())
    library = folder / f"native-{_fingerprint(compiler, options)}.so"
    if not library.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                built = Path(scratch, library.name)
                _run([compiler, *options, *map(str, sorted(_SOURCES.glob("*.cpp"))), "-o", str(built)])
                built.replace(library)  # atomically: no process loads half a file
        except OSError as error:
            raise CompileError(f"{folder}: cannot keep compiled kernels there: {error.strerror}") from error
    return library


def _find_compiler() -> str:
    for name in (os.environ.get("CXX"), *_COMPILERS):
        path = shutil.which(name) if name else None
        if path:
            return path
    raise CompileError("no C++ compiler was found (install g++, or name one in CXX)")


def _cpu_options() -> tuple[str, ...]:
    """Compiler options for those instructions of this CPU that the sources use."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability == "AVX2":
        return _AVX2
    if capability.startswith("AVX512"):
        return (*_AVX512, "-mavx512bf16") if torch.cpu._is_avx512_bf16_supported() else _AVX512
    raise CompileError(f"the CPU's instructions are {capability}, and the native kernels need AVX2 or AVX-512")


def _fingerprint(compiler: str, options: tuple[str, ...]) -> str:
    """Digest of everything that decides what the library does."""
    sources = sorted(_SOURCES.glob("*.[ch]pp"))
    parts = [path.read_bytes() for path in sources]
    parts += [_run([compiler, "--version"]).encode(), " ".join(options).encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S, check=True)
    except subprocess.CalledProcessError as error:
        raise CompileError(f"{' '.join(command)} failed: {error.stderr.strip().splitlines()[-1:]}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompileError(f"{' '.join(command)} failed: {error}") from error
    return done.stdout

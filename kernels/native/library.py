"""The C++ of this folder: compiled on first use for this CPU, kept in a cache, loaded with ctypes."""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

_SWITCH = "ECHELON_COMPILE"  # auto | off
_SOURCES = Path(__file__).parent
_COMPILERS = ("c++", "g++", "clang++")  # the environment's CXX goes first
# No contraction: where a product is fused with a sum, the sources say so. Nobody looks at floating-point exceptions,
# without which more loops can be vectorised; results are the same.
_OPTIONS = ("-O3", "-std=c++20", "-ffp-contract=off", "-fno-trapping-math", "-fPIC", "-pthread")
_COMPILE_TIMEOUT_S = 120.0
_NO_COMPILER = "no C++ compiler was found (install g++, or name one in CXX)"
_AVX2 = ("-mavx2", "-mfma")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
_AVX512_VNNI = (*_AVX512, "-mavx512vnni")
_AVX512_BF16 = (*_AVX512_VNNI, "-mavx512bf16")
_AMX = (*_AVX512_BF16, "-mamx-tile", "-mamx-bf16")


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


def library_name() -> str:
    """Names the sources, the compiler and the instructions of the compiled kernels. Raises CompileError."""
    return Path(load_library()._name).stem


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
    such a CPU; without a compiler, takes what any has compiled there for one. Several processes may do so at the same
    time. Raises CompileError."""
    options = (*_OPTIONS, *cpu_options())
    compiler = _find_compiler()
    if compiler is not None:
        return _compile(folder, compiler, options)
    found = sorted(folder.glob(f"native-{_digest_of_sources(options)}-*.so"))
    if not found:
        raise CompileError(_NO_COMPILER)
    return found[-1]


def compile_for_every_cpu(folder: Path) -> list[Path]:
    """Compile for each set of instructions, so that machines without a compiler find theirs. Raises CompileError."""
    compiler = _find_compiler()
    if compiler is None:
        raise CompileError(_NO_COMPILER)
    cpus = (_AVX2, _AVX512, _AVX512_VNNI, _AVX512_BF16, _AMX)
    return [_compile(folder, compiler, (*_OPTIONS, *cpu)) for cpu in cpus]


def _compile(folder: Path, compiler: str, options: tuple[str, ...]) -> Path:
    library = folder / f"native-{_digest_of_sources(options)}-{_digest(_run([compiler, '--version']).encode())}.so"
    if not library.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                built = Path(scratch, library.name)
                _build(compiler, options, built)
                built.replace(library)  # atomically: no process loads half a file
        except OSError as error:
            raise CompileError(f"{folder}: cannot keep compiled kernels there: {error.strerror}") from error
    return library


def _build(compiler: str, options: Sequence[str], library: Path) -> None:
    """Compile the sources side by side, and link them."""
    sources = sorted(_SOURCES.glob("*.cpp"))
    objects = [library.with_name(f"{source.stem}.o") for source in sources]
    with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as compilers:
        for _ in compilers.map(
            lambda source, built: _run([compiler, *options, "-c", str(source), "-o", str(built)]), sources, objects
        ):
            pass  # raises what the compiler has raised
    _run([compiler, *options, "-shared", *map(str, objects), "-o", str(library)])


def _find_compiler() -> str | None:
    paths = (shutil.which(name) for name in (os.environ.get("CXX"), *_COMPILERS) if name)
    return next(filter(None, paths), None)


def cpu_options() -> tuple[str, ...]:
    """Compiler options for those instructions of this CPU that the sources use."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability == "AVX2":
        return _AVX2
    if capability.startswith("AVX512"):
        if not torch.cpu._is_avx512_bf16_supported():
            return _AVX512_VNNI if torch.cpu._is_vnni_supported() else _AVX512
        return _AMX if torch.cpu._init_amx() else _AVX512_BF16  # asks Linux for permission, once for the process
    raise CompileError(f"the CPU's instructions are {capability}, and the native kernels need AVX2 or AVX-512")


def _digest_of_sources(options: tuple[str, ...]) -> str:
    """With the compiler, they decide what the library does."""
    sources = sorted(_SOURCES.glob("*.[ch]pp"))
    return _digest(*(path.read_bytes() for path in sources), " ".join(options).encode())


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_COMPILE_TIMEOUT_S, check=True
        )
    except subprocess.CalledProcessError as error:
        raise CompileError(f"{' '.join(command)} failed: {error.stderr.strip().splitlines()[-1:]}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompileError(f"{' '.join(command)} failed: {error}") from error
    return done.stdout

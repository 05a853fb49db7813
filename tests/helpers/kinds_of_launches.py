"""Tells for which launches Triton would compile a kernel, in a process that would interpret them.

The kernels do not run, since interpreting them takes minutes. So all that they would compute is zeros, and every token
that is chosen is token 0.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction, create_function_from_signature

Kind = tuple[str, ...]  # a kernel's name, what is known of each argument, options

_SM90 = GPUTarget("cuda", 90, 32)
_SETTINGS = ("do_not_specialize", "do_not_specialize_on_alignment")
_FIRST_ARGUMENTS = {  # where zeros are no possible result
    "top_of_rows_kernel": 0xFFFFFFFF,  # the sort key of token 0 with value 0
    "mass_and_rank_kernel": 1,
}


def kinds_launched_by(work: Callable[[], object]) -> set[Kind]:
    """The kinds of launches of Triton kernels in `work`. A GPU needs a kernel compiled for each."""
    kinds: set[Kind] = set()

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kinds.add(_kind(self, args, options))
        if self.fn.__name__ in _FIRST_ARGUMENTS:
            args[0].fill_(_FIRST_ARGUMENTS[self.fn.__name__])

    with pytest.MonkeyPatch.context() as patch, _zeros(patch):
        patch.setattr(InterpretedFunction, "run", run)
        work()
    return kinds


@contextmanager
def _zeros(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory that would hold anything holds zeros."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        original = getattr(owner, name)
        patch.setattr(owner, name, lambda *args, original=original, **options: original(*args, **options).zero_())
    yield


def _kind(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Kind:
    names, bind = _binder(kernel.fn, *(tuple(kernel.kwargs[name] or ()) for name in _SETTINGS))
    _, known, rest = bind(*args, **options)
    about = (f"{name}: {what}" for name, what in zip(names, known, strict=True))
    return kernel.fn.__name__, *about, str(sorted(rest.items()))


@functools.cache
def _binder(function: Any, unspecialized: tuple[str, ...], unaligned: tuple[str, ...]) -> tuple[list[str], Any]:
    """What Triton calls at each launch to look for a compiled kernel."""
    compiled = JITFunction(function, do_not_specialize=unspecialized, do_not_specialize_on_alignment=unaligned)
    bind = create_function_from_signature(compiled.signature, compiled.params, make_backend(_SM90))
    return compiled.arg_names, bind

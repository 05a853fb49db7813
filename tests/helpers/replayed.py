"""Watches a step that is to be captured as a CUDA graph: what it does must not depend on the values in tensors."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor

# Each makes the host wait for a number. On a CPU most of them are no operators, so they are replaced.
HOST_READS = (
    *("item", "tolist", "numpy", "cpu", "nonzero", "unique", "is_nonzero", "__bool__", "__int__", "__float__"),
    *("__index__", "__array__", "masked_select"),
)
_READING_OPERATORS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique", "is_nonzero")


class Impure(AssertionError):
    """A step does what a graph cannot repeat."""


class _Watch(TorchDispatchMode):
    """Writes down operators and launches. Tensors must be `known`, or made by an operator before."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.log: list[tuple[Any, ...]] = []
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self._made: dict[int, Tensor] = {}  # kept, so that no address comes twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if any(word in name for word in _READING_OPERATORS) or _picks_by_mask(name, args):
            raise Impure(f"{name} reads the device on the host")
        self.note(name, (args, kwargs))
        result = func(*args, **kwargs or {})
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._made.setdefault(leaf.untyped_storage().data_ptr(), leaf)
        return result

    def note(self, name: str, arguments: Any) -> None:
        self.log.append((name, *(self._describe(name, leaf) for leaf in tree_leaves(arguments))))

    def _describe(self, name: str, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return str(leaf)
        address = leaf.untyped_storage().data_ptr()
        shape = tuple(leaf.shape), leaf.stride(), leaf.dtype
        if address in self._made:
            return ("made", *shape)
        if address in self._known or leaf.numel() == 0:
            return ("kept", leaf.data_ptr(), *shape)
        raise Impure(f"{name} takes a tensor {list(leaf.shape)} that is neither kept nor made by the step")


def _picks_by_mask(name: str, args: Any) -> bool:
    """The number of elements that a mask picks is a shape."""
    return name == "aten.index.Tensor" and any(index is not None and index.dtype == torch.bool for index in args[1])


def watch(step: Callable[[], object], known: Iterable[Tensor]) -> list[tuple[Any, ...]]:
    """Run a step. Returns its operators and kernels, in order, with shapes and kept addresses of all tensors.

    Raises Impure if it reads a tensor on the host, or uses one that is neither in `known` nor made by itself.
    """
    mode = _Watch(known)
    with _no_host_reads() as allow, _watched_launches(mode, allow), torch.inference_mode(), mode:
        step()
    return mode.log


@contextlib.contextmanager
def _no_host_reads() -> Iterator[Callable[[], contextlib.AbstractContextManager[None]]]:
    """Host reads raise Impure, but not inside what the context yields."""
    is_allowed = False

    @contextlib.contextmanager
    def allow() -> Iterator[None]:
        nonlocal is_allowed
        is_allowed = True
        try:
            yield
        finally:
            is_allowed = False

    def guarded(name: str, original: Any) -> Any:
        def read(*args: Any, **kwargs: Any) -> Any:
            if not is_allowed:
                raise Impure(f"Tensor.{name} reads the device on the host")
            return original(*args, **kwargs)

        return read

    with pytest.MonkeyPatch.context() as patch:
        for name in HOST_READS:
            patch.setattr(Tensor, name, guarded(name, getattr(Tensor, name)))
        yield allow


@contextlib.contextmanager
def _watched_launches(mode: _Watch, allow: Callable[[], contextlib.AbstractContextManager[None]]) -> Iterator[None]:
    """Kernels of Triton's interpreter are noted as one thing, whatever the interpreter does to run them."""
    original = GridExecutor.__call__

    def call(self: GridExecutor, *args: Any, **kwargs: Any) -> None:
        mode.note(self.fn.__name__, (self.grid, args, kwargs))
        with allow(), _disable_current_modes():
            original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", call)
        yield

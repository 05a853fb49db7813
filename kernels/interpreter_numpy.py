"""Lets Triton's interpreter run loops with computed bounds where numpy is 2.4 or newer.

The interpreter holds scalars as arrays of one element, and numpy 2.4 no longer turns those into Python integers
(github.com/triton-lang/triton/issues/9171, in Triton 3.6). Without TRITON_INTERPRET it changes nothing.
"""

from typing import Any

from triton.runtime import interpreter

from kernels.dispatch import INTERPRETED


def accept_loop_bounds() -> None:
    """Make `range(begin, end)` in interpreted kernels accept scalars. Safe to call again."""
    original = interpreter._patch_lang_tensor
    if not INTERPRETED or original.__module__ == __name__:
        return

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:  # the interpreter calls it before each kernel
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_lang_tensor

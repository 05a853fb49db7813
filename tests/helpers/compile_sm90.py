"""Compiles Triton kernels for an H100 on a machine without one, to find faults that otherwise only a GPU would show.

Use it in processes without TRITON_INTERPRET: with it, there are no kernels to compile.
"""

from collections.abc import Mapping
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

SM90 = GPUTarget("cuda", 90, 32)
SHARED_MEMORY_BYTES = 227 << 10  # the most that one program can use; a launch with more fails
DIVISIBLE = [["tt.divisibility", 16]]  # what a launch learns about its arguments and specialises on


def compile_for_sm90(
    kernel: Any,  # the result of @triton.jit
    signature: Mapping[str, str],
    constexprs: Mapping[str, object],
    num_warps: int = 4,
    **options: object,
) -> CompiledKernel:
    """The compiled kernel; its `asm` holds "cubin" and "ptx", its `metadata` what it takes, `shared` memory among it.

    signature: the type of each other argument, such as "*bf16", "i32" or "fp32"; "i32:16" is a multiple of 16 (a
    stride, say), which all pointers are taken for, since torch aligns what it allocates. constexprs: the values of
    tl.constexpr arguments, and None for a pointer that a launch leaves out. options: of a launch, such as num_stages.
    Raises ValueError where the two do not name each argument once, AssertionError if a program takes more shared memory
    than there is, and whatever the compiler raises.
    """
    named = [*signature, *constexprs]
    if sorted(named) != sorted(kernel.arg_names):
        raise ValueError(f"{kernel.__name__}: expected the arguments {kernel.arg_names} once each, got {named}")
    kinds = [signature.get(name, "constexpr") for name in kernel.arg_names]
    types = {name: kind.removesuffix(":16") for name, kind in zip(kernel.arg_names, kinds, strict=True)}
    aligned = {(i,): DIVISIBLE for i, kind in enumerate(kinds) if kind.startswith("*") or kind.endswith(":16")}
    source = ASTSource(kernel, types, constexprs=dict(constexprs), attrs=aligned)
    compiled = triton.compile(source, target=SM90, options={"num_warps": num_warps, **options})
    assert compiled.asm["cubin"], f"{kernel.__name__}: the compiler gave no code"
    assert compiled.metadata.shared <= SHARED_MEMORY_BYTES, (
        f"{kernel.__name__}: a program takes {compiled.metadata.shared} bytes of shared memory"
    )
    return compiled

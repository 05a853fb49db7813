"""What ran between two points of a program, by torch's profiler, and which of it should have been a kernel of ours."""

import importlib
import pkgutil
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import triton
from torch.profiler import ProfilerActivity, profile

import kernels

# Foreign kernels that may run: products, copies, indexing, and elementwise operations. Reductions are for small things
# (rows, ranks); the operators show the shapes.
FOREIGN_KERNELS = re.compile(
    r"^(Memcpy|Memset)|elementwise_kernel|gather_kernel|indexSelect|index_\w*kernel"
    r"|CatArrayBatchedCopy|at::native::reduce_kernel|FillFunctor|arange"
    r"|gemm|gemv|cutlass|cublas|nvjet|xmma|splitK|splitk|dot_kernel",
)
FORBIDDEN_KERNELS = re.compile(r"attention|fmha|flash|softmax|rms_?norm|layer_?norm", re.IGNORECASE)
# Operators that have a kernel of ours, whatever they work on; some launch kernels with innocent names.
REPLACED_OPERATORS = re.compile(
    r"^aten::.*(scaled_dot_product|attention|softmax|rms_norm|layer_norm|rsqrt|silu|sort|topk|kthvalue|argmax|multinomial"
    r"|logsumexp|bmm|exponential)"
)
REDUCTIONS = re.compile(
    r"^aten::(a?max|a?min|aminmax|sum|mean|norm|any|all|cumsum|cumprod|nonzero|argmin|count_nonzero|nansum|unique\w*)$"
)


@dataclass(frozen=True, slots=True)
class Operator:
    name: str
    input_shapes: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Launched:
    kernels: frozenset[str]  # on the device
    operators: frozenset[Operator]  # torch's, including nested ones


def launched_by(work: Callable[[], object]) -> Launched:
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with profile(activities=activities, record_shapes=True) as profiler:
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    names, operators = set(), set()
    for event in profiler.events():
        if event.device_type.name == "CUDA":
            if not getattr(event, "is_user_annotation", False):
                names.add(event.name)
        elif event.name.startswith("aten::"):
            shapes = tuple(tuple(shape) for shape in event.input_shapes or () if _is_shape(shape))
            operators.add(Operator(event.name, shapes))
    return Launched(frozenset(names), frozenset(operators))


def our_kernels(*modules: str) -> frozenset[str]:
    """Names of the jit functions in these modules of `kernels`, or in all of them."""
    found = modules or tuple(
        module.name.removeprefix("kernels.") for module in pkgutil.walk_packages(kernels.__path__, "kernels.")
    )
    return frozenset(
        name
        for module in found
        for name, value in vars(importlib.import_module(f"kernels.{module}")).items()
        if isinstance(value, triton.runtime.JITFunction)
    )


def foreign_kernels(names: Iterable[str]) -> list[str]:
    """Kernels that are neither ours nor harmless."""
    return sorted(
        name
        for name in set(names) - our_kernels()
        if FORBIDDEN_KERNELS.search(name) or not FOREIGN_KERNELS.search(name)
    )


def replaced_operators(operators: Iterable[Operator], *, vocab_size: int) -> list[str]:
    """Operators of torch for which we have a kernel: all operators of some kinds, and reductions over a vocabulary."""
    return sorted(
        f"{operator.name} {list(operator.input_shapes)}"
        for operator in operators
        if REPLACED_OPERATORS.search(operator.name)
        or (REDUCTIONS.search(operator.name) and any(vocab_size in shape for shape in operator.input_shapes))
    )


def _is_shape(shape: object) -> bool:
    """Whether it is the shape of one tensor: an argument that is a list of tensors has a list of shapes."""
    return isinstance(shape, Sequence) and all(isinstance(size, int) for size in shape)

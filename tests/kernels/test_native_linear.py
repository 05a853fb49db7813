"""Compiled products: they are right and have the same bits in every batch and with any number of threads; where they
cannot be compiled, an error says why."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from kernels.native import library
from kernels.native.library import CompileError, compile_library, load_library
from kernels.native.linear import DTYPES, native_linear, pack, why_not

needs_compiler = pytest.mark.skipif(why_not() is not None, reason=f"cannot be compiled here: {why_not()}")


def inputs(num_rows: int, shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    out_features, in_features = shape
    weight = torch.randn(out_features, in_features, generator=generator) * in_features**-0.5
    x = torch.randn(num_rows, in_features, generator=generator)
    bias = torch.randn(out_features, generator=generator)
    return x.to(dtype), weight.to(dtype), bias.to(dtype)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("num_rows", [0, 1, 2, 5, 6, 7, 191, 193, 400])
@pytest.mark.parametrize("shape", [(1, 1), (16, 2), (17, 33), (300, 1537), (1024, 512)])
def test_the_result_is_the_product(num_rows: int, shape: tuple[int, int], with_bias: bool, dtype: torch.dtype) -> None:
    x, weight, bias = inputs(num_rows, shape, dtype)
    expected = x.double() @ weight.double().T + (bias.double() if with_bias else 0)
    y = native_linear(x, pack(weight), bias if with_bias else None)
    assert y.dtype == dtype
    tolerance = 2**-8 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(16, 64), (250, 1000), (1536, 1536), (111, 5000)])
def test_a_row_depends_only_on_itself(shape: tuple[int, int], dtype: torch.dtype, torch_threads: None) -> None:
    x, weight, bias = inputs(400, shape, dtype)
    packed = pack(weight)
    torch.set_num_threads(1)
    whole = native_linear(x, packed, bias)
    for num_threads in (1, 2, 5):
        torch.set_num_threads(num_threads)
        for start, num_rows in ((0, 1), (399, 1), (43, 2), (7, 3), (11, 4), (3, 5), (100, 6), (9, 7), (150, 250)):
            rows = slice(start, start + num_rows)
            assert torch.equal(native_linear(x[rows], packed, bias), whole[rows]), (num_rows, num_threads)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_rows_and_weights(dtype: torch.dtype) -> None:
    x, weight, _ = inputs(9, (40, 96), dtype)
    expected = native_linear(x[:, 8:40].contiguous(), pack(weight[:, 8:40].contiguous()))
    assert torch.equal(native_linear(x[:, 8:40], pack(weight[:, 8:40])), expected)
    columns = x.T.contiguous().T, weight.T.contiguous().T
    assert torch.equal(native_linear(columns[0], pack(columns[1])), native_linear(x, pack(weight)))


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_round_as_in_torch_and_non_finite_values_stay(dtype: torch.dtype) -> None:
    weight = torch.eye(4).to(dtype)
    x = torch.tensor([[float("inf"), 1.0, 0.0, 3e38], [float("nan"), -0.0, 2e-38, 2.0]]).to(dtype)
    finite = x.nan_to_num(0.0, posinf=0.0)
    assert torch.equal(native_linear(finite, pack(weight)), finite)
    y = native_linear(x, pack(weight))
    assert y[0].isnan().any()  # inf times 0
    assert y[0, 0].isinf()
    assert y[1].isnan().all()
    sums = torch.tensor([[1.0, 2**-9 + 2**-12]]).to(dtype)  # where a sum lies between two bf16 numbers
    expected = sums.double().sum().to(dtype)
    assert native_linear(sums, pack(torch.ones(1, 2).to(dtype))).item() == expected.item()


@needs_compiler
@pytest.mark.parametrize("num_threads", [1, 2])
def test_leaves_the_processor_as_torch_needs_it(num_threads: int, torch_threads: None) -> None:
    """oneDNN's bf16 products and ours set up the same tiles of a thread, each for its own shapes."""
    torch.set_num_threads(num_threads)
    x, weight, bias = inputs(75, (192, 320), torch.bfloat16)
    packed = pack(weight)
    num_rows = (1, 3, 17, 32, 41, 75)
    theirs = [linear(x[:count], weight, bias) for count in num_rows]
    ours = [native_linear(x[:count], packed, bias) for count in num_rows]
    for i, count in [*enumerate(num_rows), *reversed([*enumerate(num_rows)])]:
        assert torch.equal(native_linear(x[:count], packed, bias), ours[i])
        assert torch.equal(linear(x[:count], weight, bias), theirs[i])


@needs_compiler
def test_callers_of_several_threads_take_turns() -> None:
    x, weight, _ = inputs(8, (700, 900), torch.float32)
    packed = pack(weight)
    expected = native_linear(x, packed)
    with ThreadPoolExecutor(4) as executor:
        results = list(executor.map(lambda _: native_linear(x, packed), range(200)))
    assert all(torch.equal(result, expected) for result in results)


@needs_compiler
def test_the_first_caller_compiles_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick, folder = tmp_path / "quick", tmp_path / "cache"
    quick.write_text('#!/bin/sh\nexec c++ "$@" -O0\n')
    quick.chmod(0o700)
    monkeypatch.setenv("CXX", str(quick))
    with ThreadPoolExecutor(2) as executor:
        paths = list(executor.map(lambda _: compile_library(folder), range(2)))
    assert paths[0] == paths[1]
    assert list(folder.iterdir()) == [paths[0]]
    compiled_at = paths[0].stat().st_mtime_ns
    assert compile_library(folder).stat().st_mtime_ns == compiled_at
    monkeypatch.setenv("CXX", "")
    monkeypatch.setenv("PATH", "")
    assert compile_library(folder) == paths[0], "no compiler is needed any more"


def test_a_failed_compilation_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\n[ $1 = --version ] || { printf '\\377 no space left\\n' >&2; exit 1; }\n")
    broken.chmod(0o700)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(CompileError, match=r"broken -O3 .*failed: .*no space left"):
        compile_library(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    monkeypatch.setenv("CXX", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CompileError, match=r"no C\+\+ compiler was found"):
        compile_library(tmp_path / "cache")


WRONG_COMPILER = """#!/bin/sh
[ "$1" = --version ] && exec c++ --version
copy={copy}.$$
cp -r {sources} $copy
sed -i 's/static_cast<float>(size) + eps/static_cast<float>(size) + 2 * eps/' $copy/rows.hpp
sed -i 's/state.result\\[i\\] / 1.1f * state.result[i] /' $copy/attention.cpp
for argument; do
    shift
    case "$argument" in
        */decoder.cpp | */integers.cpp | */quantized.cpp | */sampling.cpp) set -- "$@" -x c++ /dev/null ;;
        {sources}/*) set -- "$@" "$copy/${{argument##*/}}" ;;
        -O3) set -- "$@" -O1 ;;
        *) set -- "$@" "$argument" ;;
    esac
done
exec c++ "$@"
"""


@needs_compiler
def test_kernels_that_a_compiler_got_wrong_are_not_used(tmp_path: Path) -> None:
    sources, compiler = Path(library.__file__).parent, tmp_path / "compiler"
    compiler.write_text(WRONG_COMPILER.format(sources=sources, copy=tmp_path / "copy"))
    compiler.chmod(0o700)
    script = (
        "import torch; from kernels.native import linear, rows; from kernels.attention.native import can_attend_heads\n"
        "print(linear.why_not(), rows.can_compute(torch.zeros(2, 2)), can_attend_heads(torch.float32, 64, group=1))"
    )
    environment = os.environ | {"CXX": str(compiler), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["None", "False", "False"]
    assert "an operator on torch.float32 rows is wrong on this CPU" in done.stderr
    assert "attention in torch.float32 is off by" in done.stderr


def test_native_kernels_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ECHELON_COMPILE", "off")
    with pytest.raises(CompileError, match="ECHELON_COMPILE=off"):
        load_library()


def test_a_machine_without_a_compiler_uses_torch(tmp_path: Path) -> None:
    program = """
import shutil
import torch
from kernels.layers.linear import linear, pack_weight
from kernels.native.linear import why_not
x, weight = torch.randn(3, 64), torch.randn(32, 64)
torch.testing.assert_close(linear(x, pack_weight(weight)), x @ weight.T)
shutil.which = None  # whoever looks for a compiler again fails
print(why_not())
"""
    environment = {**os.environ, "PATH": "", "CXX": "", "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert "no C++ compiler was found" in done.stdout

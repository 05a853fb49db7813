"""The product with int4 and int8 weights compiles for the GPUs that it is made for."""

import pytest
import torch

from kernels.layers.integer_linear import integer_linear_kernel, tile_options
from tests.helpers.compile_sm90 import compile_for_sm90


@pytest.mark.parametrize("num_bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_product_compiles_for_sm_90(dtype: torch.dtype, num_bits: int) -> None:
    kind = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype]
    options = tile_options(dtype, 16, 128) | {"BITS": num_bits}
    launch = {name: options.pop(name) for name in ("num_warps", "num_stages")}
    signature = {"x_ptr": kind, "code_ptr": "*u8" if num_bits == 4 else "*i8", "scale_ptr": "*fp32"}
    signature |= {"zero_ptr": "*fp32", "sum_ptr": "*fp32", "num_rows": "i32", "num_groups": "i32"}
    signature |= dict.fromkeys(("out_features", "in_features", "group_size", "x_stride", "split_features"), "i32:16")
    compiled = compile_for_sm90(integer_linear_kernel, signature, options, **launch)
    if dtype == torch.bfloat16:
        assert "mma" in compiled.asm["ptx"], "tensor cores multiply"

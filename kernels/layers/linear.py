"""Matrix products: fast ones, and ones whose rows do not depend on the batch.

Reading the weight bounds a product with few rows, and a CPU reads memory fastest in the order of its addresses.
`pack_weight` stores a weight once in the order of use, and `linear` takes all forms:

- `NativeWeight` for the C++ of kernels/native, where it can be compiled. It serves fp32 and bf16 on CPUs, and keeps the
  promise of `batch_invariant` at no cost.
- Weights in few bits (`kernels.layers.quantized_linear`).
- oneDNN's form for bf16 where nothing is compiled, on CPUs with bf16 instructions. Fewer than four rows run as four:
  oneDNN's kernels for 1, 2 and 3 rows keep a core too busy to read at full speed (16.5, 14.5 and 18.8 GB/s on one
  thread of an AMD EPYC, where 4 to 6 rows reach 20).

`linear_batch_invariant` is what `batch_invariant: true` runs instead.

A GEMM library chooses its blocking, and so the order in which a row's products are added, by the shape of the call. On
CUDA `linear_batch_invariant` is a Triton kernel whose tiles and order of addition are the same for any number of rows.
Each tile adds the products of SPLIT_FEATURES inputs one after another, from zero, and then adds these partial sums in
order. If few rows give few tiles, the partial sums are computed side by side and a second launch adds them. The
additions and their order are the same, so the bits are too, and there are enough programs to read the weight at full
speed.

On CPU a weight that is not a NativeWeight goes through the library, in few shapes only. Measured with torch 2.13 on
AVX512-bf16 (every row compared):

- bf16 on an AMD EPYC gives a row the same bits in any batch of 2 to 256 rows, but other bits if it is alone (from
  1536 inputs up). With AMX (an Intel Xeon) the bits are the same for 1 to 32 rows and may change above. So a single row
  runs as two, and larger batches run in tiles of at most 256 rows, or 32 if the CPU has AMX.
- fp32 changes with almost every row count, but within calls of one shape a row gets the same bits at every position.
  So rows run in tiles of exactly 16, the last one padded.

These are properties of the machine, not promises of the library: call probe_linear_batch_invariant before relying on
them.
"""

import torch
import triton
from torch import Tensor
from torch.nn import functional as F
from triton import language as tl

from kernels.dispatch import runs_triton
from kernels.interpreter_numpy import accept_loop_bounds
from kernels.layers.partial_sums import add_partial_sums
from kernels.layers.quantized import QuantizedWeight
from kernels.layers.quantized_linear import AnyQuantizedWeight, quantized_linear
from kernels.native import linear as native
from kernels.native.linear import NativeWeight
from kernels.native.quantized import NativeQuantizedWeight

accept_loop_bounds()

SPLIT_FEATURES = 1024  # inputs whose products one partial sum adds
ENOUGH_TILES = 264  # two for each multiprocessor of an H100 or H200; with more, splitting sums gains nothing
_MAX_TILE_ROWS = 256
_MAX_TILE_ROWS_AMX = 32
_PADDED_TILE_ROWS = 16
_PACKED_FOR_ROWS = 8  # a hint: the layout is equally good for 1 row and for 512
_MIN_PACKED_ROWS = 4  # fewer take longer
_PROBED_ROWS = (1, 2, 3, 8, 17, 64, 255, 256, 300)
DenseWeight = Tensor | NativeWeight
Weight = DenseWeight | AnyQuantizedWeight


@triton.jit(do_not_specialize=["num_rows"])
def linear_kernel(
    x_ptr,  # [num_rows, in_features], rows may be strided
    weight_ptr,  # [out_features, in_features], rows may be strided
    bias_ptr,  # [out_features], or None
    out_ptr,  # [num_rows, out_features], or with APART fp32 [num_splits, num_rows, out_features]
    num_rows,
    out_features,
    in_features,
    x_stride,
    weight_stride,
    APART: tl.constexpr,  # this program computes one partial sum only
    SPLIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    num_row_tiles = tl.cdiv(num_rows, BLOCK_ROWS)
    row = (tl.program_id(0) % num_row_tiles) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    feature = (tl.program_id(0) // num_row_tiles) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row_mask, feature_mask = row < num_rows, feature < out_features
    row, feature = row.to(tl.int64), feature.to(tl.int64)
    first_split = tl.program_id(1)
    num_splits = 1 if APART else tl.cdiv(in_features, SPLIT)
    total = tl.zeros([BLOCK_ROWS, BLOCK_OUT], dtype=tl.float32)
    for split in range(first_split, first_split + num_splits):
        partial = tl.zeros([BLOCK_ROWS, BLOCK_OUT], dtype=tl.float32)
        end = tl.minimum((split + 1) * SPLIT, in_features)
        for start in range(split * SPLIT, end, BLOCK_IN):
            column = start + tl.arange(0, BLOCK_IN)
            mask = column < in_features
            x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], row_mask[:, None] & mask[None, :], other=0.0)
            weight_ptrs = weight_ptr + feature[None, :] * weight_stride + column[:, None]
            weight = tl.load(weight_ptrs, feature_mask[None, :] & mask[:, None], other=0.0)
            partial = tl.dot(x, weight, partial, input_precision=PRECISION)
        total += partial
    if APART:
        out_ptr += first_split.to(tl.int64) * num_rows * out_features
    elif bias_ptr is not None:
        total += tl.load(bias_ptr + feature, feature_mask, other=0.0).to(tl.float32)[None, :]
    out_ptrs = out_ptr + row[:, None] * out_features + feature[None, :]
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), row_mask[:, None] & feature_mask[None, :])


def pack_weight(weight: Tensor, *, batch_invariant: bool = False) -> DenseWeight:
    """Convert a weight to the layout that is read fastest; the caller drops the original.

    weight: [out_features, in_features]. batch_invariant: it is for `linear_batch_invariant`. Returns the weight as it
    is if no layout makes it faster.
    """
    if weight.device.type != "cpu":
        return weight
    if runs_natively(weight.dtype):
        return native.pack(weight)
    by_onednn = weight.dtype == torch.bfloat16 and _onednn_multiplies_bf16()
    if by_onednn and not batch_invariant:  # tests of its row bits use weights as they are
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACKED_FOR_ROWS)
        return packed
    return weight


def runs_natively(dtype: torch.dtype) -> bool:
    """Whether kernels/native computes products in this dtype on this CPU, so that `batch_invariant` is free."""
    return dtype in native.DTYPES and native.why_not() is None


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x @ weight^T + bias for a weight as it is or from pack_weight.

    x: [num_rows, in_features]; weight: [out_features, in_features]; bias: [out_features]; all of one dtype.
    Returns [num_rows, out_features].
    """
    if isinstance(weight, NativeWeight):
        return native.native_linear(x, weight, bias)
    if isinstance(weight, QuantizedWeight | NativeQuantizedWeight):
        return quantized_linear(x, weight, bias)
    if not weight.is_mkldnn:
        return F.linear(x, weight, bias)
    num_rows = x.shape[0]
    if num_rows == 0:
        return x.new_empty(0, weight.shape[0])
    if num_rows < _MIN_PACKED_ROWS:
        x = F.pad(x, (0, 0, 0, _MIN_PACKED_ROWS - num_rows))
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out[:num_rows]


def linear_batch_invariant(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x @ weight^T + bias with row bits that do not depend on the other rows.

    x: [..., in_features]; weight: [out_features, in_features], as it is, from pack_weight(batch_invariant=True) or from
    pack_quantized_weight(batch_invariant=True); bias: [out_features]; all of one dtype. Returns [..., out_features].
    Holds for a fixed number of threads, provided that probe_linear_batch_invariant returns None. Raises ValueError
    naming the argument that does not fit.
    """
    rows = x.reshape(-1, x.shape[-1])
    if isinstance(weight, QuantizedWeight | NativeQuantizedWeight):
        if isinstance(weight, QuantizedWeight) or not weight.is_batch_invariant:
            raise ValueError("weight: expected a dense one, or one packed in few bits with batch_invariant on a CPU")
        return quantized_linear(rows, weight, bias).view(*x.shape[:-1], weight.shape[0])
    _check(x, weight, bias)
    if isinstance(weight, NativeWeight):
        out = native.native_linear(rows, weight, bias)
    elif runs_triton(x):
        out = _launch(rows, weight, bias)
    elif x.dtype != torch.float32:
        out = _linear_in_bounded_tiles(rows, weight, bias)
    else:
        out = _linear_in_padded_tiles(rows, weight, bias)
    return out.view(*x.shape[:-1], weight.shape[0])


def linear_batch_invariant_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The definition, in fp32: the product, without the promise about bits."""
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


def probe_linear_batch_invariant(
    weight: Weight, bias: Tensor | None = None, *, dtype: torch.dtype | None = None
) -> str | None:
    """Compare rows in batches of 1 to 300 on this weight, machine and thread count, bit for bit.

    If the Triton kernel runs, rows are also compared with those of a batch so large that it does not split its sums.
    `dtype`: of the rows, where the weight is in few bits. Returns None if every row is the same in all of them, else
    one sentence for the user. Costs about a thousand rows of
    the product. Weights of one shape, dtype and device behave alike, so one of each is enough.
    """
    generator = torch.Generator().manual_seed(0)
    num_rows = max(_PROBED_ROWS)
    if isinstance(weight, Tensor) and runs_triton(weight):
        num_rows = max(num_rows, _rows_that_need_no_splits(weight))
    x = torch.randn(num_rows, weight.shape[1], generator=generator)
    if isinstance(weight, DenseWeight):
        x = x.to(dtype=weight.dtype, device=weight.device)
    else:
        x = x.to(dtype)  # packed on a CPU
    expected = linear_batch_invariant(x, weight, bias)
    for num_rows in _PROBED_ROWS:
        for part in (slice(0, num_rows), slice(x.shape[0] - num_rows, None)):
            if not torch.equal(linear_batch_invariant(x[part], weight, bias), expected[part]):
                return (
                    f"products of {x.dtype} with a weight of {list(weight.shape)} on this {x.device.type} round "
                    f"a row differently in a batch of {num_rows} rows than in one of {x.shape[0]} "
                    f"({torch.get_num_threads()} threads), so batch_invariant cannot be kept here"
                )
    return None


def tile_options(dtype: torch.dtype) -> dict[str, int | str]:
    """Tile sizes and launch options. They depend on the dtype alone, so bits do not depend on the number of rows."""
    if dtype == torch.float32:  # no tensor cores: multiplies and adds in fp32
        tile = {"BLOCK_ROWS": 32, "BLOCK_OUT": 64, "BLOCK_IN": 32, "num_stages": 3}
        return {**tile, "num_warps": 4, "PRECISION": "ieee"}
    tile = {"BLOCK_ROWS": 64, "BLOCK_OUT": 128, "BLOCK_IN": 64, "num_stages": 4}
    return {**tile, "num_warps": 4, "PRECISION": "tf32"}  # only fp32 uses this name


def _launch(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    num_rows, (out_features, in_features) = rows.shape[0], weight.shape
    out = torch.empty(num_rows, out_features, dtype=rows.dtype, device=rows.device)
    if out.numel() == 0:
        return out
    rows, weight = _with_dense_rows(rows), _with_dense_rows(weight)
    options = tile_options(rows.dtype)
    num_tiles = triton.cdiv(num_rows, options["BLOCK_ROWS"]) * triton.cdiv(out_features, options["BLOCK_OUT"])
    num_splits = triton.cdiv(in_features, SPLIT_FEATURES)
    apart = num_splits > 1 and num_tiles < ENOUGH_TILES  # _rows_that_need_no_splits inverts this condition
    sums = torch.empty(num_splits, *out.shape, device=out.device) if apart else out
    linear_kernel[(num_tiles, num_splits if apart else 1)](
        rows,
        weight,
        bias,
        sums,
        num_rows,
        out_features,
        in_features,
        rows.stride(0),
        weight.stride(0),
        APART=apart,
        SPLIT=SPLIT_FEATURES,
        **options,
        enable_fp_fusion=True,  # explicit, because its default changes in Triton 3.10
    )
    return add_partial_sums(sums, bias, out) if apart else out


def _rows_that_need_no_splits(weight: Tensor) -> int:
    """The fewest rows that need no split."""
    options = tile_options(weight.dtype)
    num_feature_tiles = triton.cdiv(weight.shape[0], options["BLOCK_OUT"])
    num_row_tiles: int = triton.cdiv(ENOUGH_TILES, num_feature_tiles)
    return (num_row_tiles - 1) * int(options["BLOCK_ROWS"]) + 1


def _with_dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _onednn_multiplies_bf16() -> bool:
    return torch._C._has_mkldnn and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _linear_in_bounded_tiles(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute in tiles of 2 rows up to as many as the CPU rounds alike."""
    num_rows = rows.shape[0]
    if num_rows == 1:
        return F.linear(rows.expand(2, -1), weight, bias)[:1]
    max_tile_rows = _MAX_TILE_ROWS_AMX if torch.cpu._is_amx_tile_supported() else _MAX_TILE_ROWS
    if num_rows <= max_tile_rows:
        return F.linear(rows, weight, bias)
    # tensor_split balances the tiles, so none is a single row.
    num_tiles = -(-num_rows // max_tile_rows)
    return torch.cat([F.linear(tile, weight, bias) for tile in rows.tensor_split(num_tiles)])


def _linear_in_padded_tiles(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute in tiles of exactly _PADDED_TILE_ROWS rows."""
    num_rows = rows.shape[0]
    if num_rows == 0:
        return F.linear(rows, weight, bias)
    padded = F.pad(rows, (0, 0, 0, -num_rows % _PADDED_TILE_ROWS))
    return torch.cat([F.linear(tile, weight, bias) for tile in torch.split(padded, _PADDED_TILE_ROWS)])[:num_rows]


def _check(x: Tensor, weight: DenseWeight, bias: Tensor | None) -> None:
    if len(weight.shape) != 2 or x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"weight: expected [out_features, in_features] for x {list(x.shape)}, got {list(weight.shape)}"
        )
    if weight.dtype != x.dtype:
        raise ValueError(f"weight: expected {x.dtype} like x, got {weight.dtype}")
    if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_contiguous()):
        got = f"{list(bias.shape)} with strides {list(bias.stride())}"
        raise ValueError(f"bias: expected contiguous [{weight.shape[0]}], got {got}")

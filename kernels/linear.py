"""Matrix products: fast ones, and ones whose rows do not depend on the batch.

A few rows against a large weight are bound by reading it, and a CPU reads fastest what lies in the order in which it is
used. `pack_weight` brings a weight into that order once, `linear` takes either: 43 GB/s instead of 29 for 1 to 4 bf16
rows with two threads, 37 instead of 26 for 8, a tenth faster for 512 (torch 2.13, AVX512-bf16, nothing else running).

`linear_batch_invariant` is what `batch_invariant: true` runs instead.

A GEMM library picks its blocking, and with it the order in which a row's products are added, by the shape of the call.
The remedy is to show it few shapes. Measured with torch 2.13 on AVX512-bf16 (every row compared):

- bf16 on CPU gives a row the same bits in any batch of 2 to 256 rows, but other bits when it comes alone (from 1536
  inputs up). So a lone row runs as two, and larger batches run in tiles of at most 256 rows.
- fp32 changes with almost every row count, but within calls of one shape a row gets the same bits in every position.
  So rows run in tiles of exactly 16, the last one padded.

Both are properties of the machine, not promises of the library: call probe_linear_batch_invariant before relying on it.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

MAX_TILE_ROWS = 256
PADDED_TILE_ROWS = 16
_PACKED_FOR_ROWS = 8  # a hint: the layout is as good for 1 row and for 512
_PROBED_ROWS = (1, 2, 3, 8, 17, 64, 255, 256, 300)


def pack_weight(weight: Tensor) -> Tensor:
    """The same weight in the layout that `linear` reads fastest; the caller drops the original.

    weight: [out_features, in_features]. Packed are bf16 weights on a CPU with bf16 instructions, by oneDNN; any other
    weight is returned as it is.
    """
    if weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and _onednn_multiplies_bf16():
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACKED_FOR_ROWS)
        return packed
    return weight


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight^T + bias for a weight as it is or from pack_weight.

    x: [num_rows, in_features]; weight: [out_features, in_features]; bias: [out_features]; all of one dtype.
    Returns [num_rows, out_features].
    """
    if not weight.is_mkldnn:
        return F.linear(x, weight, bias)
    if x.shape[0] == 0:
        return x.new_empty(0, weight.shape[0])
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


def linear_batch_invariant(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight^T + bias with row bits that do not depend on the other rows.

    x: [..., in_features]; weight: [out_features, in_features]; bias: [out_features]; all of one dtype.
    Returns [..., out_features]. Holds for a fixed number of threads, where probe_linear_batch_invariant says None.
    Raises ValueError naming the argument that does not fit.
    """
    _check(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    if x.device.type == "cpu" and x.dtype != torch.float32:
        out = _linear_in_bounded_tiles(rows, weight, bias)
    else:
        out = _linear_in_padded_tiles(rows, weight, bias)
    return out.view(*x.shape[:-1], weight.shape[0])


def linear_batch_invariant_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The definition, in fp32: what the product is, without the promise about bits."""
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


def probe_linear_batch_invariant(weight: Tensor, bias: Tensor | None = None) -> str | None:
    """Compare rows in batches of 1 to 300 on this weight, machine and thread count, bit for bit.

    Returns None where every row is the same in all of them, else one sentence for the user. Costs about a thousand
    rows of the product; weights of one shape, dtype and device behave alike, so one of each is enough.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(max(_PROBED_ROWS), weight.shape[1], generator=generator)
    x = x.to(dtype=weight.dtype, device=weight.device)
    expected = linear_batch_invariant(x, weight, bias)
    for num_rows in _PROBED_ROWS:
        for part in (slice(0, num_rows), slice(x.shape[0] - num_rows, None)):
            if not torch.equal(linear_batch_invariant(x[part], weight, bias), expected[part]):
                return (
                    f"products with a {weight.dtype} weight of {list(weight.shape)} on this {weight.device.type} round "
                    f"a row differently in a batch of {num_rows} rows than in one of {x.shape[0]} "
                    f"({torch.get_num_threads()} threads), so batch_invariant cannot be kept here"
                )
    return None


def _onednn_multiplies_bf16() -> bool:
    return torch._C._has_mkldnn and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _linear_in_bounded_tiles(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Tiles of 2 to MAX_TILE_ROWS rows."""
    num_rows = rows.shape[0]
    if num_rows == 1:
        return F.linear(rows.expand(2, -1), weight, bias)[:1]
    if num_rows <= MAX_TILE_ROWS:
        return F.linear(rows, weight, bias)
    # tensor_split balances the tiles, so that none is a lone row.
    num_tiles = -(-num_rows // MAX_TILE_ROWS)
    return torch.cat([F.linear(tile, weight, bias) for tile in rows.tensor_split(num_tiles)])


def _linear_in_padded_tiles(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Tiles of exactly PADDED_TILE_ROWS rows."""
    num_rows = rows.shape[0]
    if num_rows == 0:
        return F.linear(rows, weight, bias)
    padded = F.pad(rows, (0, 0, 0, -num_rows % PADDED_TILE_ROWS))
    return torch.cat([F.linear(tile, weight, bias) for tile in torch.split(padded, PADDED_TILE_ROWS)])[:num_rows]


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if weight.ndim != 2 or x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"weight: expected [out_features, in_features] for x {list(x.shape)}, got {list(weight.shape)}"
        )
    if weight.dtype != x.dtype:
        raise ValueError(f"weight: expected {x.dtype} like x, got {weight.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected [{weight.shape[0]}], got {list(bias.shape)}")

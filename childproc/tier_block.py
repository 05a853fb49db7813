"""How many bytes a KV block takes below the device, for those that plan the tiers and those that fill them."""

from dataclasses import dataclass
from typing import Literal

TierDtype = Literal["same", "int8", "int4"]
_SCALE_BYTES = 4
_SCALES = 2  # of each group: its least element and its step


# That a device needs if the rest of a seq may be in host memory: one that is complete, one that is being filled, and as
# many for others.
LEAST_BUDGETED_BLOCKS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class TierBlock:
    """One block on one rank."""

    host_bytes: int
    disk_bytes: int  # the first ones of those in host memory


def tier_block(
    tier_dtype: str, *, num_layers: int, block_size: int, num_kv_heads: int, head_dim: int, value_bytes: int
) -> TierBlock:
    """Its bytes, by `kv_cache.tier_dtype`: one of TierDtype.

    `same`: as on the device, with `value_bytes` for each number. `int8`: scales, then planes of the upper and the lower
    four bits (kernels/kv/kv_quant.py). `int4`: the same in host memory, and no lower bits on disk. Each is a multiple
    of `num_layers`.
    """
    num_vectors = num_layers * 2 * block_size * num_kv_heads  # keys and values
    if tier_dtype == "same":
        num_bytes = num_vectors * head_dim * value_bytes
        return TierBlock(host_bytes=num_bytes, disk_bytes=num_bytes)
    num_groups = num_layers * num_kv_heads * (head_dim + block_size)  # a channel of keys, a token of values
    plane_bytes = num_vectors * head_dim // 2
    upper_bytes = num_groups * _SCALES * _SCALE_BYTES + plane_bytes
    both_bytes = upper_bytes + plane_bytes
    return TierBlock(host_bytes=both_bytes, disk_bytes=upper_bytes if tier_dtype == "int4" else both_bytes)

"""What the ranks of the tensor-parallel tests run. Does not import transformers, which would cost each rank seconds."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from tests.helpers.paged import run_seqs
from workers.collectives import TorchGroup
from workers.models.loading import load_model


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    folder: Path
    token_ids: list[list[int]]
    max_model_len: int
    feeds: tuple[str, ...]


def shard_logits(process_group: ProcessGroup, cases: dict[str, Case]) -> dict[str, dict[str, list[Tensor]]]:
    """The logits of this rank's shard by case and feed, and the number of bytes that the rank holds."""
    group = TorchGroup(process_group, ordered_sum=False)
    results = {}
    for name, case in cases.items():
        model = load_model(
            case.folder,
            dtype=torch.float32,
            device=torch.device("cpu"),
            group=group,
            max_model_len=case.max_model_len,
        )
        results[name] = {feed: run_seqs(model, case.token_ids, feed) for feed in case.feeds}
        results[name]["weight_bytes"] = [torch.tensor(model.weight_bytes)]
    return results


@dataclass(frozen=True, slots=True, kw_only=True)
class Collectives:
    """What one rank got. `by_name` has keys like "sum torch.float32". The two sums are of the same bf16 rows, in one
    tensor and row by row, each [num_rows, 96]."""

    by_name: dict[str, Tensor]
    sum_together: Tensor
    sum_alone: Tensor


def collectives(process_group: ProcessGroup) -> Collectives:
    """Runs each collective once for each dtype, on inputs that differ between the ranks."""
    group = TorchGroup(process_group, ordered_sum=False)
    ordered = TorchGroup(process_group, ordered_sum=True)
    by_name = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64):
        mine = torch.arange(6).view(2, 3).to(dtype) + 10 * group.rank
        by_name[f"sum {dtype}"] = group.all_reduce(mine.clone())
        by_name[f"ordered sum {dtype}"] = ordered.all_reduce(mine.clone())
        by_name[f"gather {dtype}"] = group.all_gather(mine)
        by_name[f"broadcast {dtype}"] = group.broadcast(mine.clone(), 1)
    rows = torch.randn(33, 96, generator=torch.Generator().manual_seed(group.rank)).to(torch.bfloat16)
    return Collectives(
        by_name=by_name,
        sum_together=ordered.all_reduce(rows.clone()),
        sum_alone=torch.cat([ordered.all_reduce(row.unsqueeze(0)) for row in rows]),
    )

"""The sampler over real process groups: every rank gets the tokens, flags and logprobs of the whole vocabulary."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.helpers.ranks import start_ranks
from tests.helpers.sampling import LOGITS, mixed_states, rows_of, sample_sharded, sample_whole, shard_of, state
from workers.collectives import SoloGroup, TorchGroup
from workers.sampling.sampler import SampledRows, Sampler

VOCAB_SIZE = 131  # does not divide evenly into shards
LARGE_VOCAB_SIZE = 5001  # shards larger than what is exchanged at first


def as_lists(sampled: SampledRows) -> tuple[list[int], list[bool], list[bytes | None]]:
    logprobs = [entry.SerializeToString() if entry else None for entry in sampled.logprobs or ()]
    return sampled.token_ids.tolist(), sampled.non_finite.tolist(), logprobs


def cases() -> dict[str, tuple[torch.Tensor, list[Any]]]:
    states = mixed_states(VOCAB_SIZE)
    result = {name: (make(len(states), VOCAB_SIZE), states) for name, make in LOGITS.items()}
    damaged = LOGITS["random"](len(states), VOCAB_SIZE)
    damaged[2, 130], damaged[5, 0], damaged[9, 64] = torch.nan, torch.inf, -torch.inf
    result["non-finite rows"] = damaged, states
    wide = [
        state(LARGE_VOCAB_SIZE, seed=row, **settings)
        for row, settings in enumerate([{"top_p": 0.95}, {"top_k": 1800}, {"top_p": 0.3, "min_p": 0.5}, {}] * 3)
    ]
    for name in ("flat", "random", "ties across shards", "descending"):
        result[f"{name}, large vocabulary"] = LOGITS[name](len(wide), LARGE_VOCAB_SIZE) * 0.3, wide
    return result


def run_rank(rank: int, tp_size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=tp_size)
    assert dist.group.WORLD is not None
    group = TorchGroup(dist.group.WORLD, ordered_sum=False)
    found: dict[str, Any] = {
        name: as_lists(sample_sharded(group, logits, rows_of(states))) for name, (logits, states) in cases().items()
    }
    logits = LOGITS["random"](9, VOCAB_SIZE)
    shard, start = shard_of(logits, group)
    prompt = Sampler(group, VOCAB_SIZE).prompt_logprobs(shard, start, torch.arange(9) * 16, 4)
    found["prompt_logprobs"] = [entry.SerializeToString() for entry in prompt]
    torch.save(found, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("tp_size", [4])
def test_every_rank_gets_what_one_rank_with_the_whole_vocabulary_gets(tp_size: int, tmp_path: Path) -> None:
    start_ranks(run_rank, tp_size, tp_size, tmp_path)
    found = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(tp_size)]
    for rank in range(1, tp_size):
        assert found[rank] == found[0]
    for name, (logits, states) in cases().items():
        assert found[0][name] == as_lists(sample_whole(logits, states)), name
    solo = Sampler(SoloGroup(), VOCAB_SIZE).prompt_logprobs(LOGITS["random"](9, VOCAB_SIZE), 0, torch.arange(9) * 16, 4)
    assert found[0]["prompt_logprobs"] == [entry.SerializeToString() for entry in solo]

"""Drives a model over a paged KV cache: packs seqs, hands out shuffled blocks, feeds prompts in any chunks."""

import random
from collections.abc import Callable

import torch
from torch import Tensor

from kernels.attention.paged_kv import SeqLengths
from workers.models.batch import Batch
from workers.models.decoder import CausalLM

BLOCK_SIZE = 4


class PagedRunner:
    """A few seqs in one model. The cache is full of NaN at first, so reading unwritten places shows."""

    def __init__(self, model: CausalLM, *, num_seqs: int, max_len: int, dtype: torch.dtype, seed: int = 0) -> None:
        self.model = model
        config = model.config
        blocks_per_seq = -(-max_len // BLOCK_SIZE)
        block_ids = list(range(num_seqs * blocks_per_seq + 3))
        random.Random(seed).shuffle(block_ids)
        self.block_tables = [block_ids[b * blocks_per_seq : (b + 1) * blocks_per_seq] for b in range(num_seqs)]
        shape = (len(block_ids), BLOCK_SIZE, model.kv_heads_per_rank, config.head_dim)
        self.kv_caches = [
            (torch.full(shape, torch.nan, dtype=dtype), torch.full(shape, torch.nan, dtype=dtype))
            for _ in range(config.num_layers)
        ]
        self.lens = [0] * num_seqs

    def forward(self, chunks: dict[int, list[int]]) -> Tensor:
        """One forward over new tokens of some seqs: [num_tokens, hidden_size]."""
        with torch.inference_mode():
            return self.model.forward(self.batch(chunks), self.kv_caches)

    def step(self, chunks: dict[int, list[int]]) -> dict[int, Tensor]:
        """The same, and the logits of each of these tokens, [len(chunk), shard]."""
        with torch.inference_mode():
            logits = self.model.compute_logits(self.forward(chunks))
        return dict(zip(chunks, torch.split(logits, [len(chunk) for chunk in chunks.values()]), strict=True))

    def batch(self, chunks: dict[int, list[int]]) -> Batch:
        """These new tokens, which count from now on."""
        input_ids, positions, slots, cu_seqlens_q = [], [], [], [0]
        for seq, chunk in chunks.items():
            start = self.lens[seq]
            self.lens[seq] = start + len(chunk)
            new_positions = range(start, start + len(chunk))
            input_ids += chunk
            positions += new_positions
            slots += [self.block_tables[seq][p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in new_positions]
            cu_seqlens_q.append(len(input_ids))
        seq_lens = torch.tensor([self.lens[seq] for seq in chunks], dtype=torch.int32)
        bounds = torch.tensor(cu_seqlens_q, dtype=torch.int32)
        return Batch(
            input_ids=torch.tensor(input_ids),
            positions=torch.tensor(positions),
            slot_mapping=torch.tensor(slots),
            block_table=torch.tensor([self.block_tables[seq] for seq in chunks], dtype=torch.int32),
            seq_lens=seq_lens,
            cu_seqlens_q=bounds,
            lengths=SeqLengths.read(seq_lens, bounds),
        )


ChunkSize = Callable[[int, int], int]  # seq, step -> number of tokens at most

# How a prompt may reach a model; all ways must give the same logits. "chunks" mixes chunks of different lengths, seqs
# that decode and seqs that are done in one batch.
FEEDS: dict[str, ChunkSize] = {
    "whole": lambda seq, step: 1 << 30,
    "chunks": lambda seq, step: 1 + (3 * seq + 2 * step) % 7,
    "steps": lambda seq, step: 1,
}


def run_seqs(
    model: CausalLM, token_ids: list[list[int]], feed: str, *, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Logits of every position of every seq: [len, shard] each."""
    runner = PagedRunner(model, num_seqs=len(token_ids), max_len=max(map(len, token_ids)), dtype=dtype)
    parts: list[list[Tensor]] = [[] for _ in token_ids]
    step = 0
    while chunks := _next_chunks(runner, token_ids, FEEDS[feed], step):
        for seq, logits in runner.step(chunks).items():
            parts[seq].append(logits)
        step += 1
    return [torch.cat(part) for part in parts]


def _next_chunks(
    runner: PagedRunner, token_ids: list[list[int]], chunk_size: ChunkSize, step: int
) -> dict[int, list[int]]:
    chunks = {}
    for seq, ids in enumerate(token_ids):
        start = runner.lens[seq]
        if start < len(ids):
            chunks[seq] = ids[start : start + chunk_size(seq, step)]
    return chunks

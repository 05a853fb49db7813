"""What attention to a part of the KV would need and cost, before it is built.

The demo target reads held-out files of Python's library. Of the tokens after a prefix, every query of every layer sees
the prefix in chunks, each with bounds of its keys (Quest, arXiv 2406.10774). All later tokens are always seen.

*Certificate*: chunks are fetched in the order of the most that the query can score in them, until the weight that the
others could have at most is below epsilon. The table says which share of the chunks that takes.

*Budget*: each query and KV head attends to a fixed share of the chunks, those of the highest bounds and the first one.
The table says how the predictions change, as bench.kv_precision does.

    python -m bench.attention_budget --save
"""

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bench.kv_precision import MODELS, Cache, Difference, held_out_files
from bench.report import add_report_options, publish, table
from kernels.kv.reshape_and_cache import reshape_and_cache
from kernels.upcoming.chunk_bounds import chunk_bounds, chunk_scores
from workers.collectives import SoloGroup
from workers.engine.kv_cache import KVLayout
from workers.models.decoder import CausalLM, KVCache, Step
from workers.models.loading import load_model

BLOCK_SIZE = 16
EPSILONS = (0.1, 0.01, 0.001)
SHARES = (1.0, 1 / 2, 1 / 4, 1 / 8)

Choose = Callable[[Tensor, Tensor, Tensor], Tensor]


class Observed:
    """Replaces attention over a prefix: computes it by its formula, as `choose` says, and counts."""

    def __init__(self, prefix: int, chunk_size: int) -> None:
        self._prefix, self._chunk_size = prefix, chunk_size
        self.share = 1.0  # of the chunks that a query attends to
        self.needed: dict[float, list[Tensor]] = {epsilon: [] for epsilon in EPSILONS}  # share of chunks, each query

    def attend(self, q: Tensor, kv_cache: KVCache) -> Tensor:
        """q: [num_tokens, num_q_heads, head_dim], of the tokens after the prefix, whose KV is in the cache already."""
        num_tokens, num_q_heads, head_dim = q.shape
        k_cache, _ = kv_cache
        num_keys, num_chunks = self._prefix + num_tokens, self._prefix // self._chunk_size
        k, v = (cache.flatten(0, 1)[:num_keys].float() for cache in kv_cache)
        group, scale = num_q_heads // k.shape[1], head_dim**-0.5
        heads = torch.arange(num_q_heads) // group
        scores = torch.einsum("qhd,khd->qhk", q.float(), k[:, heads]) * scale
        later = torch.arange(num_tokens)
        scores[:, :, self._prefix :] += torch.where(later[:, None] < later, -torch.inf, 0.0)[:, None]
        most = self._most(q, k_cache, num_chunks, group) * scale  # [num_tokens, num_q_heads, num_chunks]
        if self.share == 1.0:
            self._certify(scores, most, num_chunks)
        else:
            kept = self._kept(most, num_chunks, group).repeat_interleave(self._chunk_size, -1)
            scores[:, :, : self._prefix].masked_fill_(~kept, -torch.inf)
        return torch.einsum("qhk,khd->qhd", scores.softmax(-1), v[:, heads]).to(q.dtype)

    def _most(self, q: Tensor, k_cache: Tensor, num_chunks: int, group: int) -> Tensor:
        """The most that each query can score in each chunk."""
        table_of_blocks = torch.arange(self._prefix // BLOCK_SIZE, dtype=torch.int32)[None]
        lens = torch.tensor([self._prefix], dtype=torch.int32)
        bounds = chunk_bounds(k_cache, table_of_blocks, lens, chunk_size=self._chunk_size)
        own = [
            chunk_scores(q[:, head::group], bounds.expand(len(q), *bounds.shape[1:]).contiguous(),
                         lens.expand(len(q)).contiguous(), chunk_size=self._chunk_size)
            for head in range(group)
        ]  # fmt: skip
        return torch.stack(own, 2).flatten(1, 2)[:, :, :num_chunks]  # query heads of a KV head side by side

    def _certify(self, scores: Tensor, most: Tensor, num_chunks: int) -> None:
        peak = torch.maximum(scores.amax(-1), most.amax(-1))[..., None]
        exact = (scores.double() - peak).exp()
        chunks = exact[:, :, : self._prefix].reshape(*exact.shape[:2], num_chunks, self._chunk_size).sum(-1)
        order = most.argsort(-1, descending=True)
        could = (self._chunk_size * (most.double() - peak).exp()).gather(-1, order)
        fetched = exact[:, :, self._prefix :].sum(-1, keepdim=True) + chunks.gather(-1, order).cumsum(-1)
        left = could.flip(-1).cumsum(-1).flip(-1) - could
        for epsilon, needed in self.needed.items():
            missed = left > epsilon * (fetched + left)
            needed.append((missed.sum(-1) + 1).double().flatten() / num_chunks)

    def _kept(self, most: Tensor, num_chunks: int, group: int) -> Tensor:
        """Which chunks each query head attends to: those of a KV head see the same ones."""
        shared = most.reshape(len(most), -1, group, num_chunks).amax(2)
        shared[..., 0] = torch.inf
        best = shared.topk(max(1, int(self.share * num_chunks)), dim=-1).indices
        kept = torch.zeros_like(shared, dtype=torch.bool).scatter_(-1, best, value=True)
        return kept.repeat_interleave(group, dim=1)


def observe(model: CausalLM, observed: Observed) -> None:
    """Let all layers attend so."""
    for layer in model.layers:

        def attend(q: Tensor, k: Tensor, v: Tensor, *, step: Step, kv_cache: KVCache) -> Tensor:
            reshape_and_cache(q, k, v, step.rotary, step.batch.slot_mapping, *kv_cache)
            return observed.attend(q, kv_cache)

        layer.attention.attend = attend  # type: ignore[method-assign]


def measure(
    folder: Path, files: list[list[int]], prefix: int, chunk_size: int
) -> tuple[Observed, dict[float, Difference]]:
    num_tokens = len(files[0])
    exact, part = (
        load_model(folder, dtype=torch.float32, device=torch.device("cpu"), group=SoloGroup(), max_model_len=num_tokens)
        for _ in range(2)
    )
    heads, head_dim = exact.kv_heads_per_rank, exact.config.head_dim
    layout = KVLayout(
        num_layers=exact.num_kv_layers,
        block_size=BLOCK_SIZE,
        num_kv_heads=heads,
        head_dim=head_dim,
        dtype=torch.float32,
    )
    observed, results = Observed(prefix, chunk_size), {share: Difference() for share in SHARES}
    part.native = None
    observe(part, observed)
    with torch.inference_mode():
        for number, token_ids in enumerate(files):
            cache = Cache(exact, layout, num_tokens)
            cache.logits(token_ids[:prefix], 0)
            expected = cache.logits(token_ids[prefix:], prefix)
            again = Cache(part, layout, num_tokens)
            again.kv_caches = cache.kv_caches  # of the prefix; the rest is written again
            for share, result in results.items():
                observed.share = share
                result.add(expected[:-1], again.logits(token_ids[prefix:], prefix)[:-1], token_ids[prefix + 1 :])
            print(f"chunks of {chunk_size}, file {number + 1} of {len(files)}", file=sys.stderr)
    return observed, results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, default=MODELS / "demo-target")
    parser.add_argument("--files", type=int, default=6)
    parser.add_argument("--prefix", type=int, default=1536)
    parser.add_argument("--after", type=int, default=128)
    parser.add_argument("--chunks", type=int, nargs="*", default=[8, 16], help="tokens of a chunk")
    add_report_options(parser)
    args = parser.parse_args()
    torch.set_num_threads(1)
    files = list(held_out_files(args.target, args.files, args.prefix + args.after))
    certificates, budgets = [], []
    for chunk_size in args.chunks:
        observed, results = measure(args.target, files, args.prefix, chunk_size)
        for epsilon, shares in observed.needed.items():
            needed = 100 * torch.cat(shares)
            certificates.append([f"{chunk_size}", f"{epsilon}", f"{needed.mean():.0f}", f"{needed.median():.0f}"])
        budgets += [[f"{chunk_size}", f"1/{round(1 / share)}", *result.cells()] for share, result in results.items()]
    parts = [
        f"{len(files)} held-out files, {args.prefix} tokens, then {args.after} queries in each",
        table(["chunk", "epsilon", "chunks needed, mean %", "median %"], certificates),
        table(["chunk", "share of the KV", "KL, nats", "p99", "same likeliest token, %", "loss, nats"], budgets),
    ]
    command = shlex.join(["python", "-m", "bench.attention_budget", *sys.argv[1:]])
    publish("attention-budget", "\n\n".join(parts), command=command, save=args.save)


if __name__ == "__main__":
    main()

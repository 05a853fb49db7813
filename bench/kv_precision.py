"""What KV in fewer bits costs: the target's probabilities after a prefix with rounded KV, beside those with exact KV.

For each held-out file, the KV of its beginning is computed and rounded, as tiers do. The tokens that follow are
computed with both, all in one forward, given the file's own tokens. A cache in FP8 rounds all KV, that of these tokens
too. Files are those of Python's library that the demo pair has not seen.

    python -m bench.kv_precision --save
"""

import argparse
import shlex
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from bench.report import add_report_options, publish, table
from childproc.tier_block import tier_block
from kernels.attention.paged_kv import SeqLengths
from kernels.kv.kv_quant import dequantise_blocks, quantise_blocks
from models.demo_text import load_corpus
from workers.collectives import SoloGroup
from workers.engine.kv_cache import KVCaches, KVLayout
from workers.models.batch import Batch
from workers.models.decoder import CausalLM
from workers.models.fp8_caches import use_fp8_caches
from workers.models.loading import load_model

MODELS = Path(__file__).parents[1] / "models"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Round = Callable[
    [Tensor], Tensor
]  # blocks [n, num_layers, 2, block_size, num_kv_heads, head_dim], and what becomes of them


@dataclass(slots=True)
class Difference:
    """Of each token that was predicted."""

    divergence: list[float] = field(default_factory=list)  # KL, of the rounded from the exact distribution, nats
    agrees: list[float] = field(default_factory=list)  # whether both find the same token likeliest
    loss: list[float] = field(default_factory=list)  # nats more for the file's own token

    def add(self, exact: Tensor, rounded: Tensor, token_ids: list[int]) -> None:
        """exact, rounded: logits [num_tokens, vocab_size]; token_ids: the next ones, as many."""
        p, q = exact.double().log_softmax(-1), rounded.double().log_softmax(-1)
        self.divergence += (p.exp() * (p - q)).sum(-1).tolist()
        self.agrees += (p.argmax(-1) == q.argmax(-1)).double().tolist()
        chosen = torch.tensor(token_ids)[:, None]
        self.loss += (p - q).gather(-1, chosen)[:, 0].tolist()

    def cells(self) -> list[str]:
        divergence, agrees, loss = (torch.tensor(x) for x in (self.divergence, self.agrees, self.loss))
        return [
            f"{divergence.mean():.6f}",
            f"{divergence.quantile(0.99):.5f}",
            f"{100 * agrees.mean():.2f}",
            f"{loss.mean():+.5f}",
        ]


class Cache:
    """The paged KV of one seq, in blocks that follow each other."""

    def __init__(self, model: CausalLM, layout: KVLayout, num_tokens: int) -> None:
        self._model = model
        self._block_size = layout.block_size
        self._num_blocks = -(-num_tokens // layout.block_size)
        self.kv_caches: KVCaches = layout.allocate(self._num_blocks, torch.device("cpu"))

    def logits(self, token_ids: list[int], start: int) -> Tensor:
        """Of each of these tokens, the first of which is at position `start`: fp32 [len(token_ids), vocab_size]."""
        positions = torch.arange(start, start + len(token_ids))
        seq_lens = torch.tensor([start + len(token_ids)], dtype=torch.int32)
        cu_seqlens_q = torch.tensor([0, len(token_ids)], dtype=torch.int32)
        batch = Batch(
            input_ids=torch.tensor(token_ids),
            positions=positions,
            slot_mapping=positions,
            block_table=torch.arange(self._num_blocks, dtype=torch.int32)[None],
            seq_lens=seq_lens,
            cu_seqlens_q=cu_seqlens_q,
            lengths=SeqLengths.read(seq_lens, cu_seqlens_q),
        )
        return self._model.compute_logits(self._model.forward(batch, self.kv_caches))

    def copy(self, other: "Cache", rounding: Round, num_blocks: int) -> None:
        """Take the first blocks of another cache, rounded."""
        blocks = torch.stack([torch.stack([k[:num_blocks], v[:num_blocks]], 1) for k, v in other.kv_caches], 1)
        rounded = rounding(blocks.contiguous())
        for layer, (k, v) in enumerate(self.kv_caches):
            k[:num_blocks], v[:num_blocks] = rounded[:, layer, 0], rounded[:, layer, 1]


def through(bits: int) -> Round:
    """To so many bits and back."""

    def rounding(blocks: Tensor) -> Tensor:
        back = torch.empty_like(blocks)
        dequantise_blocks(quantise_blocks(blocks), back, bits=bits)
        return back

    return rounding


def measure(
    model: CausalLM, layout: KVLayout, files: list[list[int]], roundings: dict[str, Round], prefix: int
) -> dict[str, Difference]:
    results = {name: Difference() for name in roundings}
    for number, token_ids in enumerate(files):
        exact, rounded = (Cache(model, layout, len(token_ids)) for _ in range(2))
        exact.logits(token_ids[:prefix], 0)
        rest = token_ids[prefix:]
        expected = exact.logits(rest, prefix)
        for name, rounding in roundings.items():
            rounded.copy(exact, rounding, prefix // layout.block_size)
            results[name].add(expected[:-1], rounded.logits(rest, prefix)[:-1], rest[1:])
        print(f"file {number + 1} of {len(files)}", file=sys.stderr)
    return results


def measure_fp8(exact: CausalLM, folder: Path, layout: KVLayout, files: list[list[int]], prefix: int) -> Difference:
    """Of a model whose whole cache is in FP8."""
    rough = load_model(
        folder, dtype=layout.dtype, device=torch.device("cpu"), group=SoloGroup(), max_model_len=len(files[0])
    )
    use_fp8_caches(rough, folder, max_model_len=len(files[0]), dtype=layout.dtype)
    result = Difference()
    for token_ids in files:
        logits = []
        for model, dtype in ((exact, layout.dtype), (rough, torch.uint8)):
            cache = Cache(model, replace(layout, dtype=dtype), len(token_ids))
            cache.logits(token_ids[:prefix], 0)
            logits.append(cache.logits(token_ids[prefix:], prefix)[:-1])
        result.add(logits[0], logits[1], token_ids[prefix + 1 :])
    return result


def held_out_files(folder: Path, num_files: int, num_tokens: int) -> Iterator[list[int]]:
    """The beginnings of as many files that are long enough."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    encoded = (
        tokenizer.encode(text).ids for text in load_corpus([Path(sysconfig.get_path("stdlib"))]).held_out.values()
    )
    long_enough = (ids[:num_tokens] for ids in encoded if len(ids) >= num_tokens)
    yield from (ids for _, ids in zip(range(num_files), long_enough, strict=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, default=MODELS / "demo-target")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--files", type=int, default=12)
    parser.add_argument("--prefix", type=int, default=1024, help="tokens whose KV is rounded")
    parser.add_argument("--after", type=int, default=256, help="tokens that are predicted after them")
    parser.add_argument("--block-sizes", type=int, nargs="*", default=[16, 32])
    parser.add_argument("--threads", type=int, default=1)
    add_report_options(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype, num_tokens = DTYPES[args.dtype], args.prefix + args.after
    model = load_model(
        args.target, dtype=dtype, device=torch.device("cpu"), group=SoloGroup(), max_model_len=num_tokens
    )
    files = list(held_out_files(args.target, args.files, num_tokens))
    rows = []
    for block_size in args.block_sizes:
        shape = {
            "num_layers": model.num_kv_layers,
            "block_size": block_size,
            "num_kv_heads": model.kv_heads_per_rank,
            "head_dim": model.config.head_dim,
        }
        with torch.inference_mode():
            roundings = {"8": through(8), "4": through(4)}
            results = measure(model, KVLayout(**shape, dtype=dtype), files, roundings, args.prefix)
        sizes = {
            "8": tier_block("int8", **shape, value_bytes=dtype.itemsize).host_bytes,
            "4": tier_block("int4", **shape, value_bytes=dtype.itemsize).disk_bytes,
        }
        for bits, result in results.items():
            rows.append([bits, f"{block_size}", f"{sizes[bits] / block_size:,.0f}", *result.cells()])
    layout = KVLayout(**{**shape, "block_size": 16}, dtype=dtype)
    with torch.inference_mode():
        fp8 = measure_fp8(model, args.target, layout, files, args.prefix)
    exact = 2 * model.num_kv_layers * model.kv_heads_per_rank * model.config.head_dim * dtype.itemsize
    rows.append(["device in FP8", "", f"{exact // dtype.itemsize:,}", *fp8.cells()])
    rows.insert(0, [f"exact, {args.dtype}", "", f"{exact:,}", "0", "0", "100", "0"])
    header = ["bits", "block size", "bytes a token", "KL, nats", "p99", "same likeliest token, %", "loss, nats"]
    head = f"{len(files)} held-out files, {args.prefix} tokens of rounded KV, then {args.after} tokens"
    command = shlex.join(["python", "-m", "bench.kv_precision", *sys.argv[1:]])
    publish("kv-precision", f"{head}\n\n{table(header, rows)}", command=command, save=args.save)


if __name__ == "__main__":
    main()

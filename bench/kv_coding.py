"""Whether lossless coding of KV on its way to disk would pay: sizes and speeds on real KV, on one core.

KV of the demo target in bfloat16, for the beginnings of held-out files, in blocks as tiers hold them. *zstd*: a block
as it is. *split*: its bytes of exponents and its bytes of signs and fractions apart (as ZipNN does, arXiv 2411.05239),
the exponents through zstd and the others as they are. *entropy*: what the exponents would take with a perfect code that
sees one at a time. Needs `pip install zstandard`, which nothing else here uses.

    python -m bench.kv_coding --save
"""

import argparse
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray

from bench.kv_precision import MODELS, Cache, held_out_files
from bench.report import add_report_options, publish, table
from workers.collectives import SoloGroup
from workers.engine.kv_cache import KVLayout
from workers.models.loading import load_model

Bytes = NDArray[np.uint8]
BLOCK_SIZE = 16
RUNS = 3  # the fastest counts


def real_blocks(folder: Path, num_files: int, num_tokens: int) -> list[Bytes]:
    """Each of one block: bfloat16, layer by layer, keys before values."""
    dtype, blocks = torch.bfloat16, []
    model = load_model(folder, dtype=dtype, device=torch.device("cpu"), group=SoloGroup(), max_model_len=num_tokens)
    layout = KVLayout(
        num_layers=model.num_kv_layers,
        block_size=BLOCK_SIZE,
        num_kv_heads=model.kv_heads_per_rank,
        head_dim=model.config.head_dim,
        dtype=dtype,
    )
    for token_ids in held_out_files(folder, num_files, num_tokens):
        cache = Cache(model, layout, num_tokens)
        with torch.inference_mode():
            cache.logits(token_ids, 0)
        staged = torch.stack([torch.stack([k, v], 1) for k, v in cache.kv_caches], 1)
        blocks += [block.contiguous().view(torch.uint8).flatten().numpy() for block in staged]
    return blocks


def split(block: Bytes) -> tuple[Bytes, Bytes]:
    """Exponents, and signs with fractions: a bfloat16 has a sign, 8 bits of exponent and 7 of fraction."""
    words = block.view(np.uint16)
    return (words >> 7).astype(np.uint8), ((words >> 8 & 0x80) | (words & 0x7F)).astype(np.uint8)


def join(exponents: Bytes, rest: Bytes) -> Bytes:
    words = (rest.astype(np.uint16) & 0x80) << 8 | exponents.astype(np.uint16) << 7 | rest & 0x7F
    return words.view(np.uint8)


def entropy_bytes(exponents: Bytes) -> float:
    counts = np.bincount(exponents, minlength=256) / len(exponents)
    return float(-(counts[counts > 0] * np.log2(counts[counts > 0])).sum() * len(exponents) / 8)


def fastest(work: Callable[[], object]) -> float:
    """Seconds of this thread."""
    times = []
    for _ in range(RUNS):
        started_s = time.thread_time()
        work()
        times.append(time.thread_time() - started_s)
    return min(times)


def measure(blocks: list[Bytes], level: int, *, splits: bool) -> list[str]:
    """Cells of a row: size, and GB of KV per second in both directions. Checks that every block comes back."""
    coder, decoder = zstandard.ZstdCompressor(level=level), zstandard.ZstdDecompressor()

    def encode(block: Bytes) -> tuple[bytes, Bytes | None]:
        if not splits:
            return coder.compress(block.tobytes()), None
        exponents, rest = split(block)
        return coder.compress(exponents.tobytes()), rest

    def decode(coded: tuple[bytes, Bytes | None]) -> Bytes:
        first = np.frombuffer(decoder.decompress(coded[0]), np.uint8)
        return first if coded[1] is None else join(first, coded[1])

    coded = [encode(block) for block in blocks]
    assert all(np.array_equal(decode(each), block) for each, block in zip(coded, blocks, strict=True))
    num_bytes = sum(block.nbytes for block in blocks)
    size = sum(len(first) + (0 if rest is None else rest.nbytes) for first, rest in coded)
    encode_s = fastest(lambda: [encode(block) for block in blocks])
    decode_s = fastest(lambda: [decode(each) for each in coded])
    return [f"{100 * size / num_bytes:.1f}", f"{num_bytes / encode_s / 1e9:.2f}", f"{num_bytes / decode_s / 1e9:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, default=MODELS / "demo-target")
    parser.add_argument("--files", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024)
    add_report_options(parser)
    args = parser.parse_args()
    torch.set_num_threads(1)
    blocks = real_blocks(args.target, args.files, args.tokens)
    rows = [
        [f"{'split, ' if splits else ''}zstd {level}", *measure(blocks, level, splits=splits)]
        for splits in (False, True)
        for level in (1, 3, 9)
    ]
    everything = np.concatenate(blocks)
    bound = 50 + 100 * entropy_bytes(split(everything)[0]) / everything.nbytes
    rows.append(["split, entropy", f"{bound:.1f}", "", ""])
    header = ["", "size, %", "encode, GB/s", "decode, GB/s"]
    head = f"{len(blocks)} blocks of {blocks[0].nbytes:,} bytes of bfloat16"
    command = shlex.join(["python", "-m", "bench.kv_coding", *sys.argv[1:]])
    publish("kv-coding", f"{head}\n\n{table(header, rows)}", command=command, save=args.save)


if __name__ == "__main__":
    main()

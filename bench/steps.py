"""What a step costs inside a worker: verifying 1 to 9 rows, and drafting.

Engines run in this process, without scheduler and wires, on rounds as a scheduler sends them. CPU time is shown next to
wall time, because it is meaningful even on a busy machine.

    OMP_NUM_THREADS=2 GOMP_SPINCOUNT=3000 python -m bench.steps --threads 2

Threads that wait at the end of an operator spin for a while (GOMP_SPINCOUNT, in libgomp's unit) and then sleep. Waking
costs about 50 us per operator. Spinning on a core that another process needs costs far more. Try several values.
"""

import argparse
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import get_args

import torch

from bench.report import add_report_options, hardware, publish, table
from checkpoint.config_json import load_model_config
from checkpoint.quantization import WeightFormat
from echelon.pb.process_pb2 import EngineSpec, WorkerSpec
from echelon.pb.sampling_pb2 import SeqSampling
from echelon.pb.worker_pb2 import ENGINE_ROLE_DRAFT, ENGINE_ROLE_TARGET, EngineRole, Round, Row, SeqInit
from workers.engine.engine import Engine
from workers.process.cohort import Cohort
from workers.process.load import DTYPES, load_engines

GREEDY = SeqSampling(temperature=0, top_p=1, repetition_penalty=1)
MODELS = Path(__file__).parents[1] / "models"
BLOCK_SIZE = 16
MAX_LEN = 1024


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one round, in ms."""

    least: float
    median: float
    cpu: float  # least, of all threads

    @property
    def cells(self) -> list[str]:
        return [f"{self.least:.1f}", f"{self.median:.1f}", f"{self.cpu:.1f}"]


class Seqs:
    """A few seqs of the same length on an engine. Every round starts from the same state."""

    def __init__(self, engine: Engine, num_seqs: int, context: int) -> None:
        self._engine = engine
        self._context = context
        self._slots = range(num_seqs)
        self._round_id = 0
        blocks = MAX_LEN // BLOCK_SIZE
        inits = [
            SeqInit(
                slot=slot,
                token_ids=[(7 * slot + 3 * i) % 4000 + 1 for i in range(context)],
                num_prompt_tokens=context,
                sampling=GREEDY,
                block_table=range(slot * blocks, (slot + 1) * blocks),
            )
            for slot in self._slots
        ]
        engine.reset()
        self._send([Row(slot=slot, chunk_len=context) for slot in self._slots], inits)

    def verify(self, num_rows: int) -> None:
        """Verifies the last token and the drafts after it."""
        drafts = range(1, num_rows)
        self._send(
            [
                Row(
                    slot=slot,
                    crop_len=self._context,
                    append_token_ids=[5],
                    chunk_len=1,
                    draft_token_ids=drafts,
                    draft_base_len=self._context + 1,
                )
                for slot in self._slots
            ]
        )

    def draft(self, num_tokens: int) -> None:
        """Catches up with a verdict of two tokens, then drafts."""
        self._send(
            [
                Row(
                    slot=slot,
                    crop_len=self._context,
                    append_token_ids=[5, 6],
                    chunk_len=2,
                    num_draft_tokens=num_tokens,
                )
                for slot in self._slots
            ]
        )

    def _send(self, rows: Sequence[Row], inits: Sequence[SeqInit] = ()) -> None:
        self._round_id += 1
        round_ = Round(round_id=self._round_id, init_seqs=inits, rows=rows)
        self._engine.check(round_)
        self._engine.run(round_)


def load(
    folder: Path,
    role: EngineRole.ValueType,
    dtype: str,
    max_num_seqs: int,
    *,
    device: str,
    quantization: str = "",
    lower_model: str = "",
    kv_dtype: str = "",
    keeps_bits: bool = False,
    forced_acceptance: float = 0.0,
    captured_new_tokens: int = 0,
) -> Engine:
    spec = EngineSpec(
        role=role,
        model=str(folder),
        dtype=dtype,
        tp_size=1,
        block_size=BLOCK_SIZE,
        kv_cache_bytes=kv_cache_bytes([folder, *filter(None, [lower_model])], dtype, max_num_seqs),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=MAX_LEN * max_num_seqs,
        max_model_len=MAX_LEN,
        quantization=quantization,
        lower_model=lower_model,
        kv_dtype=kv_dtype,
        keeps_bits=keeps_bits,
        forced_acceptance=forced_acceptance,
        captured_new_tokens=captured_new_tokens,
    )
    worker = WorkerSpec(rank=0, world_size=1, device=device, engines=[spec])
    return load_engines(worker, Cohort(0, 1, None), lambda stage, done, total: None)[role]


def kv_cache_bytes(folders: Iterable[str | Path], dtype: str, num_seqs: int) -> int:
    """Enough for seqs of MAX_LEN tokens through these models."""
    configs = [load_model_config(Path(folder)) for folder in folders]
    numbers = sum(2 * config.num_layers * config.num_kv_heads * config.head_dim for config in configs)
    return num_seqs * MAX_LEN * numbers * DTYPES[dtype].itemsize


def cost(round_: Callable[[], None], runs: int) -> Cost:
    for _ in range(3):
        round_()
    walls, cpus = [], []
    for _ in range(runs):
        wall, cpu = time.perf_counter(), time.process_time()
        round_()
        cpus.append(time.process_time() - cpu)
        walls.append(time.perf_counter() - wall)
    return Cost(1e3 * min(walls), 1e3 * statistics.median(walls), 1e3 * min(cpus))


def read_bandwidth(device: str) -> float:
    """Bytes a second that all threads read from memory, at best: a dot product of 1 GiB with itself."""
    numbers = torch.ones(1 << 28, device=device)

    def read() -> None:
        torch.dot(numbers, numbers).item()

    return numbers.nbytes / (cost(read, runs=20).least / 1e3)


def floor(folder: Path, bandwidth: float) -> str:
    """What a step takes at least, because it reads the model once."""
    num_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return f"{folder.name} ({num_bytes / 1e6:.0f} MB) {1e3 * num_bytes / bandwidth:.1f} ms"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, default=MODELS / "demo-target")
    parser.add_argument("--draft", type=Path, default=MODELS / "demo-draft")
    parser.add_argument(
        "--self-drafts", nargs="*", choices=get_args(WeightFormat), default=[], help="of the target, too"
    )
    parser.add_argument("--keeps-bits", action="store_true", help="of a quantised target")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--graphs", action="store_true", help="capture steps, as CUDA graphs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seqs", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 6, 9], help="rows verified per seq")
    parser.add_argument("--drafts", type=int, nargs="+", default=[1, 5], help="tokens drafted per round")
    parser.add_argument("--context", type=int, default=128, help="tokens per seq")
    parser.add_argument("--runs", type=int, default=30)
    add_report_options(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    load_here = partial(load, dtype=args.dtype, max_num_seqs=max(args.seqs), device=args.device)
    most_rows, most_new = (max(args.rows), 2) if args.graphs else (0, 0)
    target = load_here(args.target, ENGINE_ROLE_TARGET, keeps_bits=args.keeps_bits, captured_new_tokens=most_rows)
    drafts = {"draft": load_here(args.draft, ENGINE_ROLE_DRAFT, captured_new_tokens=most_new)}
    for rounded_to in args.self_drafts:
        made = load_here(args.target, ENGINE_ROLE_DRAFT, quantization=rounded_to, captured_new_tokens=most_new)
        drafts[f"draft, the target in {rounded_to}"] = made
    is_captured = all(engine.captures_steps for engine in (target, *drafts.values()))
    if args.graphs and not is_captured:
        sys.exit("bench.steps: CUDA refused to capture steps; the log says why")
    rows = []
    for num_seqs in args.seqs:
        seqs = Seqs(target, num_seqs, args.context)
        for num_rows in args.rows:
            verify = cost(partial(seqs.verify, num_rows), args.runs)
            rows.append(["verify", str(num_seqs), str(num_rows), *verify.cells])
        for name, draft in drafts.items():
            seqs = Seqs(draft, num_seqs, args.context)
            for num_tokens in args.drafts:
                drafting = cost(partial(seqs.draft, num_tokens), args.runs)
                rows.append([name, str(num_seqs), str(num_tokens), *drafting.cells])
    bandwidth = read_bandwidth(args.device)
    header = ["round", "seqs", "rows or drafts per seq", "least ms", "median ms", "CPU ms"]
    body = (
        f"{args.target.name} and {args.draft.name}, {args.dtype}, {args.device}, {args.threads} thread(s), "
        f"steps {'' if is_captured else 'not '}captured, "
        f"{args.context} tokens of context; GOMP_SPINCOUNT {os.environ.get('GOMP_SPINCOUNT', 'not set')}, "
        f"OMP_WAIT_POLICY {os.environ.get('OMP_WAIT_POLICY', 'not set')}; {args.runs} rounds each.\n\n"
        f"{table(header, rows)}\n\n"
        f"Memory is read at {bandwidth / 1e9:.1f} GB/s. Reading a model once takes: "
        f"{floor(args.target, bandwidth)}, {floor(args.draft, bandwidth)}, less where caches hold it.\n"
    )
    command = shlex.join(["python", "-m", "bench.steps", *sys.argv[1:]])
    name = "steps-captured" if args.graphs else "steps"  # both belong to a session
    publish(name, body, command=command, save=args.save, on=hardware(args.device))


if __name__ == "__main__":
    main()

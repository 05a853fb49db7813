"""The time of a draft step: one core alone, and two cores as layer-parallel and as tensor-parallel ranks.

Real workers run real rounds; a step's time is a round's time divided by its forwards. All groups are started
once and take turns, so that a drift of the machine's speed affects all.
"""

import argparse
import itertools
import queue
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import grpc

from bench.random_model import write_random_llama
from bench.report import Spread, publish, table
from childproc.wires import open_blocking_channel
from cluster.processes.child import Child, ChildProcess
from cluster.processes.startup import Launch
from cluster.processes.worker_group import RunningGroup, start_worker_group
from echelon import __version__
from echelon.pb.process_pb2 import EngineSpec, WorkerSpec
from echelon.pb.sampling_pb2 import SeqSampling
from echelon.pb.worker_pb2 import (
    ENGINE_ROLE_DRAFT,
    Hello,
    LayerGroup,
    Round,
    RoundReply,
    RoundRequest,
    RoundResult,
    Row,
    SeqInit,
)
from echelon.pb.worker_pb2_grpc import WorkerStub
from workers.models.layer_groups import MLPs

HOST = "127.0.0.1"
INCARNATION = 1
BLOCK_SIZE = 16
MAX_MODEL_LEN = 2048
START_TIMEOUT_S = 300.0
STOP_GRACE_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    name: str
    num_ranks: int
    engine: EngineSpec


class DraftGroup:
    """A group of workers with one seq on its draft."""

    def __init__(self, variant: Variant, prompt_len: int, log_dir: Path) -> None:
        self.variant = variant
        self._log_dir = log_dir
        group, self._processes = start_worker_group(
            _worker_specs(variant), self._spawn, role="draft", timeout_s=START_TIMEOUT_S
        )
        self.info = group.info.engines[0]
        self._requests: queue.SimpleQueue[RoundRequest | None] = queue.SimpleQueue()
        self._channel, self._results = self._connect(group)
        self._round_ids = itertools.count(1)
        self._prompt_len = prompt_len
        self._run(
            Row(slot=0, chunk_len=prompt_len),
            SeqInit(
                slot=0,
                token_ids=[1 + 31 * i % 4000 for i in range(prompt_len)],
                num_prompt_tokens=prompt_len,
                block_table=range(MAX_MODEL_LEN // BLOCK_SIZE),
                sampling=SeqSampling(top_p=1.0, repetition_penalty=1.0),
            ),
        )

    def step_ms(self, num_tokens: int) -> float:
        """Time of a step in a chain of `num_tokens` drafts after the prompt and one more token."""
        row = Row(slot=0, crop_len=self._prompt_len, append_token_ids=[7], chunk_len=1, num_draft_tokens=num_tokens)
        result = self._run(row)
        assert result.num_steps == num_tokens, f"{num_tokens} drafts took {result.num_steps} forwards"
        return result.run_ns / result.num_steps / 1e6

    def stop(self) -> None:
        self._requests.put(None)
        self._channel.close()
        self._processes.stop(STOP_GRACE_S)

    def _connect(self, group: RunningGroup) -> tuple[grpc.Channel, Iterator[RoundReply]]:
        channel = open_blocking_channel(group.address)
        hello = Hello(role=ENGINE_ROLE_DRAFT, incarnation=INCARNATION, version=__version__)
        self._requests.put(RoundRequest(hello=hello))
        results: Iterator[RoundReply] = WorkerStub(channel).Rounds(iter(self._requests.get, None))
        return channel, results

    def _run(self, row: Row, *inits: SeqInit) -> RoundResult:
        round_ = Round(round_id=next(self._round_ids), incarnation=INCARNATION, init_seqs=inits, rows=[row])
        self._requests.put(RoundRequest(round=round_))
        return next(self._results).result

    def _spawn(self, launch: Launch) -> Child:
        path = self._log_dir / f"{launch.spec.name}.log"
        return ChildProcess(launch.module, launch.spec, name=launch.name, log_path=path, env=launch.env)


def _worker_specs(variant: Variant) -> list[WorkerSpec]:
    return [
        WorkerSpec(
            name=f"{variant.name.replace(' ', '-').replace(',', '')}.{rank}",
            rank=rank,
            world_size=variant.num_ranks,
            host=HOST,
            device="cpu",
            threads=1,
            cpu_ids=[rank],
            incarnation=INCARNATION,
            version=__version__,
            engines=[variant.engine],
            collective_timeout_s=60.0,
        )
        for rank in range(variant.num_ranks)
    ]


def variants(folder: Path, num_layers: int) -> list[Variant]:
    def variant(name: str, num_ranks: int, **engine: object) -> Variant:
        spec = EngineSpec(
            role=ENGINE_ROLE_DRAFT,
            model=str(folder),
            dtype="bfloat16",
            tp_size=1,
            block_size=BLOCK_SIZE,
            kv_cache_bytes=1 << 30,
            max_num_seqs=1,
            max_num_batched_tokens=MAX_MODEL_LEN,
            max_model_len=MAX_MODEL_LEN,
        )
        spec.MergeFrom(EngineSpec(**engine))  # type: ignore[arg-type]
        return Variant(name=name, num_ranks=num_ranks, engine=spec)

    pairs = [LayerGroup(layers=range(first, min(first + 2, num_layers - 1))) for first in range(1, num_layers - 1, 2)]
    groups = [LayerGroup(layers=[0]), *pairs, LayerGroup(layers=[num_layers - 1])]

    def layer_parallel(name: str, num_ranks: int, mlps: MLPs) -> Variant:
        return variant(name, num_ranks, lp_size=2, layer_groups=groups, layer_parallel_mlp=mlps)

    return [
        variant("sequential, 1 rank", 1),
        layer_parallel("layer-parallel as a batch, 1 rank", 1, MLPs.REPLICATED),
        layer_parallel("layer-parallel, MLPs replicated, 2 ranks", 2, MLPs.REPLICATED),
        layer_parallel("layer-parallel, MLPs split, 2 ranks", 2, MLPs.TENSOR_PARALLEL),
        variant("tensor-parallel, 2 ranks", 2, tp_size=2),
    ]


def add_step_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("--step-times")
    group.add_argument("--layers", type=int, default=16)
    group.add_argument("--hidden", type=int, default=1536)
    group.add_argument("--intermediate", type=int, default=4608)
    group.add_argument("--context", type=int, default=512, help="tokens before the chain")
    group.add_argument("--runs", type=int, default=5, help="paired runs per median")
    group.add_argument("--steps", type=int, default=12, help="draft tokens per run")


def measure_steps(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name) / "draft"
        folder.mkdir()
        num_parameters = write_random_llama(
            folder,
            num_layers=options.layers,
            hidden_size=options.hidden,
            intermediate_size=options.intermediate,
        )
        groups = []
        for variant in variants(folder, options.layers):
            group = DraftGroup(variant, options.context, Path(name))
            stack.callback(group.stop)
            groups.append(group)
        for group in groups:
            group.step_ms(options.steps)  # warms up
        times: dict[str, list[float]] = {group.variant.name: [] for group in groups}
        for _ in range(options.runs):
            for group in groups:
                times[group.variant.name].append(group.step_ms(options.steps))
    first = times[groups[0].variant.name]
    rows = [
        [
            name,
            f"{Spread.of(values):.1f}",
            f"{Spread.of([base / value for base, value in zip(first, values, strict=True)]):.2f}",
        ]
        for name, values in times.items()
    ]
    attention = 4 * options.hidden**2
    share = attention / (attention + 3 * options.hidden * options.intermediate)
    body = (
        f"{num_parameters / 1e6:.0f}M random parameters, bf16: {options.layers} layers, hidden size {options.hidden}, "
        f"intermediate size {options.intermediate}; attention is {share:.0%} of a layer's weights. One seq after "
        f"{options.context} tokens, a core for each rank. Median (least-greatest) of {options.runs} paired runs of "
        f"{options.steps} steps.\n\n" + table(["", "ms a step", "against sequential"], rows)
    )
    command = (
        f"python -m bench.layer_parallel_drafts --step-times --layers {options.layers} --hidden {options.hidden} "
        f"--intermediate {options.intermediate} --context {options.context}"
    )
    publish("layer-parallel-steps", body, command=command, save=options.save)

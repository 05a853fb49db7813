"""Engines with tiny random models in this process, and drafts that are right to any degree."""

import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from echelon.pb.process_pb2 import EngineSpec, WorkerSpec
from echelon.pb.worker_pb2 import EngineRole
from kernels.kv.block_copy import cache_addresses
from tests.helpers.rounds import Driver, Seq
from workers.collectives import SoloGroup
from workers.engine.draft_engine import DraftEngine
from workers.engine.engine import Engine, ModelRunner
from workers.engine.kv_cache import KVLayout
from workers.engine.seq_state import Limits, SeqTable
from workers.models.loading import load_model
from workers.process.cohort import Cohort
from workers.process.load import load_engines
from workers.sampling.sampler import Sampler

TARGET = EngineRole.ENGINE_ROLE_TARGET
DRAFT = EngineRole.ENGINE_ROLE_DRAFT
MAX_MODEL_LEN = 64
KV_CACHE_BYTES = 1 << 20
POISON = 100  # a token id, see `poisoned_model`


def engine_spec(folder: Path, role: EngineRole.ValueType, **changes: object) -> EngineSpec:
    spec = EngineSpec(
        role=role,
        model=str(folder),
        dtype="float32",
        tp_size=1,
        block_size=4,
        kv_cache_bytes=KV_CACHE_BYTES,
        max_num_seqs=8,
        max_num_batched_tokens=256,
        max_model_len=MAX_MODEL_LEN,
    )
    spec.MergeFrom(EngineSpec(**changes))  # type: ignore[arg-type]
    return spec


def make_engine(folder: Path, role: EngineRole.ValueType, *, cohort: Cohort | None = None, **changes: object) -> Engine:
    spec = WorkerSpec(rank=0, world_size=1, device="cpu", engines=[engine_spec(folder, role, **changes)])
    return load_engines(spec, cohort or Cohort(0, 1, None), lambda stage, done, total: None)[role]


@dataclass(frozen=True, slots=True)
class DraftParts:
    """A draft engine and the parts that it was made from."""

    engine: DraftEngine
    runner: ModelRunner
    table: SeqTable


def assemble_draft(folder: Path, runner_class: type[ModelRunner] = ModelRunner, **settings: Any) -> DraftParts:
    """Builds what `make_engine` loads, with a runner of the test's own class."""
    device = torch.device("cpu")
    info = make_engine(folder, DRAFT).info
    model = load_model(folder, dtype=torch.float32, device=device, group=SoloGroup(), max_model_len=MAX_MODEL_LEN)
    layout = KVLayout(
        num_layers=model.num_kv_layers,
        block_size=info.block_size,
        num_kv_heads=model.kv_heads_per_rank,
        head_dim=model.config.head_dim,
        dtype=torch.float32,
    )
    kv_caches = layout.allocate(info.num_blocks, device)
    runner = runner_class(
        model=model,
        kv_caches=kv_caches,
        kv_addresses=cache_addresses(kv_caches),
        sampler=Sampler(SoloGroup(), info.vocab_size),
        num_ranks=1,
        device=device,
        **settings,
    )
    table = SeqTable(
        Limits(
            num_slots=info.num_slots,
            max_model_len=info.max_model_len,
            vocab_size=info.vocab_size,
            block_size=info.block_size,
            num_blocks=info.num_blocks,
            max_num_batched_tokens=info.max_num_batched_tokens,
        )
    )
    return DraftParts(DraftEngine(runner, table, info), runner, table)


def poisoned_model(folder: Path, copy: Path) -> Path:
    """A copy of a model folder whose model breaks at POISON: after it has read that token, logits are not finite."""
    shutil.copytree(folder, copy)
    weights = load_file(copy / "model.safetensors")
    weights["model.embed_tokens.weight"][POISON] = torch.nan
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def drive(engine: Engine) -> Driver:
    """A driver that runs rounds in this process, as the server does."""

    def send(round_):  # type: ignore[no-untyped-def]
        engine.check(round_)
        return engine.run(round_)

    return Driver(engine.info, send)


def guesses(rng: random.Random, truth: Sequence[int], num_drafts: int, vocab_size: int) -> list[int]:
    """Drafts for the tokens `truth`, which come next; each draft is right with probability 3/4."""
    return [
        token if token is not None and rng.random() < 0.75 else rng.randrange(vocab_size)
        for token in [*truth, *[None] * num_drafts][:num_drafts]
    ]


def interleave(driver: Driver, seqs: Sequence[tuple[Seq, Sequence[int]]], rng: random.Random, num_tokens: int) -> None:
    """Takes all seqs to `num_tokens` of output in rounds that mix prefill chunks of any size, plain rows and rows with
    0 to 4 drafts. `seqs` come with their true output, from which the drafts are made."""
    while any(len(seq.output) < num_tokens for seq, _ in seqs):
        work = []
        for seq, truth in seqs:
            if len(seq.output) >= num_tokens or rng.random() < 0.2:
                continue  # finished, or left out of this round
            if seq.num_missing > 1 and rng.random() < 0.8:
                work.append((seq, driver.target_row(seq, rng.randint(1, seq.num_missing))))
                continue
            drafts = guesses(rng, truth[len(seq.output) :], rng.randint(0, 4), driver.info.vocab_size)
            work.append((seq, driver.target_row(seq, drafts=drafts)))
        if work:
            driver.run(*work)

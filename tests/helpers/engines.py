"""Engines of tiny random models in this process, and drafts of every quality."""

import random
from collections.abc import Sequence
from pathlib import Path

import torch

from echelon.pb.process_pb2 import EngineSpec, WorkerSpec
from echelon.pb.worker_pb2 import EngineRole
from tests.helpers.rounds import Driver, Seq
from workers.engine.engine import Engine
from workers.process.cohort import Cohort
from workers.process.load import load_engines

TARGET = EngineRole.ENGINE_ROLE_TARGET
DRAFT = EngineRole.ENGINE_ROLE_DRAFT
MAX_MODEL_LEN = 64
KV_CACHE_BYTES = 1 << 20


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


def make_engine(folder: Path, role: EngineRole.ValueType, **changes: object) -> Engine:
    spec = WorkerSpec(rank=0, world_size=1, device="cpu", engines=[engine_spec(folder, role, **changes)])
    return load_engines(spec, Cohort(0, 1, None), lambda stage, done, total: None)[role]


def poison(engine: Engine) -> int:
    """A token that breaks the model when it reads it: logits behind it are not finite."""
    token_id = 100
    engine._runner.model.embedding.weight[token_id] = torch.nan  # type: ignore[attr-defined]
    return token_id


def drive(engine: Engine) -> Driver:
    """Rounds run in this process, as the server runs them."""

    def send(round_):  # type: ignore[no-untyped-def]
        engine.check(round_)
        return engine.run(round_)

    return Driver(engine.info, send)


def guesses(rng: random.Random, truth: Sequence[int], num_drafts: int, vocab_size: int) -> list[int]:
    """Drafts for the tokens `truth` that will follow, each right with probability 3/4."""
    return [
        token if token is not None and rng.random() < 0.75 else rng.randrange(vocab_size)
        for token in [*truth, *[None] * num_drafts][:num_drafts]
    ]


def interleave(driver: Driver, seqs: Sequence[tuple[Seq, Sequence[int]]], rng: random.Random, num_tokens: int) -> None:
    """Takes all seqs to `num_tokens` of output in rounds that mix prefill chunks of any size, plain rows and rows with
    0 to 4 drafts; `seqs` come with their true output, from which drafts are guessed."""
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

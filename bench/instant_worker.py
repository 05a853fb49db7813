"""A worker whose engine answers at once: real process, real gRPC, real round channel, no model.

The time between two rounds is then what the scheduler and the wires add. `bench.rounds` starts it like
`python -m workers`. For each round, the leader writes a line "<rows> <nanoseconds since the last round ended>" to the
file that the environment names.
"""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from echelon.pb.process_pb2 import EngineSpec, WorkerSpec
from echelon.pb.worker_pb2 import EngineInfo, Round, RoundResult, Row, RowResult
from workers.process.cohort import Cohort
from workers.process.load import Engines, OnProgress
from workers.process.worker import main

GAPS_FILE = "ECHELON_BENCH_GAPS"
TOKEN_ID = 100
NUM_BLOCKS = 1 << 16


class InstantEngine:
    """Always chooses the same token. Of each seq it knows only the length and how much is computed."""

    def __init__(self, spec: EngineSpec, record: Callable[[int, int], None]) -> None:
        self.info = EngineInfo(
            role=spec.role,
            tp_size=spec.tp_size,
            vocab_size=4096,
            num_blocks=NUM_BLOCKS,
            block_size=spec.block_size,
            num_slots=spec.max_num_seqs,
            max_model_len=spec.max_model_len,
            max_num_batched_tokens=spec.max_num_batched_tokens,
        )
        self.num_ranks = spec.tp_size
        self.mover = None
        self._record = record
        self._lengths: dict[int, int] = {}
        self._num_computed: dict[int, int] = {}
        self._ended_ns: int | None = None

    def check(self, round_: Round, queued: Sequence[Round] = ()) -> None:
        """Accepts every round."""

    def reset(self) -> None:
        self._lengths.clear()

    def run(self, round_: Round) -> RoundResult:
        if self._ended_ns is not None:
            self._record(len(round_.rows), time.monotonic_ns() - self._ended_ns)
        for seq in round_.init_seqs:
            self._lengths[seq.slot] = len(seq.token_ids)
            self._num_computed[seq.slot] = seq.num_computed_tokens
        result = RoundResult(rows=[self._answer(row) for row in round_.rows], num_steps=1)
        self._ended_ns = time.monotonic_ns()
        return result

    def _answer(self, row: Row) -> RowResult:
        self._num_computed[row.slot] += row.chunk_len
        if self._num_computed[row.slot] < self._lengths[row.slot]:
            return RowResult(slot=row.slot)
        self._lengths[row.slot] += 1
        return RowResult(slot=row.slot, token_ids=[TOKEN_ID])


def instant_engines(spec: WorkerSpec, cohort: Cohort, on_progress: OnProgress) -> Engines:
    record = _recorder() if spec.rank == 0 else lambda rows, gap_ns: None
    return {engine.role: InstantEngine(engine, record) for engine in spec.engines}


def _recorder() -> Callable[[int, int], None]:
    # Never closed, because the process ends without notice. So each line is flushed at once. Opened for appending,
    # because the reader empties the file between measurements.
    file = Path(os.environ[GAPS_FILE]).open("a", buffering=1)  # noqa: SIM115
    return lambda rows, gap_ns: print(rows, gap_ns, file=file)


if __name__ == "__main__":
    main(build_engines=instant_engines)

"""What the engines of both roles share: their interface to the server, and a model with its caches and sampler."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from checkpoint.memory import SAMPLING_TILE_ROWS
from echelon.pb.sampling_pb2 import PositionLogprobs
from echelon.pb.worker_pb2 import EngineInfo, MoveOrder, MoveResult, Round, RoundResult, Row, RowResult
from kernels.kv.block_copy import CacheAddresses, copy_blocks
from kernels.native.sampling import RowSettings
from workers.captured.captured_model import CapturedModel
from workers.engine.kv_cache import KVCaches
from workers.engine.rounds import RowPlan
from workers.engine.seq_state import SeqTable
from workers.models.batch import Batch
from workers.models.decoder import CausalLM
from workers.models.layer_parallel_decoder import LayerParallelLM
from workers.models.logits import shard_logits
from workers.sampling.rows import RowEntry, SamplingRows, native_settings
from workers.sampling.sampler import SampledRows, Sampler
from workers.trace import Tracer
from workers.upload import upload

NO_TOKEN = -2  # the choice if logits were not finite; equals no token and no draft


class Mover(Protocol):
    """Moves KV blocks of an engine between the tiers; see workers.tiers.mover."""

    def submit(self, order: MoveOrder, on_moved: Callable[[MoveResult], None]) -> None: ...

    def list_disk(self, on_listed: Callable[[list[bytes]], None]) -> None: ...

    def reset(self) -> None: ...

    def close(self, patience_s: float) -> None: ...


class Engine(Protocol):
    """One engine of a worker process, as the server sees it. Called by one thread, one round at a time."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def mover(self) -> Mover | None:
        """None if there are no tiers below the device."""

    @property
    def num_ranks(self) -> int:
        """Ranks 0 to num_ranks - 1 of the group take part in its rounds."""

    @property
    def captures_steps(self) -> bool:
        """Whether small steps are captured, as CUDA graphs on a GPU."""

    def check(self, round_: Round, queued: Sequence[Round] = ()) -> None:
        """Raises ProtocolError if the round does not fit the state, which stays untouched. Removes from the round what
        the rounds `queued` after it have made useless."""

    def run(self, round_: Round) -> RoundResult:
        """Run a round that `check` accepted; fill in `rows` and `num_steps`. Every rank calls it for each round."""

    def reset(self) -> None:
        """Free all slots and end all moves: another scheduler has taken over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRunner:
    """A model on this rank's device."""

    model: CausalLM | LayerParallelLM
    kv_caches: KVCaches
    kv_addresses: CacheAddresses  # of kv_caches
    sampler: Sampler
    num_ranks: int  # the number of ranks that share the model and its vocabulary
    device: torch.device
    captured: CapturedModel | None = None  # steps that one launch runs
    is_approximate: bool = False  # draft_forward differs from forward: the model is layer-parallel
    tracer: Tracer = field(default_factory=Tracer)
    tile_rows: int = SAMPLING_TILE_ROWS  # most rows whose logits are in memory at a time

    def forward(self, batch: Batch) -> Tensor:
        """Hidden states [num_tokens, hidden_size] of a batch on the host, valid until the next forward. Afterwards the
        cache holds K and V of its tokens."""
        return self._run(self.model.forward, batch)

    def draft_forward(self, batch: Batch) -> Tensor:
        """As `forward`, for callers that accept approximate hidden states, keys and values. Equal to `forward` unless
        `is_approximate`."""
        return self._run(self.model.draft_forward, batch)

    def _run(self, forward: Callable[[Batch, KVCaches], Tensor], batch: Batch) -> Tensor:
        with torch.inference_mode():
            hidden = None if self.captured is None else self.captured.forward(batch)
            return forward(batch.to(self.device), self.kv_caches) if hidden is None else hidden

    def copy_blocks(self, sources: Mapping[int, int]) -> None:
        """Copy the KV of all layers from each value to its key. No block is both."""
        with self.tracer.span("transfer"):
            from_blocks, to_blocks = (
                upload(list(blocks), torch.int64, self.device) for blocks in (sources.values(), sources)
            )
            copy_blocks(self.kv_caches, from_blocks, to_blocks, addresses=self.kv_addresses)

    def choose(
        self, hidden: Tensor, entries: Sequence[RowEntry], *, num_alternatives: int = 0, with_confidence: bool = False
    ) -> SampledRows:
        """Choose a token for each row of hidden [num_rows, hidden_size], tile by tile; see Sampler.sample."""

        def choose_tile(rows: slice, tile: Tensor) -> SampledRows:
            native, settings = self.model.native, self._native_settings(entries[rows])
            if native is not None and settings is not None:
                hidden_of_rows = tile[: rows.stop - rows.start]
                return SampledRows.of_choices(
                    native.choose(hidden_of_rows, settings, num=1 + num_alternatives, with_confidence=with_confidence)
                )
            return self.sampler.sample(
                shard_logits(self.model, tile, self.num_ranks)[: rows.stop - rows.start],
                self.model.vocab_range[0],
                SamplingRows.build(entries[rows], self.device),
                num_alternatives=num_alternatives,
                with_confidence=with_confidence,
            )

        with torch.inference_mode(), self.tracer.span("sample"):
            return SampledRows.join([choose_tile(rows, tile) for rows, tile in self._tiles(hidden)])

    def draft(
        self,
        hidden: Tensor,
        entries: Sequence[RowEntry],
        block_table: Tensor,
        *,
        num_steps: int,
        num_alternatives: int = 0,
        with_confidence: bool = False,
    ) -> list[SampledRows]:
        """Choose a token for each row of hidden [num_rows, hidden_size], the states of the last tokens of seqs, then
        compute these tokens and choose again, and so on. block_table: int32 [num_rows, max_blocks], on the host.

        Returns the choices of each step: `num_steps` if native kernels or captured steps compute all of it and logits
        stay finite, else fewer, but at least one. There was a forward between two steps, none after the last.
        """
        native, settings = self.model.native, self._native_settings(entries)
        if native is None or settings is None or num_steps == 1:
            first = self.choose(hidden, entries, num_alternatives=num_alternatives, with_confidence=with_confidence)
            if self.captured is None or num_steps == 1:
                return [first]
            with torch.inference_mode(), self.tracer.span("draft"):
                return self.captured.draft(first, entries, block_table, num_steps=num_steps) or [first]
        with torch.inference_mode(), self.tracer.span("draft"):
            steps = native.draft(
                hidden,
                settings,
                block_table,
                self.kv_caches,
                num_steps=num_steps,
                num=1 + num_alternatives,
                with_confidence=with_confidence,
            )
            return [SampledRows.of_choices(choices) for choices in steps]

    def _native_settings(self, entries: Sequence[RowEntry]) -> RowSettings | None:
        """What decides the tokens of these rows, if native kernels can choose them."""
        return None if self.model.native is None else native_settings(entries)

    def prompt_logprobs(self, hidden: Tensor, next_token_ids: Tensor, num_top: int) -> list[PositionLogprobs]:
        """Logprobs of the tokens int64 [num_rows] after rows of hidden [num_rows, hidden_size], tiled as in
        `choose`."""
        result: list[PositionLogprobs] = []
        with torch.inference_mode():
            for rows, tile in self._tiles(hidden):
                result += self.sampler.prompt_logprobs(
                    shard_logits(self.model, tile, self.num_ranks)[: rows.stop - rows.start],
                    self.model.vocab_range[0],
                    next_token_ids[rows],
                    num_top,
                )
        return result

    def _tiles(self, hidden: Tensor) -> list[tuple[slice, Tensor]]:
        """The slice of rows of hidden [num_rows, hidden_size] in each tile, and the tile. If there are several, the
        last is padded to `tile_rows`, because a product of fewer rows may round differently."""
        size, num_rows = self.tile_rows, hidden.shape[0]
        if num_rows > size:
            hidden = F.pad(hidden, (0, 0, 0, -num_rows % size))
        return [
            (slice(start, min(start + size, num_rows)), hidden[start : start + size])
            for start in range(0, num_rows, size)
        ]


@dataclass(frozen=True, slots=True)
class ActiveRow:
    """A row that computes something, and the answer to fill in."""

    row: Row
    plan: RowPlan
    result: RowResult


class ModelEngine(ABC):
    """An Engine around a model: the code that target and draft share."""

    def __init__(
        self,
        runner: ModelRunner,
        table: SeqTable,
        info: EngineInfo,
        plan: Callable[[Round, SeqTable], list[RowPlan]],
        mover: Mover | None,
    ) -> None:
        self.mover = mover
        self._runner = runner
        self._table = table
        self._info = info
        self._plan = plan
        self._checked: tuple[Round | None, list[RowPlan]] = (None, [])  # on the leader `run` follows `check`

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def num_ranks(self) -> int:
        return self._runner.num_ranks

    @property
    def captures_steps(self) -> bool:
        return self._runner.captured is not None

    def check(self, round_: Round, queued: Sequence[Round] = ()) -> None:
        self._checked = round_, self._plan(round_, self._table)

    def reset(self) -> None:
        self._table.free_all()
        if self.mover is not None:
            self.mover.reset()

    def run(self, round_: Round) -> RoundResult:
        checked, plans = self._checked
        if checked is not round_:
            plans = self._plan(round_, self._table)
        copies = apply_changes(round_, self._table)
        if copies:
            self._runner.copy_blocks(copies)
        results = [RowResult(slot=plan.slot) for plan in plans]
        active = [ActiveRow(*each) for each in zip(round_.rows, plans, results, strict=True) if not each[1].is_idle]
        return RoundResult(rows=results, num_steps=self._run_rows(round_, active) if active else 0)

    @abstractmethod
    def _run_rows(self, round_: Round, active: list[ActiveRow]) -> int:
        """Compute the chunks and choose tokens; fill in the results. Returns the number of forwards."""


def apply_changes(round_: Round, table: SeqTable) -> dict[int, int]:
    """Apply all of a round that comes before its chunks: frees, inits, forks, crops, new tokens and blocks. Returns the
    blocks to copy before any chunk runs: destination -> source."""
    for slot in round_.free_slots:
        table.free(slot)
    for seq in round_.init_seqs:
        table.init(seq)
    sources: dict[int, int] = {}
    for fork in round_.forks:
        if blocks := table.fork(fork):
            source, own = blocks
            sources[own] = sources.get(source, source)  # all copies run at once, so a copy of a copy takes the original
    for row in round_.rows:
        if table.is_void[row.slot]:
            continue
        if row.HasField("crop_len"):
            table.crop(row.slot, row.crop_len)
        if row.append_token_ids:
            table.give(row.slot, row.append_token_ids)
        if row.host_slots:
            table.move_to_host(row.slot, row.host_slots)
        if row.new_block_ids:
            table.add_blocks(row.slot, row.new_block_ids)
    return sources


def chosen_token_ids(sampled: SampledRows) -> Tensor:
    """int64 [num_rows], NO_TOKEN where the logits were not finite."""
    return torch.where(sampled.non_finite, NO_TOKEN, sampled.token_ids)

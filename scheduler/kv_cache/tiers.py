"""Host memory and disk below the device blocks of one engine's KV cache."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

from childproc.block_digests import Digest
from echelon.pb import scheduler_pb2, worker_pb2
from scheduler.config import TierConfig
from scheduler.kv_cache.blocks import BlockManager
from scheduler.kv_cache.contents import CacheContents
from scheduler.kv_cache.disk import Attempts, DiskTier
from scheduler.kv_cache.fetching import Fetching
from scheduler.kv_cache.gains import Gain
from scheduler.kv_cache.host import HostTier
from scheduler.kv_cache.moves import LOAD, READ, STORE, WRITE, Kind, Move, Moves
from scheduler.kv_cache.storing import Storing
from scheduler.kv_cache.writing import Writing


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """Sizes and numbers of moves."""

    move_bytes: int = 16 << 20  # of one move on one rank; so a load waits little for a store; not measured
    most_reads: int = 8  # in flight; not measured
    reading_share: int = 2  # reads fill at most the host slots divided by this; not measured
    most_writes: int = 2  # in flight; not measured
    most_stores: int = 4  # in flight; not measured
    device_spare_share: int = 16  # stores leave one device block in this many free; not measured
    host_spare_share: int = 8  # one host slot in this many is kept free, by writing old blocks to disk; not measured
    looks: int = 2  # old blocks looked at for each slot to be freed, since some cannot go yet; not measured
    uses_to_write: int = 2  # a block that so many seqs began with is written to disk; not measured


_TUNING = Tuning()


class Tiers:
    """Decides which blocks move where, and knows what is where once the moves are answered.

    A block is stored to host memory when it is complete, or when it is about to leave the device, and written to disk
    when it has been used again or is about to leave host memory. Until a move is answered, the blocks that it touches
    are held and their slots are pinned. So nothing changes under a move.
    """

    def __init__(
        self,
        blocks: BlockManager,
        info: worker_pb2.EngineInfo,
        incarnation: int,
        config: TierConfig,
        contents: CacheContents,
        tuning: Tuning = _TUNING,
    ) -> None:
        """`contents` hears what is in host memory and on disk."""
        most = max(1, tuning.move_bytes // max(1, info.block_bytes))
        rounds = info.tier_dtype not in ("", "same")
        # What makes a seq approximate that begins with rounded blocks, for `usage`.
        self.approximations = [f"kv_cache.tier_dtype: {info.tier_dtype}"] if rounds else []
        self._writes = config.writes_disk and info.num_disk_blocks > 0
        self._writes_all = False  # the process is about to end
        num_spare_slots = -(-info.num_host_slots // tuning.host_spare_share)
        self.host = HostTier(info.num_host_slots, contents)
        self.disk = DiskTier(info.num_disk_blocks, contents)
        self.moves = Moves(incarnation)
        self.fetching = Fetching(
            blocks,
            self.host,
            self.disk,
            self.moves,
            timeout_s=config.load_timeout_s,
            most=most,
            most_reads=tuning.most_reads,
            most_reading=info.num_host_slots // tuning.reading_share,
            rounds=rounds,
            ignores_prices=config.ignores_prices,
        )
        self._writing = Writing(
            self.host,
            self.disk,
            self.moves,
            most=most,
            most_in_flight=tuning.most_writes,
            num_spare=num_spare_slots,
            looks=tuning.looks,
        )
        self._storing = Storing(
            blocks,
            self.host,
            self.moves,
            most=most,
            most_in_flight=tuning.most_stores * most,
            num_spare=-(-info.num_blocks // tuning.device_spare_share),
            most_slots=num_spare_slots if self._writes else info.num_host_slots,
            # What one round may take, so that nothing has to wait for a store.
            look_ahead=blocks.num_blocks_for(info.max_num_batched_tokens) if config.stores_on_evict else None,
            on_stored=self._on_stored,
        )
        self._config = config
        self._host_block_bytes, self._disk_block_bytes = info.host_block_bytes, info.disk_block_bytes
        self._uses_to_write = tuning.uses_to_write

    # -- what seqs do -------------------------------------------------------------------------------------------------

    def store(self, block_id: int, digest: Digest) -> None:
        """The device block is complete: keep a copy."""
        self._storing.add(block_id, digest)

    def use(self, block_ids: Sequence[int], digests: Sequence[Digest]) -> None:
        """A seq begins with these device blocks."""
        for block in self.host.use(digests):
            if self._writes and block.num_uses >= self._uses_to_write:
                self._writing.add(block.digest)
        for block_id, digest in zip(block_ids, digests, strict=True):
            self._storing.add(block_id, digest)  # host memory may have evicted it

    def forget(self, digests: Iterable[Digest]) -> None:
        """Never give these to a seq again: their contents are not to be trusted."""
        for digest in digests:
            self.host.forget(digest)
            self._writing.forget(digest)

    @property
    def has_stored(self) -> bool:
        """Whether no block is on its way to host memory, or waits for it."""
        return self._storing.is_done

    @property
    def num_held_by_stores(self) -> int:
        """Device blocks that nothing else holds."""
        return self._storing.num_held_alone

    # -- moves --------------------------------------------------------------------------------------------------------

    def orders(self, now: float) -> Iterator[worker_pb2.MoveOrder]:
        """The moves to order now."""
        yield from self.fetching.orders(now)
        yield from self._storing.orders(now)
        while self._writes and (write := self._writing.order(now)) is not None:
            yield write

    def on_moved(self, result: worker_pb2.MoveResult, now: float) -> None:
        """Raises UnexpectedAnswerError."""
        move = self.moves.complete(result, now)
        for digest in result.evicted:
            self.disk.evict(digest)
        attempts = self._attempts_of(move)
        has_failed = bool(result.error) or (move.kind == WRITE and bool(result.failed))  # a read may just find nothing
        if attempts is not None and has_failed:
            self.disk.failed(attempts, result.error or "some blocks were not written", now)
        elif attempts is not None and not move.is_late:
            attempts.worked()

    def write_all(self) -> None:
        """Put all that device and host memory hold on disk, as far as it works. No seq runs any more."""
        if self._writes:
            self._writes_all = True
            self._storing.add_all()
            self._writing.add_all()

    def has_written(self, now: float) -> bool:
        return not self._writes or (self._storing.is_done and self._writing.is_done(now))

    def on_disk_contents(self, contents: worker_pb2.DiskContents) -> None:
        self.disk.announce(contents.digests, is_last=contents.is_last)

    def expects_more(self, now: float) -> bool:
        """Whether seqs had better wait, because the ranks are about to say what is on disk."""
        return self.disk.expects_list(now, self._config.load_timeout_s)

    def expire(self, now: float) -> None:
        """Let seqs go on whose blocks have not come in time, and note disk moves that take too long."""
        for move in self.moves:
            attempts = self._attempts_of(move)
            if attempts is not None and not move.is_late and now >= move.sent_s + self._config.load_timeout_s:
                move.is_late = True
                self.disk.failed(attempts, f"no answer within {self._config.load_timeout_s:g} s", now)
        self.disk.expire(now)
        self.fetching.expire(now)

    def next_deadline(self) -> float:
        """When to call `expire`; inf if nothing is awaited."""
        late = (move.sent_s for move in self.moves if move.needs_disk and not move.is_late)
        answers = min(late, default=inf) + self._config.load_timeout_s
        return min(self.fetching.next_deadline(), answers, self._writing.next_trial(), self.disk.list_due_s)

    def _attempts_of(self, move: Move) -> Attempts | None:
        if not move.needs_disk:
            return None
        return self.disk.reads if move.kind == READ else self.disk.writes

    def report(self, role: "worker_pb2.EngineRole.ValueType") -> Iterator[scheduler_pb2.TierStatus]:
        """Host memory, then the disk if there is one."""
        yield self._report(
            role,
            tier="host",
            block_bytes=self._host_block_bytes,
            num_blocks=self.host.num_slots,
            num_used_blocks=len(self.host),
            evicted_blocks_total=self.host.num_evictions,
            moves=(STORE, LOAD),
            gain=self.fetching.gains.host,
        )
        if self.disk.num_blocks:
            disk = self._report(
                role,
                tier="disk",
                block_bytes=self._disk_block_bytes,
                num_blocks=self.disk.num_blocks,
                num_used_blocks=len(self.disk),
                evicted_blocks_total=self.disk.num_evictions,
                moves=(WRITE, READ),
                gain=self.fetching.gains.disk,
            )
            disk.paused = self.disk.is_failing
            disk.last_error = self.disk.last_error
            yield disk

    def _report(
        self, role: "worker_pb2.EngineRole.ValueType", *, moves: tuple[Kind, Kind], gain: Gain, **fields: Any
    ) -> scheduler_pb2.TierStatus:
        """`moves`: into the tier and out of it. `fields`: what the tier itself knows."""
        into, out = (self.moves.totals[kind] for kind in moves)
        return scheduler_pb2.TierStatus(
            engine=role,
            stored_blocks_total=into.num_blocks,
            fetched_blocks_total=out.num_blocks,
            failed_blocks_total=into.num_failed + out.num_failed,
            damaged_blocks_total=out.num_damaged,
            store_seconds_total=into.run_s,
            fetch_seconds_total=out.run_s,
            store_queue_seconds_total=into.queue_s,
            fetch_queue_seconds_total=out.queue_s,
            avoided_seconds_total=gain.avoided_s,
            waited_seconds_total=gain.waited_s,
            **fields,
        )

    def _on_stored(self, digest: Digest) -> None:
        if self._writes and (self._writes_all or self._config.writes_at_once):
            self._writing.add(digest)

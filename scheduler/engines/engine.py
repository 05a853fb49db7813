"""The scheduler's view of one engine: its slots, its blocks and its rounds in flight."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf

from echelon.pb import sampling_pb2, worker_pb2
from scheduler.config import TierConfig
from scheduler.engines.patience import Patience
from scheduler.engines.round_cost import RoundCost
from scheduler.engines.seat import Seat
from scheduler.errors import UnexpectedAnswerError
from scheduler.kv_cache.blocks import BlockManager
from scheduler.kv_cache.fetching import Fetch
from scheduler.kv_cache.tiers import Tiers
from scheduler.requests.digests import Digest
from scheduler.requests.request import Seq


class NoRoomError(RuntimeError):
    """Too few blocks are free."""


@dataclass(frozen=True, slots=True)
class ForkFrom:
    """A draft slot begins as a branch of another slot."""

    parent_slot: int
    length: int  # tokens that both share
    num_shared_blocks: int  # blocks that these tokens fill


@dataclass(slots=True, kw_only=True, eq=False)
class PlannedRow:
    """What one seq does in a round."""

    seq: Seq
    seat: Seat
    start: int  # tokens computed before the chunk
    chunk_len: int
    crop_len: int | None = None
    append_token_ids: Sequence[int] = ()
    drafts: Sequence[int] = ()  # target: to verify
    fork: ForkFrom | None = None  # draft: how the slot of a branch begins
    calibrate_len: int = 0  # draft: tokens whose approximate KV is first replaced
    num_draft_tokens: int = 0  # draft: to draft
    epoch: int = 0  # draft: epoch of the chain that grows
    num_exact: int = 0  # draft: leading tokens of the seat whose KV is exact after the row
    num_pending: int = 0  # target: tokens that the row is certain to commit


@dataclass(slots=True, kw_only=True, eq=False)
class InFlight:
    round_id: int
    rows: list[PlannedRow]
    num_tokens: int
    is_prefill: bool  # a row computes more than a decode or verify step does
    sent_s: float
    work: int = 1  # upper bound, in forwards of one token: tokens and drafts
    # After it has landed: each row with its answer, and the number of forwards that ran one after another.
    answered: list[tuple[PlannedRow, worker_pb2.RowResult]] = field(default_factory=list)
    num_steps: int = 0
    wall_s: float = 0.0  # from when the engine could have begun to when its answer came
    was_late: bool = False  # it took so long that it must have stood still, so its time is no measurement


class EngineView:
    """Slots and blocks of a connected engine.

    Rounds run in the order in which they are sent, so slots and blocks that a seq returns may be reused at once: the
    next holder's round runs after the last one that writes for the old holder.
    """

    def __init__(
        self,
        info: worker_pb2.EngineInfo,
        incarnation: int,
        *,
        enable_prefix_caching: bool,
        tiers: TierConfig | None = None,
    ) -> None:
        self.blocks = BlockManager(info.num_blocks, info.block_size, enable_prefix_caching=enable_prefix_caching)
        self.cost = RoundCost()
        has_tiers = enable_prefix_caching and info.num_host_slots > 0
        self.tiers = Tiers(self.blocks, info, incarnation, tiers or TierConfig()) if has_tiers else None
        self.info = info
        self.in_flight: deque[InFlight] = deque()
        self.num_rounds = 0
        self.patience = Patience()
        self._incarnation = incarnation
        self._landed_s = float("-inf")  # when the last answer came
        self._free_slots = list(reversed(range(info.num_slots)))
        self._slots_to_free: list[int] = []

    @property
    def longest_seq(self) -> int:
        """Length of a seq that fits whatever else runs, so that no seq is preempted forever."""
        return min(self.info.max_model_len, self.info.num_blocks * self.info.block_size)

    @property
    def idle_since(self) -> float | None:
        """When its last round came back; None while one is in flight."""
        return None if self.in_flight else self._landed_s

    def waiting_since(self, not_before: float = -inf) -> float:
        """The earliest time at which the oldest round in flight could have begun; inf if none is in flight."""
        return max(self.in_flight[0].sent_s, self._landed_s, not_before) if self.in_flight else inf

    def late_at(self, not_before: float = -inf) -> float:
        """When this round becomes late; inf if there is none."""
        return self.waiting_since(not_before) + self.patience.late_s(self.in_flight[0].work) if self.in_flight else inf

    @property
    def lost_s(self) -> float:
        """Seconds that this round may take before the engine counts as lost; inf if there is none."""
        return self.patience.lost_s(self.in_flight[0].work) if self.in_flight else inf

    @property
    def num_free_slots(self) -> int:
        return len(self._free_slots)

    def take_slot(self) -> int:
        return self._free_slots.pop()

    def release(self, seat: Seat) -> None:
        """The seq no longer needs its seat, even if rounds in flight still name it."""
        seat.is_released = True
        self.blocks.release(seat.block_ids)
        self._free_slots.append(seat.slot)
        if seat.introduced:
            self._slots_to_free.append(seat.slot)

    def find_prefix(self, seq: Seq) -> list[int]:
        """Blocks that hold the start of the seq's history; its last token always stays to be computed."""
        return self.blocks.match(self._reusable(seq))

    def take_prefix(self, seq: Seq, found: list[int]) -> None:
        """A seat of the seq begins with these blocks, which `find_prefix` has found."""
        self.blocks.hold(found)
        if self.tiers is not None:
            self.tiers.use(found, self._reusable(seq)[: len(found)])

    def fetch(self, seq: Seq, now: float, *, num_spare: int, takes_part: bool) -> Fetch | None:
        """Begin to bring blocks of the seq's prefix from host memory or disk, if that is faster than computing them, or
        wait for them with another seq.

        Args:
            num_spare: free blocks that it must leave.
            takes_part: take as many as there is room for; otherwise too little room is an error.

        Raises NoRoomError.
        """
        if self.tiers is None:
            return None
        fetching, found = self.tiers.fetching, self.find_prefix(seq)
        missing = self._reusable(seq)[len(found) :]
        joined = fetching.join(missing[0]) if missing else None
        if joined is not None:
            return joined
        num_wanted = fetching.num_worthwhile(missing, now, recompute_s=self._recompute_s)
        room = self.blocks.num_free - self.blocks.num_idle_among(found) - num_spare
        if num_wanted > room and not takes_part:
            raise NoRoomError
        num_wanted = min(num_wanted, room)
        return fetching.start(missing[:num_wanted], found, now) if num_wanted > 0 else None

    def expire_fetches(self, now: float) -> None:
        """Let seqs go on whose blocks have not come in time."""
        if self.tiers is not None:
            self.tiers.expire(now)

    def _recompute_s(self, num_blocks: int) -> float:
        return self.cost.seconds(num_blocks * self.blocks.block_size, self.info.max_num_batched_tokens)

    def _reusable(self, seq: Seq) -> list[Digest]:
        """Digests of the blocks with which a seat of the seq may begin."""
        num_blocks = (len(seq.token_ids) - 1) // self.blocks.block_size
        return seq.digests.extend(seq.token_ids, num_blocks)[:num_blocks]

    def grow(self, seat: Seat, num_tokens: int) -> bool:
        """Make the seat's blocks cover `num_tokens` positions. Returns False and changes nothing if too few are
        free."""
        missing = -(-num_tokens // self.blocks.block_size) - len(seat.block_ids)
        if missing <= 0:
            return True
        if missing > self.blocks.num_free:
            return False
        seat.block_ids += self.blocks.allocate(missing, seat.block_ids[-1] if seat.block_ids else None)
        return True

    def room_for(self, seat: Seat) -> int:
        """Positions that the seat's blocks and all free blocks cover together."""
        return (len(seat.block_ids) + self.blocks.num_free) * self.blocks.block_size

    def publish(self, seq: Seq, seat: Seat, num_tokens: int) -> None:
        """The first `num_tokens` tokens of the seq are committed and have KV: let other seqs find it."""
        num_full = num_tokens // self.blocks.block_size
        if num_full <= seat.num_published:
            return
        digests = seq.digests.extend(seq.token_ids, num_full)
        for i in range(seat.num_published, num_full):
            if self.blocks.publish(seat.block_ids[i], digests[i]) and self.tiers is not None:
                self.tiers.store(seat.block_ids[i], digests[i])
        seat.num_published = num_full

    def unpublish(self, seat: Seat) -> None:
        """Let no seq find what the seat holds: it is not to be trusted."""
        forgotten = self.blocks.forget(seat.block_ids[: seat.num_published])
        if self.tiers is not None:
            self.tiers.forget(forgotten)

    def launch(
        self, rows: list[PlannedRow], now: float, *, num_alternatives: int = 0, confidences: bool = False
    ) -> worker_pb2.Round:
        """The message for these rows. Moves their seats to the state after the round."""
        self.num_rounds += 1
        message = worker_pb2.Round(
            round_id=self.num_rounds,
            incarnation=self._incarnation,
            free_slots=self._slots_to_free,
            num_alternatives=num_alternatives,
            confidences=confidences,
        )
        self._slots_to_free = []
        num_tokens = work = 0
        is_prefill = False
        for row in rows:
            if not row.seat.introduced:
                _introduce(message, row)
            _add_row(message, row)
            num_tokens += row.chunk_len + len(row.drafts)
            work += row.chunk_len + len(row.drafts) + row.calibrate_len + row.num_draft_tokens
            is_prefill = is_prefill or row.chunk_len > 2
        self.in_flight.append(
            InFlight(
                round_id=self.num_rounds,
                rows=rows,
                num_tokens=num_tokens,
                is_prefill=is_prefill,
                sent_s=now,
                work=work,
            )
        )
        return message

    def land(self, result: worker_pb2.RoundResult, now: float) -> InFlight:
        """The round that this result answers; it is no longer in flight. Raises UnexpectedAnswerError."""
        if not self.in_flight or self.in_flight[0].round_id != result.round_id:
            expected = self.in_flight[0].round_id if self.in_flight else "none"
            raise UnexpectedAnswerError(f"result of round {result.round_id} came, expected was {expected}")
        record = self.in_flight.popleft()
        if len(result.rows) != len(record.rows):
            num_asked, num_came = len(record.rows), len(result.rows)
            raise UnexpectedAnswerError(f"round {result.round_id} has {num_asked} rows, its result {num_came}")
        record.answered = list(zip(record.rows, result.rows, strict=True))
        for row, answer in record.answered:
            if not _fits(row, answer, self.info.vocab_size):
                raise UnexpectedAnswerError(
                    f"round {result.round_id}: the answer for slot {row.seat.slot} does not fit"
                )
        # If both engines are in one process, the round may have waited for one of the other: its time is not its own.
        began_s = max(record.sent_s + result.queue_ns * 1e-9, self._landed_s)
        record.num_steps = result.num_steps
        record.wall_s = max(result.run_ns * 1e-9, now - began_s)
        record.was_late = record.wall_s > self.patience.late_s(record.work)
        self.patience.observe(record.work, record.wall_s)
        if not record.was_late and not any(row.num_draft_tokens for row in record.rows):
            self.cost.observe(record.num_tokens, result.run_ns)
        self._landed_s = now
        return record


def _fits(row: PlannedRow, answer: worker_pb2.RowResult, vocab_size: int) -> bool:
    """Whether a correct group could answer like this. Later code relies on it."""
    token_ids = list(answer.token_ids)  # reading a repeated field is slow, so read it once
    num_tokens = len(token_ids)
    return (
        answer.slot == row.seat.slot
        and num_tokens <= (row.num_draft_tokens or len(row.drafts) + 1)
        and answer.num_accepted_tokens <= max(0, num_tokens - 1)
        and max(token_ids, default=0) < vocab_size
        and len(answer.confidences) in (0, num_tokens)
    )


def _introduce(message: worker_pb2.Round, row: PlannedRow) -> None:
    seat = row.seat
    if row.fork is None:
        message.init_seqs.append(_seq_init(row))
    else:
        message.forks.add(
            slot=seat.slot,
            parent_slot=row.fork.parent_slot,
            length=row.fork.length,
            new_block_ids=seat.block_ids[row.fork.num_shared_blocks :],
        )
    seat.introduced = True
    seat.num_sent_blocks = len(seat.block_ids)


def _seq_init(row: PlannedRow) -> worker_pb2.SeqInit:
    seq, seat = row.seq, row.seat
    sampling = seq.sampling
    if sampling.HasField("prompt_logprobs") and not seq.request.wants_prompt_logprobs:
        # All prompt logprobs have arrived, so they are not needed again after a preemption.
        sampling = sampling_pb2.SeqSampling()
        sampling.CopyFrom(seq.sampling)
        sampling.ClearField("prompt_logprobs")
    return worker_pb2.SeqInit(
        slot=seat.slot,
        token_ids=seq.token_ids,
        num_prompt_tokens=seq.request.num_prompt_tokens,
        num_computed_tokens=row.start,
        block_table=seat.block_ids,
        sampling=sampling,
    )


def _add_row(message: worker_pb2.Round, row: PlannedRow) -> None:
    seat = row.seat
    pb = message.rows.add(slot=seat.slot, chunk_len=row.chunk_len)
    if row.crop_len is not None:
        pb.crop_len = row.crop_len
    if row.append_token_ids:
        pb.append_token_ids.extend(row.append_token_ids)
    if seat.num_sent_blocks < len(seat.block_ids):
        pb.new_block_ids.extend(seat.block_ids[seat.num_sent_blocks :])
        seat.num_sent_blocks = len(seat.block_ids)
    if row.drafts:
        pb.draft_token_ids.extend(row.drafts)
        pb.draft_base_len = len(row.seq.token_ids)
    if row.num_draft_tokens:
        pb.num_draft_tokens = row.num_draft_tokens
    if row.calibrate_len:
        pb.calibrate_len = row.calibrate_len
    # The last draft is not computed.
    seat.num_computed = row.start + row.chunk_len + max(0, row.num_draft_tokens - 1)

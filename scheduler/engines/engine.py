"""The scheduler's view of one engine: its slots, its blocks and its rounds in flight."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Generic

from childproc.block_digests import Digest
from echelon.pb import worker_pb2
from scheduler.config import TierConfig
from scheduler.engines.patience import Patience
from scheduler.engines.prompt_pace import PromptPace
from scheduler.engines.round_cost import RoundCost
from scheduler.engines.row import PlannedRow, RowT
from scheduler.engines.slot import Slot
from scheduler.engines.spilling import Spilling
from scheduler.errors import UnexpectedAnswerError
from scheduler.kv_cache.blocks import BlockManager
from scheduler.kv_cache.contents import CacheContents
from scheduler.kv_cache.fetching import Fetch
from scheduler.kv_cache.host import HostBlock
from scheduler.kv_cache.tiers import Tiers
from scheduler.requests.request import Request, Seq


class NoRoomError(RuntimeError):
    """Too few blocks are free."""


@dataclass(slots=True, kw_only=True, eq=False)
class InFlight(Generic[RowT]):
    round_id: int
    rows: list[RowT]
    num_tokens: int
    is_prefill: bool  # a row computes more than a decode or verify step does
    sent_s: float
    work: int = 1  # upper bound, in forwards of one token: tokens and drafts
    # Once it has been answered: each row with its answer, and the number of forwards that ran one after another.
    answered: list[tuple[RowT, worker_pb2.RowResult]] = field(default_factory=list)
    num_steps: int = 0
    wall_s: float = 0.0  # from when the engine could have begun to when its answer came
    was_late: bool = False  # it took so long that it must have stalled, so its time is not a measurement


class EngineView(Generic[RowT]):
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
        self.contents = CacheContents()
        self.blocks = BlockManager(
            info.num_blocks, info.block_size, enable_prefix_caching=enable_prefix_caching, contents=self.contents
        )
        self.cost = RoundCost()
        self._pace = PromptPace()
        has_tiers = enable_prefix_caching and info.num_host_slots > 0
        config = tiers or TierConfig()
        self.tiers = Tiers(self.blocks, info, incarnation, config, self.contents) if has_tiers else None
        self.is_budgeted = info.attention == "budgeted" and info.role == worker_pb2.ENGINE_ROLE_TARGET
        self.spilling = Spilling(self.blocks, self.tiers if self.is_budgeted else None)
        self.info = info
        # Of every seq; the KV of a draft changes no output.
        is_approximate = info.kv_dtype == "fp8" and info.role == worker_pb2.ENGINE_ROLE_TARGET
        self._approximations = ["kv_cache.dtype: fp8"] if is_approximate else []
        self.in_flight: deque[InFlight[RowT]] = deque()
        self.num_rounds = 0
        self.patience = Patience()
        self._incarnation = incarnation
        self._answered_s = float("-inf")  # when the last answer came
        self._free_slots = list(reversed(range(info.num_slots)))
        self._slots_to_free: list[int] = []

    @property
    def longest_seq(self) -> int:
        """Length of a seq that fits whatever else runs, so that no seq is preempted forever."""
        return min(self.info.max_model_len, self.info.num_blocks * self.info.block_size)

    @property
    def longest_in_host(self) -> int:
        """The same for a seq that may have blocks in host memory."""
        return max(self.longest_seq, min(self.info.max_model_len, self.spilling.longest_seq))

    def longest(self, request: Request) -> int:
        return self.longest_in_host if request.is_budgeted else self.longest_seq

    @property
    def prompt_budget(self) -> int:
        """Tokens of prompts that a round may compute."""
        return min(self.info.max_num_batched_tokens, self._pace.num_tokens)

    @property
    def idle_since(self) -> float | None:
        """When its last round came back; None while one is in flight."""
        return None if self.in_flight else self._answered_s

    def waiting_since(self, not_before: float = -inf) -> float:
        """The earliest time at which the oldest round in flight could have begun; inf if none is in flight."""
        return max(self.in_flight[0].sent_s, self._answered_s, not_before) if self.in_flight else inf

    def late_at(self, not_before: float = -inf) -> float:
        """When this round becomes late; inf if there is none."""
        return self.waiting_since(not_before) + self.patience.late_s(self.in_flight[0].work) if self.in_flight else inf

    @property
    def lost_s(self) -> float:
        """Seconds that this round may take before the engine counts as lost; inf if there is none."""
        return self.patience.lost_s(self.in_flight[0].work) if self.in_flight else inf

    @property
    def approximations(self) -> list[str]:
        """What can make a seq approximate here, for `usage`."""
        return self._approximations + ([] if self.tiers is None else self.tiers.approximations)

    @property
    def num_free_slots(self) -> int:
        return len(self._free_slots)

    def take_slot(self) -> int:
        return self._free_slots.pop()

    def release(self, slot: Slot) -> None:
        """The seq no longer needs its slot, even if rounds in flight still name it."""
        slot.is_released = True
        self.blocks.release(slot.block_ids[slot.num_in_host :])
        self.spilling.release(slot, self.num_rounds)
        self._end_reads()
        self._free_slots.append(slot.index)
        if slot.introduced:
            self._slots_to_free.append(slot.index)

    def find_prefix(self, seq: Seq) -> list[int]:
        """Blocks that hold the start of the seq's history; its last token always stays to be computed."""
        return self.blocks.match(self._reusable(seq))

    def find_start(self, seq: Seq, *, reuse: bool) -> tuple[list[HostBlock], list[int]]:
        """As `find_prefix`, after the blocks that stay in host memory. `reuse`: otherwise all is computed.

        Raises NoRoomError if host memory has no room for the seq."""
        if not self.spilling.has_room_for(seq):
            raise NoRoomError
        digests = self._reusable(seq) if reuse else []
        in_host = self.spilling.find_for(seq, digests)
        return in_host, self.blocks.match(digests[len(in_host) :])

    def take_prefix(self, seq: Seq, found: list[int], num_in_host: int = 0) -> None:
        """A slot of the seq begins with these blocks, which `find_prefix` has found."""
        self.blocks.hold(found)
        if self.tiers is not None:
            self.tiers.use(found, self._reusable(seq)[num_in_host : num_in_host + len(found)])

    def begin(self, seq: Seq, found: list[int], in_host: Sequence[HostBlock] = ()) -> Slot:
        """A target's slot for the seq, which begins with these blocks. Rounded ones make its request approximate."""
        self.take_prefix(seq, found, len(in_host))
        is_rounded = self.blocks.has_rounded(found)
        if is_rounded and self.tiers is not None:
            seq.request.approximations.update(self.tiers.approximations)
        seq.request.approximations.update(self._approximations)
        block_ids = [block.slot for block in in_host] + found
        slot = Slot(
            index=self.take_slot(),
            block_ids=block_ids,
            num_computed=len(block_ids) * self.blocks.block_size,
            num_published=len(block_ids),
            is_rounded=is_rounded,
            in_host=list(in_host),
        )
        self.spilling.begin(seq, slot)
        return slot

    def is_settling(self, now: float) -> bool:
        """Whether it has just started, and is about to say what it has on disk."""
        return self.tiers is not None and self.tiers.expects_more(now)

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
        if num_wanted <= 0:
            return None
        return fetching.start(missing[:num_wanted], found, now, recompute_s=self._recompute_s)

    @property
    def num_blocks_to_come(self) -> int:
        """Blocks that will be free in a moment, when the stores in flight are answered."""
        return self.spilling.num_to_come + (0 if self.tiers is None else self.tiers.num_held_by_stores)

    def _end_reads(self) -> None:
        """Host slots that were read by rounds that are over."""
        self.spilling.completed(self.in_flight[0].round_id - 1 if self.in_flight else self.num_rounds)

    def expire_fetches(self, now: float) -> None:
        """Let seqs go on whose blocks have not come in time, and let go of blocks that are in host memory by now."""
        self.spilling.move()
        if self.tiers is not None:
            self.tiers.expire(now)

    def _recompute_s(self, num_blocks: int) -> float:
        return self.cost.seconds(num_blocks * self.blocks.block_size, self.prompt_budget)

    def _reusable(self, seq: Seq) -> list[Digest]:
        """Digests of the blocks with which a slot of the seq may begin."""
        num_blocks = (len(seq.token_ids) - 1) // self.blocks.block_size
        return seq.digests.extend(seq.token_ids, num_blocks)[:num_blocks]

    def grow(self, slot: Slot, num_tokens: int) -> bool:
        """Make the slot's blocks cover `num_tokens` positions. Returns False and changes nothing if too few are
        free."""
        missing = -(-num_tokens // self.blocks.block_size) - len(slot.block_ids)
        if missing <= 0:
            return True
        if missing > self.blocks.num_free:
            return False
        slot.block_ids += self.blocks.allocate(missing, slot.last_block_id)
        return True

    def room_for(self, slot: Slot) -> int:
        """Positions that the slot's blocks and all free blocks cover together."""
        return (len(slot.block_ids) + self.blocks.num_free) * self.blocks.block_size

    def publish(self, seq: Seq, slot: Slot, num_tokens: int) -> None:
        """The first `num_tokens` tokens of the seq are committed and have KV: let other seqs find it."""
        num_full = num_tokens // self.blocks.block_size
        if num_full <= slot.num_published:
            return
        digests = seq.digests.extend(seq.token_ids, num_full)
        for i in range(slot.num_published, num_full):
            if slot.is_rounded:
                self.blocks.mark_rounded(slot.block_ids[i])
            if self.blocks.publish(slot.block_ids[i], digests[i]) and self.tiers is not None:
                self.tiers.store(slot.block_ids[i], digests[i])
        slot.num_published = num_full

    def unpublish(self, slot: Slot) -> None:
        """Let no seq find what the slot holds: it is not to be trusted."""
        forgotten = self.blocks.forget(slot.block_ids[slot.num_in_host : slot.num_published])
        if self.tiers is not None:
            self.tiers.forget([*forgotten, *(block.digest for block in slot.in_host)])

    def launch(
        self, rows: list[RowT], now: float, *, num_alternatives: int = 0, confidences: bool = False
    ) -> worker_pb2.Round:
        """The message for these rows. Moves their slots to the state after the round."""
        self.num_rounds += 1
        message = worker_pb2.Round(
            round_id=self.num_rounds,
            incarnation=self._incarnation,
            free_slots=self._slots_to_free,
            num_alternatives=num_alternatives,
            confidences=confidences,
        )
        self._slots_to_free = []
        for row in rows:
            _add_row(message, row)
        self.in_flight.append(
            InFlight(
                round_id=self.num_rounds,
                rows=rows,
                num_tokens=sum(row.num_tokens for row in rows),
                is_prefill=any(row.chunk_len > 2 for row in rows),
                sent_s=now,
                work=sum(row.work for row in rows),
            )
        )
        return message

    def complete(self, result: worker_pb2.RoundResult, now: float) -> InFlight[RowT]:
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
                    f"round {result.round_id}: the answer for slot {row.slot.index} does not fit"
                )
        # If both engines are in one process, the round may have waited for one of the other: its time is not its own.
        began_s = max(record.sent_s + result.queue_ns * 1e-9, self._answered_s)
        record.num_steps = result.num_steps
        record.wall_s = max(result.run_ns * 1e-9, now - began_s)
        record.was_late = record.wall_s > self.patience.late_s(record.work)
        self.patience.observe(record.work, record.wall_s)
        if not record.was_late and all(row.is_one_forward for row in record.rows):
            self.cost.observe(record.num_tokens, result.run_ns)
        if record.is_prefill:
            self._pace.observe(record.num_tokens, result.run_ns)
        self._answered_s = now
        self._end_reads()
        return record


def _fits(row: PlannedRow, answer: worker_pb2.RowResult, vocab_size: int) -> bool:
    """Whether a correct group could answer like this. Later code relies on it."""
    token_ids = list(answer.token_ids)  # reading a repeated field is slow, so read it once
    num_tokens = len(token_ids)
    return (
        answer.slot == row.slot.index
        and num_tokens <= row.most_results
        and answer.num_accepted_tokens <= max(0, num_tokens - 1)
        and max(token_ids, default=0) < vocab_size
        and len(answer.confidences) in (0, num_tokens)
    )


def _add_row(message: worker_pb2.Round, row: PlannedRow) -> None:
    """Write the row, and what the engine does not know of its slot. The slot moves to the state after the row."""
    slot = row.slot
    pb = message.rows.add()
    row.write(pb)
    if not slot.introduced:
        row.introduce(message)
        slot.introduced = True
    else:
        pb.host_slots.extend(slot.block_ids[slot.num_sent_in_host : slot.num_in_host])
        pb.new_block_ids.extend(slot.block_ids[slot.num_sent_blocks :])
    slot.num_sent_blocks, slot.num_sent_in_host = len(slot.block_ids), slot.num_in_host
    slot.num_computed = row.num_computed

"""A worker group without a model: it follows worker.proto exactly and refuses whatever breaks it.

The next token is a pure function of everything before it, of the seed and of the sample index. The history comes from
the simulated KV cache, so a block that is freed, shared or reused too early changes the tokens. `plain_tokens` computes
the same without cache and rounds, so a stream is right exactly when it equals that.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain

from echelon.pb import sampling_pb2, worker_pb2
from tests.helpers.fake_tiers import LOAD, STORE, FakeTiers, SchedulerFaultError

_MASK = (1 << 64) - 1


def _mix(state: int, value: int) -> int:
    state = (state ^ (value + 0x9E3779B97F4A7C15)) * 0xBF58476D1CE4E5B9 & _MASK
    return state ^ (state >> 29)


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeModel:
    """Chooses tokens below `vocab_size`. `agreement`: how many of 100 choices equal the target's."""

    vocab_size: int = 40
    agreement: int = 100
    bad_prefix: tuple[int, ...] | None = None  # a history that ends with these tokens gives non-finite logits
    foresight: int = 70  # of 100 tokens that are not its first choice: how many are its second
    knows_its_doubts: bool = False  # it is sure of three in four of its right choices

    def choose(self, prefix: int, sampling: sampling_pb2.SeqSampling, num_outputs: int) -> int:
        """The next token. prefix: a hash of the history."""
        noise = _mix(_mix(prefix, sampling.seed), sampling.sample_index)
        if _mix(noise, 77) % 100 >= self.agreement:
            noise += 1
        if num_outputs >= sampling.min_tokens:
            return noise % self.vocab_size
        allowed = [t for t in range(self.vocab_size) if t not in sampling.suppressed_token_ids]
        return allowed[noise % len(allowed)]

    def choose_after(self, history: Sequence[int], sampling: sampling_pb2.SeqSampling, num_prompt: int) -> int:
        prefix = 0
        for token_id in history:
            prefix = _mix(prefix, token_id)
        return self.choose(prefix, sampling, len(history) - num_prompt)

    def confidence(self, prefix: int, sampling: sampling_pb2.SeqSampling) -> float:
        if not self.knows_its_doubts:
            return self.agreement / 100
        noise = _mix(_mix(prefix, sampling.seed), sampling.sample_index)
        is_right = _mix(noise, 77) % 100 < self.agreement
        return 0.99 if is_right and _mix(noise, 99) % 4 else 0.5

    def runners_up(self, chosen: int, prefix: int, sampling: sampling_pb2.SeqSampling, count: int) -> list[int]:
        """What this draft would have chosen next. A wrong choice is the right one plus one."""
        offset = 1 if _mix(_mix(prefix, sampling.seed), 5) % 100 < self.foresight else 2
        return [(chosen - offset - i) % self.vocab_size for i in range(count)]


def plain_tokens(
    prompt: Sequence[int], sampling: sampling_pb2.SeqSampling, count: int, model: FakeModel | None = None
) -> list[int]:
    """`count` tokens as plain decoding gives them, before any stop condition."""
    model = model or FakeModel()
    prefix = 0
    for token_id in prompt:
        prefix = _mix(prefix, token_id)
    tokens: list[int] = []
    for num_outputs in range(count):
        tokens.append(model.choose(prefix, sampling, num_outputs))
        prefix = _mix(prefix, tokens[-1])
    return tokens


@dataclass(slots=True, kw_only=True)
class _Slot:
    history: list[int]
    num_prompt: int
    num_computed: int
    blocks: list[int]
    sampling: sampling_pb2.SeqSampling
    num_exact: int = 0  # leading tokens with the exact model's KV
    num_given: int = 0  # leading tokens that came from the scheduler; this engine's drafts follow them
    num_in_host: int = 0  # leading blocks that are host slots
    fell_short: bool = False  # the chain ended before all ordered drafts were written


@dataclass(slots=True, kw_only=True)
class FakeEngine:
    """One engine. `run` runs rounds in the order in which they come."""

    role: "worker_pb2.EngineRole.ValueType" = worker_pb2.ENGINE_ROLE_TARGET
    model: FakeModel = field(default_factory=FakeModel)
    num_blocks: int = 64
    block_size: int = 4
    num_slots: int = 8
    max_model_len: int = 128
    max_num_batched_tokens: int = 64
    incarnation: int = 1
    lp_size: int = 1  # > 1: drafts leave approximate KV
    # The time of a round in ns, by its number of tokens.
    run_ns: Callable[[int], int] = lambda num_tokens: 1_000_000 + 1_000 * num_tokens
    slots: dict[int, _Slot | None] = field(default_factory=dict)  # None: a branch that could not be made
    num_rounds: int = 0
    num_tokens: int = 0  # tokens that went through the model
    _kv: dict[tuple[int, int], int] = field(default_factory=dict)  # (block, offset) -> hash of the prefix up to it
    _approximate: set[tuple[int, int]] = field(default_factory=set)  # places whose KV is approximate
    num_overtaken: int = 0  # rows
    _overtaken: set[tuple[int, int]] = field(default_factory=set)  # (round_id, slot) of those rows
    _last_round_id: int = -1
    tiers: FakeTiers | None = None
    tier_dtype: str = "same"
    attention: str = "full"
    _reading: list[int] = field(default_factory=list)  # blocks that moves in flight read
    _filling: list[int] = field(default_factory=list)  # blocks that they write

    @property
    def info(self) -> worker_pb2.EngineInfo:
        return worker_pb2.EngineInfo(
            role=self.role,
            vocab_size=self.model.vocab_size,
            num_blocks=self.num_blocks,
            block_size=self.block_size,
            num_slots=self.num_slots,
            max_model_len=self.max_model_len,
            max_num_batched_tokens=self.max_num_batched_tokens,
            lp_size=self.lp_size,
            block_bytes=1,
            num_host_slots=self.tiers.num_slots if self.tiers else 0,
            num_disk_blocks=self.tiers.num_disk_blocks if self.tiers else 0,
            tier_dtype=self.tier_dtype,
            attention=self.attention,
        )

    def order(self, order: worker_pb2.MoveOrder) -> None:
        """A move is in flight from now on."""
        assert self.tiers is not None, "an engine without tiers moves nothing"
        self.tiers.order(order)
        if order.kind == STORE:
            self._reading += order.block_ids
        if order.kind == LOAD:
            _require(not set(order.block_ids) & {*self._reading, *self._filling}, "no other move touches the block")
            self._filling += order.block_ids

    def receive(self, message: worker_pb2.Round) -> None:
        """A round is on its way, after the moves ordered so far."""
        named = [seq.block_table[seq.num_in_host :] for seq in message.init_seqs]
        named += [each.new_block_ids for each in (*message.forks, *message.rows)]
        _require(
            not set(chain.from_iterable(named)) & set(self._filling), "a block that is being loaded belongs to no seq"
        )

    def move(self, order: worker_pb2.MoveOrder, fails: Collection[int] = (), error: str = "") -> worker_pb2.MoveResult:
        """Do an ordered move; the blocks at the indexes `fails` are not moved."""
        assert self.tiers is not None, "an engine without tiers moves nothing"
        size = self.block_size
        blocks = {
            block_id: tuple(self._kv.get((block_id, offset)) for offset in range(size)) for block_id in order.block_ids
        }
        if order.kind == STORE:
            places = {(block_id, offset) for block_id in order.block_ids for offset in range(size)}
            _require(not places & self._approximate, "KV that is stored is exact")
            _require(all(None not in contents for contents in blocks.values()), "blocks that are stored are full")
        result = self.tiers.run(order, blocks, fails, error)
        for index, block_id in enumerate(order.block_ids):
            (self._reading if order.kind == STORE else self._filling).remove(block_id)
            if order.kind == LOAD and index not in fails:
                for offset, held in enumerate(blocks[block_id]):
                    _require(held is not None, "blocks that are loaded are full")
                    self._kv[block_id, offset] = held or 0
                    self._mark((block_id, offset), approximate=False)
        return result

    def reset(self) -> None:
        """Starts a new stream: all slots are free."""
        self.slots.clear()
        self._overtaken.clear()
        self._reading.clear()
        self._filling.clear()
        if self.tiers is not None:
            self.tiers.reset()
        self._last_round_id = -1

    def overtake(self, message: worker_pb2.Round, queued: Iterable[worker_pb2.Round]) -> None:
        """Called when the round is about to run and these have arrived after it. What they make useless is not
        computed."""
        if self.role != worker_pb2.ENGINE_ROLE_DRAFT:
            return
        for row in message.rows:
            slot = None if row.slot in message.free_slots else self.slots.get(row.slot)
            num_computed = slot.num_computed if slot is not None else 0
            if row.HasField("crop_len"):
                num_computed = min(num_computed, row.crop_len)
            crops = [other for later in queued for other in later.rows if other.slot == row.slot]
            is_freed = any(row.slot in later.free_slots for later in queued)
            if not row.calibrate_len and (
                is_freed or any(crop.HasField("crop_len") and crop.crop_len <= num_computed for crop in crops)
            ):
                row.chunk_len = row.num_draft_tokens = 0
                self._overtaken.add((message.round_id, row.slot))
                self.num_overtaken += 1

    def run(self, message: worker_pb2.Round) -> worker_pb2.RoundResult:
        _require(message.round_id > self._last_round_id, "round_id ascends")
        _require(message.incarnation == self.incarnation, "incarnation")
        self._last_round_id = message.round_id
        for slot in message.free_slots:
            _require(slot in self.slots, f"slot {slot} is freed and holds no seq")
            del self.slots[slot]
        for seq in message.init_seqs:
            self._init(seq)
        for fork in message.forks:
            self._fork(fork)
        _require(len({row.slot for row in message.rows}) == len(message.rows), "one row a slot")
        result = worker_pb2.RoundResult(round_id=message.round_id, incarnation=self.incarnation)
        before = self.num_tokens
        for row in message.rows:
            result.rows.append(self._run_row(row, message))
        num_tokens = self.num_tokens - before
        _require(num_tokens <= self.max_num_batched_tokens or self.role != worker_pb2.ENGINE_ROLE_TARGET, "budget")
        result.num_steps = max((row.num_draft_tokens or int(row.chunk_len > 0) for row in message.rows), default=0)
        result.run_ns = self.run_ns(num_tokens)
        self.num_rounds += 1
        return result

    def _init(self, seq: worker_pb2.SeqInit) -> None:
        _require(seq.slot < self.num_slots and seq.slot not in self.slots, f"slot {seq.slot} is free")
        is_target = self.role == worker_pb2.ENGINE_ROLE_TARGET
        _require(is_target or not seq.sampling.HasField("logprobs"), "a draft is asked for no logprobs")
        _require(seq.num_computed_tokens < len(seq.token_ids), "a token is left to compute")
        _require(1 <= seq.num_prompt_tokens <= len(seq.token_ids), "num_prompt_tokens")
        self._check_token_ids(seq.token_ids)
        slot = _Slot(
            history=list(seq.token_ids),
            num_prompt=seq.num_prompt_tokens,
            num_computed=seq.num_computed_tokens,
            blocks=[],
            sampling=seq.sampling,
            num_exact=seq.num_computed_tokens,
            num_given=len(seq.token_ids),
        )
        self._move_to_host(slot, seq.block_table[: seq.num_in_host])
        self._add_blocks(slot, seq.block_table[seq.num_in_host :])
        _require(seq.num_computed_tokens <= len(slot.blocks) * self.block_size, "computed tokens have blocks")
        start = seq.num_in_host * self.block_size
        places = {self._place(slot, position) for position in range(start, seq.num_computed_tokens)}
        _require(not places & self._approximate, "KV that is reused is exact")
        self.slots[seq.slot] = slot

    def _fork(self, fork: worker_pb2.Fork) -> None:
        _require(self.role == worker_pb2.ENGINE_ROLE_DRAFT, "only a draft engine's slots branch")
        _require(fork.slot < self.num_slots and fork.slot not in self.slots, f"slot {fork.slot} is free")
        _require(fork.parent_slot in self.slots, f"slot {fork.parent_slot}, which branches, holds a seq")
        parent = self.slots[fork.parent_slot]
        if parent is None or (parent.fell_short and fork.length > len(parent.history)):
            self.slots[fork.slot] = None
            return
        _require(parent.num_prompt <= fork.length <= len(parent.history), "length of a fork")
        slot = _Slot(
            history=parent.history[: fork.length],
            num_prompt=parent.num_prompt,
            num_computed=min(parent.num_computed, fork.length),
            blocks=[],
            sampling=parent.sampling,
            num_exact=min(parent.num_exact, fork.length),
            num_given=min(parent.num_given, fork.length),
        )
        num_shared = fork.length // self.block_size
        _require(num_shared <= len(parent.blocks), "the parent has the blocks that are shared")
        self._add_blocks(slot, [*parent.blocks[:num_shared], *fork.new_block_ids])
        for position in range(num_shared * self.block_size, slot.num_computed):
            source, place = self._place(parent, position), self._place(slot, position)
            self._kv[place] = self._kv[source]
            self._mark(place, approximate=source in self._approximate)
        self.slots[fork.slot] = slot

    def _mark(self, place: tuple[int, int], *, approximate: bool) -> None:
        (self._approximate.add if approximate else self._approximate.discard)(place)

    def _check_token_ids(self, token_ids: Sequence[int]) -> None:
        _require(all(token_id < self.model.vocab_size for token_id in token_ids), "token ids are of the vocabulary")

    def _add_blocks(self, slot: _Slot, block_ids: Sequence[int]) -> None:
        _require(all(block_id < self.num_blocks for block_id in block_ids), "block ids exist")
        slot.blocks += block_ids
        on_device = slot.blocks[slot.num_in_host :]
        _require(len(set(on_device)) == len(on_device), "a block stands once in a block table")
        _require(len(slot.blocks) <= -(-self.max_model_len // self.block_size), "blocks of one seq")

    def _move_to_host(self, slot: _Slot, host_slots: Sequence[int]) -> None:
        if not host_slots:
            return
        _require(self.attention == "budgeted", "attention reads host memory")
        start, slot.num_in_host = slot.num_in_host, slot.num_in_host + len(host_slots)
        slot.blocks[start : slot.num_in_host] = host_slots
        _require(slot.num_in_host * self.block_size <= slot.num_computed, "blocks in host memory are full")

    def _held(self, slot: _Slot, position: int) -> int | None:
        """What the KV at a position is that of."""
        index, offset = divmod(position, self.block_size)
        if index >= slot.num_in_host:
            return self._kv.get(self._place(slot, position))
        assert self.tiers is not None, "host slots are of a tier"
        contents = self.tiers.host.get(slot.blocks[index])
        return contents[offset] if contents else None

    def _run_row(self, row: worker_pb2.Row, message: worker_pb2.Round) -> worker_pb2.RowResult:
        _require(row.slot in self.slots, f"slot {row.slot} holds a seq")
        slot = self.slots[row.slot]
        result = worker_pb2.RowResult(slot=row.slot)
        if slot is None:
            return result
        self._change(row, slot)
        if (message.round_id, row.slot) in self._overtaken:
            return result
        self._calibrate(slot, row.calibrate_len)
        _require(row.chunk_len + row.calibrate_len >= 1, "a row computes something")
        if slot.fell_short and row.chunk_len == 1 and slot.num_computed == len(slot.history):
            return result
        _require(slot.num_computed + row.chunk_len <= len(slot.history), "the chunk lies within the history")
        start = slot.num_computed
        goes_on = row.chunk_len == 1 and row.num_draft_tokens > 0 and slot.num_given < len(slot.history)
        prefix = self._compute(slot, row.chunk_len, approximately=goes_on and self.lp_size > 1)
        self._add_prompt_logprobs(slot, start, result)
        if slot.num_computed < len(slot.history):
            _require(not row.draft_token_ids and not row.num_draft_tokens, "drafts follow the whole history")
        elif self.role == worker_pb2.ENGINE_ROLE_DRAFT:
            self._draft(slot, prefix, row.num_draft_tokens, result)
            self._add_runners_up(slot, message, result)
        elif self._is_bad(slot):
            result.non_finite = True
            slot.num_computed -= 1
        else:
            self._verify(slot, prefix, row, result)
        return result

    def _change(self, row: worker_pb2.Row, slot: _Slot) -> None:
        """Steps 1 to 3 of a row."""
        if row.HasField("crop_len"):
            _require(self.role == worker_pb2.ENGINE_ROLE_DRAFT, "only a draft engine's history is cut")
            _require(slot.num_prompt <= row.crop_len <= len(slot.history), "crop_len")
            del slot.history[row.crop_len :]
            slot.num_computed = min(slot.num_computed, row.crop_len)
            slot.num_exact = min(slot.num_exact, row.crop_len)
            slot.num_given = min(slot.num_given, row.crop_len)
            slot.fell_short = False
        self._check_token_ids(row.append_token_ids)
        self._check_token_ids(row.draft_token_ids)
        if row.append_token_ids:
            slot.history += row.append_token_ids
            slot.num_given = len(slot.history)
            slot.fell_short = False
        self._move_to_host(slot, row.host_slots)
        self._add_blocks(slot, row.new_block_ids)

    def _calibrate(self, slot: _Slot, count: int) -> None:
        end = min(slot.num_exact + count, slot.num_computed)
        for position in range(slot.num_exact, end):
            self._mark(self._place(slot, position), approximate=False)
        self.num_tokens += end - slot.num_exact
        slot.num_exact = end

    def _is_bad(self, slot: _Slot) -> bool:
        bad = self.model.bad_prefix
        return bad is not None and tuple(slot.history[-len(bad) :]) == bad

    def _compute(self, slot: _Slot, count: int, *, approximately: bool = False) -> int:
        """Computes KV of the next `count` tokens of the history. Returns the hash of the prefix that ends with the
        last."""
        prefix = 0
        for position in range(slot.num_computed):
            prefix = _mix(prefix, slot.history[position])
            held = self._held(slot, position)
            _require(held == prefix, f"KV at position {position} is that of the history")
        # After approximate KV, all KV is approximate, whichever model computes it.
        approximately = approximately or slot.num_exact < slot.num_computed
        for position in range(slot.num_computed, slot.num_computed + count):
            prefix = _mix(prefix, slot.history[position])
            block_id, _ = self._place(slot, position)
            _require(block_id not in self._reading, "a block that is stored is not written")
            self._kv[self._place(slot, position)] = prefix
            self._mark(self._place(slot, position), approximate=approximately)
        slot.num_computed += count
        if not approximately:
            slot.num_exact = slot.num_computed
        self.num_tokens += count
        return prefix

    def _place(self, slot: _Slot, position: int) -> tuple[int, int]:
        _require(position < len(slot.blocks) * self.block_size, f"a block covers position {position}")
        _require(position >= slot.num_in_host * self.block_size, "what is in host memory is not written")
        return slot.blocks[position // self.block_size], position % self.block_size

    def _verify(self, slot: _Slot, prefix: int, row: worker_pb2.Row, result: worker_pb2.RowResult) -> None:
        drafts = list(row.draft_token_ids)
        if row.draft_base_len != len(slot.history):
            drafts = []
        _require(len(slot.history) + len(drafts) < self.max_model_len, "max_model_len")
        base = len(slot.history)
        for i, draft in enumerate([*drafts, None]):
            token_id = self.model.choose(prefix, slot.sampling, base + i - slot.num_prompt)
            result.token_ids.append(token_id)
            if token_id != draft:
                break
            prefix = _mix(prefix, token_id)
        # Rejected drafts leave stale KV behind, as in a real engine.
        slot.history += drafts
        self._compute(slot, len(drafts))
        result.num_accepted_tokens = len(result.token_ids) - 1
        result.num_verified_tokens = len(drafts)
        slot.num_computed = base + result.num_accepted_tokens
        slot.history[base:] = result.token_ids
        if slot.sampling.HasField("logprobs"):
            for position, token_id in enumerate(result.token_ids, start=base):
                result.logprobs.append(_logprobs(token_id, position))

    def _draft(self, slot: _Slot, prefix: int, count: int, result: worker_pb2.RowResult) -> None:
        _require(len(slot.history) + count <= self.max_model_len, "max_model_len")
        for i in range(count):
            if i > 0:
                prefix = self._compute(slot, 1, approximately=self.lp_size > 1)
            if self._is_bad(slot):
                self._end_chain(slot, result)
                return
            token_id = self.model.choose(prefix, slot.sampling, len(slot.history) - slot.num_prompt)
            slot.history.append(token_id)
            result.token_ids.append(token_id)

    def _end_chain(self, slot: _Slot, result: worker_pb2.RowResult) -> None:
        slot.fell_short = True
        result.non_finite = not result.token_ids
        if result.token_ids:  # the last draft of an answer has no KV
            slot.num_computed -= 1
            slot.num_exact = min(slot.num_exact, slot.num_computed)

    def _add_runners_up(self, slot: _Slot, message: worker_pb2.Round, result: worker_pb2.RowResult) -> None:
        prefix = 0
        start = len(slot.history) - len(result.token_ids)
        for position, token_id in enumerate(slot.history):
            if position >= start:
                runners_up = self.model.runners_up(token_id, prefix, slot.sampling, message.num_alternatives)
                result.alternative_token_ids.extend(runners_up)
                if message.confidences:
                    result.confidences.append(self.model.confidence(prefix, slot.sampling))
            prefix = _mix(prefix, token_id)

    def _add_prompt_logprobs(self, slot: _Slot, start: int, result: worker_pb2.RowResult) -> None:
        if not slot.sampling.HasField("prompt_logprobs"):
            return
        # The row at position p gives the log-probability of the prompt token at p + 1.
        positions = range(start + 1, min(slot.num_computed + 1, slot.num_prompt))
        result.prompt_logprobs_start = start + 1
        for position in positions:
            result.prompt_logprobs.append(_logprobs(slot.history[position], position))


def _logprobs(token_id: int, position: int) -> sampling_pb2.PositionLogprobs:
    chosen = sampling_pb2.TokenLogprob(token_id=token_id, logprob=-position, rank=1)
    return sampling_pb2.PositionLogprobs(chosen=chosen)


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise SchedulerFaultError(f"violated: {what}")

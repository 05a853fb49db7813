"""A scheduler reduced to what the tests of engines and workers need: slots, blocks and rounds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from echelon.pb.sampling_pb2 import SeqSampling
from echelon.pb.worker_pb2 import EngineInfo, EngineRole, Fork, Round, RoundResult, Row, RowResult, SeqInit

INCARNATION = 7


def greedy(**settings: Any) -> SeqSampling:
    """Greedy sampling; every setting is off except those given."""
    return SeqSampling(**{"top_p": 1.0, "repetition_penalty": 1.0, **settings})


def seeded(seed: int = 1234, **settings: Any) -> SeqSampling:
    """Sampling at temperature 1."""
    return greedy(**{"seed": seed, "temperature": 1.0, **settings})


@dataclass
class Seq:
    """What the scheduler knows about a seq."""

    slot: int
    token_ids: list[int]
    num_prompt: int
    num_computed: int = 0
    num_blocks: int = 0

    @property
    def output(self) -> list[int]:
        return self.token_ids[self.num_prompt :]

    @property
    def num_missing(self) -> int:
        """The number of tokens without KV."""
        return len(self.token_ids) - self.num_computed


@dataclass
class Driver:
    """Builds rounds for one engine and books their results."""

    info: EngineInfo
    send: Callable[[Round], RoundResult]
    round_id: int = 0
    free_blocks: list[int] = field(default_factory=list)
    inits: list[SeqInit] = field(default_factory=list)
    forks: list[Fork] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.free_blocks = list(range(self.info.num_blocks))[::-1]  # so that blocks are not in order of position

    def start(self, slot: int, prompt: Sequence[int], sampling: SeqSampling) -> Seq:
        """The seq takes its slot in the next round."""
        self.inits.append(
            SeqInit(slot=slot, token_ids=prompt, num_prompt_tokens=len(prompt), block_table=[], sampling=sampling)
        )
        return Seq(slot=slot, token_ids=list(prompt), num_prompt=len(prompt))

    def fork(self, parent: Seq, slot: int, length: int) -> Seq:
        """A branch of the first `length` tokens of a seq takes its slot in the next round."""
        block_size = self.info.block_size
        num_computed = min(parent.num_computed, length)
        branch = Seq(slot, parent.token_ids[:length], parent.num_prompt, num_computed, num_blocks=length // block_size)
        new_block_ids = self.blocks_for(branch, length)
        self.forks.append(Fork(slot=slot, parent_slot=parent.slot, length=length, new_block_ids=new_block_ids))
        return branch

    def blocks_for(self, seq: Seq, num_tokens: int) -> list[int]:
        """Takes the new blocks that positions below `num_tokens` need."""
        num_tokens = min(num_tokens, self.info.max_model_len)
        needed = -(-num_tokens // self.info.block_size) - seq.num_blocks
        seq.num_blocks += max(0, needed)
        return [self.free_blocks.pop() for _ in range(needed)]

    def target_row(self, seq: Seq, chunk_len: int | None = None, drafts: Sequence[int] = ()) -> Row:
        """A row that continues the seq, by default over all tokens without KV."""
        chunk_len = seq.num_missing if chunk_len is None else chunk_len
        return Row(
            slot=seq.slot,
            new_block_ids=self.blocks_for(seq, seq.num_computed + chunk_len + len(drafts)),
            chunk_len=chunk_len,
            draft_token_ids=drafts,
            draft_base_len=len(seq.token_ids),
        )

    def draft_row(
        self,
        seq: Seq,
        num_draft_tokens: int,
        crop_len: int | None = None,
        append: Sequence[int] = (),
        *,
        calibrate_len: int = 0,
    ) -> Row:
        """A row that crops, calibrates, catches up and drafts, as asked."""
        if crop_len is not None:
            del seq.token_ids[crop_len:]
            seq.num_computed = min(seq.num_computed, crop_len)
        seq.token_ids += append
        return Row(
            slot=seq.slot,
            crop_len=crop_len,
            append_token_ids=append,
            new_block_ids=self.blocks_for(seq, len(seq.token_ids) + num_draft_tokens),
            calibrate_len=calibrate_len,
            chunk_len=seq.num_missing,
            num_draft_tokens=num_draft_tokens,
        )

    def round(self, rows: Sequence[Row], free_slots: Sequence[int] = (), **settings: Any) -> Round:
        self.round_id += 1
        round_ = Round(
            round_id=self.round_id,
            incarnation=INCARNATION,
            free_slots=free_slots,
            init_seqs=self.inits,
            forks=self.forks,
            rows=rows,
            **settings,
        )
        self.inits, self.forks = [], []
        return round_

    def book(self, seq: Seq, row: Row, result: RowResult) -> None:
        """Adds a result to the history; num_computed becomes what the protocol defines."""
        assert result.slot == seq.slot
        seq.num_computed += row.chunk_len
        if result.non_finite:
            is_target = self.info.role == EngineRole.ENGINE_ROLE_TARGET
            seq.num_computed = len(seq.token_ids) - (1 if is_target else 0)
        elif result.token_ids:
            seq.token_ids += result.token_ids
            seq.num_computed = len(seq.token_ids) - 1

    def run(self, *work: tuple[Seq, Row], **settings: Any) -> list[RowResult]:
        """Runs one round with these rows and books the results."""
        results = self.send(self.round([row for _, row in work], **settings)).rows
        for (seq, row), result in zip(work, results, strict=True):
            self.book(seq, row, result)
        return list(results)

    def generate(self, seq: Seq, num_tokens: int) -> list[int]:
        """Decodes plainly until the output has that many tokens."""
        while len(seq.output) < num_tokens:
            (result,) = self.run((seq, self.target_row(seq)))
            assert result.token_ids, f"nothing was committed: {result}"
        return seq.output[:num_tokens]

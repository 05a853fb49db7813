"""What one seq, or a branch of its chain, does in a round of the draft engine."""

from collections.abc import Sequence
from dataclasses import dataclass

from echelon.pb import worker_pb2
from scheduler.drafting.chain import DraftSlot
from scheduler.engines.row import PlannedRow


@dataclass(frozen=True, slots=True)
class ForkFrom:
    """A slot begins as a branch of another slot."""

    parent_slot: int
    length: int  # tokens that both share
    num_shared_blocks: int  # blocks that these tokens fill


@dataclass(slots=True, kw_only=True, eq=False)
class DraftRow(PlannedRow):
    slot: DraftSlot
    num_draft_tokens: int = 0  # to draft
    crop_len: int | None = None
    append_token_ids: Sequence[int] = ()
    fork: ForkFrom | None = None  # how the slot of a branch begins
    calibrate_len: int = 0  # tokens whose approximate KV is first replaced
    epoch: int = 0  # of the chain that grows
    without_lower: bool = False  # no level beneath the draft takes part
    num_exact: int = 0  # leading tokens of the slot whose KV is exact after the row

    @property
    def work(self) -> int:
        return self.chunk_len + self.calibrate_len + self.num_draft_tokens

    @property
    def is_one_forward(self) -> bool:
        return self.num_draft_tokens == 0

    @property
    def most_results(self) -> int:
        return self.num_draft_tokens

    @property
    def num_computed(self) -> int:
        return self.end + max(0, self.num_draft_tokens - 1)  # the last draft is not computed

    def introduce(self, message: worker_pb2.Round) -> None:
        fork = self.fork
        if fork is None:
            PlannedRow.introduce(self, message)
            message.init_seqs[-1].sampling.ClearField("logprobs")  # those of drafts are not sent to anyone
            return
        message.forks.add(
            slot=self.slot.index,
            parent_slot=fork.parent_slot,
            length=fork.length,
            new_block_ids=self.slot.block_ids[fork.num_shared_blocks :],
        )

    def write(self, pb: worker_pb2.Row) -> None:
        PlannedRow.write(self, pb)
        if self.crop_len is not None:
            pb.crop_len = self.crop_len
        if self.append_token_ids:
            pb.append_token_ids.extend(self.append_token_ids)
        if self.num_draft_tokens:
            pb.num_draft_tokens = self.num_draft_tokens
        if self.calibrate_len:
            pb.calibrate_len = self.calibrate_len
        if self.without_lower:
            pb.without_lower = True

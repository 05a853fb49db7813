"""What one seq does in a round, as far as it is the same for target and draft."""

from dataclasses import dataclass
from typing import TypeVar

from echelon.pb import sampling_pb2, worker_pb2
from scheduler.engines.slot import Slot
from scheduler.requests.request import Seq


@dataclass(slots=True, kw_only=True, eq=False)
class PlannedRow:
    """The chunk of one seq. `scheduler/target/` and `scheduler/drafting/` add what only their rows order."""

    seq: Seq
    slot: Slot
    start: int  # tokens computed before the chunk
    chunk_len: int

    @property
    def end(self) -> int:
        """Tokens computed after the chunk."""
        return self.start + self.chunk_len

    @property
    def num_tokens(self) -> int:
        """Tokens that one forward computes."""
        return self.chunk_len

    @property
    def work(self) -> int:
        """Upper bound of what the row computes, in forwards of one token."""
        return self.num_tokens

    @property
    def is_one_forward(self) -> bool:
        """Whether the row needs no forward after its first."""
        return True

    @property
    def most_results(self) -> int:
        """Tokens that a correct answer has at most."""
        return 1

    @property
    def num_computed(self) -> int:
        """Leading tokens of the slot that are sure to have KV after the row."""
        return self.end

    def introduce(self, message: worker_pb2.Round) -> None:
        """Tell the engine of the seq, whose slot it does not know yet."""
        seq, slot = self.seq, self.slot
        message.init_seqs.add(
            slot=slot.index,
            token_ids=seq.token_ids,
            num_prompt_tokens=seq.request.num_prompt_tokens,
            num_computed_tokens=self.start,
            block_table=slot.block_ids,
            num_in_host=slot.num_in_host,
            sampling=_sampling(seq),
        )

    def write(self, pb: worker_pb2.Row) -> None:
        """Fill in the order."""
        pb.slot = self.slot.index
        pb.chunk_len = self.chunk_len


RowT = TypeVar("RowT", bound=PlannedRow)


def _sampling(seq: Seq) -> sampling_pb2.SeqSampling:
    sampling = seq.sampling
    if sampling.HasField("prompt_logprobs") and not seq.request.wants_prompt_logprobs:
        # All prompt logprobs have arrived, so they are not needed again after a preemption.
        sampling = sampling_pb2.SeqSampling()
        sampling.CopyFrom(seq.sampling)
        sampling.ClearField("prompt_logprobs")
    return sampling

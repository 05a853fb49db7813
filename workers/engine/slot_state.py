"""The progress of a slot's seq, and how the changes of a round move it.

Both users go through this class, so they cannot disagree. The check of a round (rounds.py) moves copies and may stop
halfway. SeqTable (seq_state.py) stores the result once the round has passed the check.
"""

from dataclasses import dataclass, replace

from echelon.pb.worker_pb2 import SeqInit


@dataclass(slots=True, kw_only=True)
class SlotState:
    """The counters of one seq. SeqTable explains them."""

    length: int
    num_computed: int
    num_exact: int
    num_given: int
    num_blocks: int
    num_prompt: int
    num_in_host: int = 0
    fell_short: bool = False
    is_void: bool = False

    @classmethod
    def of_init(cls, seq: SeqInit) -> "SlotState":
        """The state of a seq that takes a slot with its whole history, which came from the scheduler."""
        return cls(
            length=len(seq.token_ids),
            num_computed=seq.num_computed_tokens,
            num_exact=seq.num_computed_tokens,
            num_given=len(seq.token_ids),
            num_blocks=len(seq.block_table),
            num_prompt=seq.num_prompt_tokens,
            num_in_host=seq.num_in_host,
        )

    @property
    def num_missing(self) -> int:
        """Tokens without KV."""
        return self.length - self.num_computed

    def crop(self, length: int) -> None:
        """Cut the history to `length` tokens. The KV of later tokens is stale."""
        self.length = length
        self.num_computed = min(self.num_computed, length)
        self.num_exact = min(self.num_exact, length)
        self.num_given = min(self.num_given, length)
        self.fell_short = False

    def give(self, num_tokens: int) -> None:
        """Append the scheduler's tokens to the history. They have no KV yet."""
        self.length += num_tokens
        self.num_given = self.length
        self.fell_short = False

    def add_blocks(self, num_blocks: int) -> None:
        self.num_blocks += num_blocks

    def move_to_host(self, num_blocks: int) -> None:
        """So many more leading blocks are read from host memory."""
        self.num_in_host += num_blocks

    def fork(self, length: int, block_size: int) -> "SlotState":
        """A branch of the first `length` tokens that shares the blocks they fill.

        The branch is void if this seq has fewer tokens or is void itself.
        """
        if self.is_void or length > self.length:
            return replace(self, is_void=True)
        branch = replace(self)
        branch.crop(length)
        branch.num_blocks = length // block_size
        return branch

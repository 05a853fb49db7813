"""A seq's place in an engine."""

from dataclasses import dataclass


@dataclass(slots=True, kw_only=True, eq=False)
class Seat:
    """A slot and blocks, as they will be when every round sent so far has run."""

    slot: int
    block_ids: list[int]
    num_computed: int  # leading tokens of the history whose KV is there
    num_published: int  # leading blocks that need no publishing any more
    num_sent_blocks: int = 0
    introduced: bool = False  # the engine has been sent the seq
    is_released: bool = False  # nobody waits for what rounds on their way bring

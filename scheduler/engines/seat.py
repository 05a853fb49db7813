"""A seq's place in an engine."""

from dataclasses import dataclass


@dataclass(slots=True, kw_only=True, eq=False)
class Seat:
    """A slot and blocks, as they will be when every round sent so far has run."""

    slot: int
    block_ids: list[int]
    num_computed: int  # leading tokens of the history that have KV
    num_published: int  # leading blocks that need no more publishing
    num_sent_blocks: int = 0
    introduced: bool = False  # the engine has received the seq
    is_released: bool = False  # results of rounds in flight are not wanted any longer

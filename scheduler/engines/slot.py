"""The place of a seq in an engine, as the scheduler knows it."""

from dataclasses import dataclass


@dataclass(slots=True, kw_only=True, eq=False)
class Slot:
    """Its number and its blocks, as they will be when every round sent so far has run."""

    index: int  # in the engine
    block_ids: list[int]
    num_computed: int  # leading tokens of the history that have KV
    num_published: int  # leading blocks that need no more publishing
    num_sent_blocks: int = 0
    is_rounded: bool = False  # it began with rounded blocks, so all that is computed after them is approximate
    introduced: bool = False  # the engine has received the seq
    is_released: bool = False  # results of rounds in flight are not wanted any longer

"""The place of a seq in an engine, as the scheduler knows it."""

from dataclasses import dataclass, field

from scheduler.kv_cache.host import HostBlock


@dataclass(slots=True, kw_only=True, eq=False)
class Slot:
    """Its number and its blocks, as they will be when every round sent so far has run."""

    index: int  # in the engine
    block_ids: list[int]  # the first ones are host slots, those of in_host
    num_computed: int  # leading tokens of the history that have KV
    num_published: int  # leading blocks that need no more publishing
    num_sent_blocks: int = 0
    in_host: list[HostBlock] = field(default_factory=list)  # leading blocks, which attention reads from host memory
    num_sent_in_host: int = 0
    is_rounded: bool = False  # it began with rounded blocks, so all that is computed after them is approximate
    introduced: bool = False  # the engine has received the seq
    is_released: bool = False  # results of rounds in flight are not wanted any longer

    @property
    def num_in_host(self) -> int:
        return len(self.in_host)

    @property
    def last_block_id(self) -> int | None:
        """Of the blocks on the device."""
        return self.block_ids[-1] if len(self.block_ids) > len(self.in_host) else None

"""Counts the fate of drafts, for one request or for all."""

from dataclasses import dataclass, field

from echelon.pb import inference_pb2


@dataclass(slots=True)
class DraftTally:
    """The fields of SpeculationStats (inference.proto) as Python numbers, which are faster to update."""

    num_rounds: int = 0
    num_rounds_with_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    accepted_per_position: list[int] = field(default_factory=list)

    def add(self, num_verified: int, num_accepted: int) -> None:
        """A target row has committed tokens; `num_verified` drafts were compared in it, so many of them accepted."""
        self.num_rounds += 1
        if num_verified == 0:
            return
        self.num_rounds_with_drafts += 1
        self.num_draft_tokens += num_verified
        self.num_accepted_tokens += num_accepted
        self.accepted_per_position += [0] * (num_verified - len(self.accepted_per_position))
        for position in range(num_accepted):
            self.accepted_per_position[position] += 1

    def message(self) -> inference_pb2.SpeculationStats:
        return inference_pb2.SpeculationStats(
            num_rounds=self.num_rounds,
            num_drafts=self.num_rounds_with_drafts,
            num_draft_tokens=self.num_draft_tokens,
            num_accepted_tokens=self.num_accepted_tokens,
            accepted_per_position=self.accepted_per_position,
        )

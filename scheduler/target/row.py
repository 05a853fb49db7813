"""What one seq does in a round of the target."""

from collections.abc import Sequence
from dataclasses import dataclass

from echelon.pb import worker_pb2
from scheduler.engines.row import PlannedRow


@dataclass(slots=True, kw_only=True, eq=False)
class TargetRow(PlannedRow):
    drafts: Sequence[int] = ()  # to verify
    num_pending: int = 0  # tokens that the row is certain to commit

    @property
    def num_tokens(self) -> int:
        return self.chunk_len + len(self.drafts)

    @property
    def most_results(self) -> int:
        return len(self.drafts) + 1

    def write(self, pb: worker_pb2.Row) -> None:
        PlannedRow.write(self, pb)
        if self.drafts:
            pb.draft_token_ids.extend(self.drafts)
            pb.draft_base_len = len(self.seq.token_ids)

"""What a scheduler's status says of its target."""

from echelon.pb import scheduler_pb2
from scheduler.target.planner import TargetPlanner


def report_target(target: TargetPlanner, status: scheduler_pb2.SchedulerStatus) -> None:
    """Fill in the fields that the target's planner knows."""
    status.num_preemptions_total = target.num_preemptions
    status.prefix_cache_queries = target.num_tokens_looked_up
    status.prefix_cache_hits = target.tokens_found.total
    status.prefix_cache_hits_from_host = target.tokens_found.from_host
    status.prefix_cache_hits_from_disk = target.tokens_found.from_disk
    status.num_requests_running = len({state.seq.request.request_id for state in target.running})
    if target.engine is not None:
        status.num_blocks = target.engine.blocks.num_blocks
        status.num_free_blocks = target.engine.blocks.num_free

"""What follows from two readings of a replica's counters."""

from typing import Any

import pytest

from echelon.cli.watching import ReplicaView, view
from echelon.pb.control_pb2 import ReplicaStatus
from echelon.pb.inference_pb2 import SpeculationStats
from echelon.pb.scheduler_pb2 import SchedulerStatus


def replica(**counters: Any) -> ReplicaStatus:
    return ReplicaStatus(replica=3, status=SchedulerStatus(ready=True, **counters))


def test_counters_become_rates_and_shares() -> None:
    before = replica(
        generation_tokens_total=100,
        draft_idle_seconds_total=1.0,
        verify_wait_seconds_total=2.0,
        verdict_cache_hits_total=10,
        verdict_cache_misses_total=50,
    )
    after = replica(
        generation_tokens_total=180,
        draft_idle_seconds_total=1.5,
        verify_wait_seconds_total=2.25,
        verdict_cache_hits_total=13,
        verdict_cache_misses_total=51,
        num_requests_running=4,
        num_requests_waiting=5,
        speculation_total=SpeculationStats(num_drafts=1),
        acceptance_rate=0.8,
        drafts_per_verification=3.5,
        draft_ready=True,
        window_occupancy=0.6,
        num_blocks=10,
        num_free_blocks=4,
    )
    assert view(before, after, 2.0) == ReplicaView(
        replica=3,
        ready=True,
        reason="",
        tokens_per_s=40.0,
        num_requests_running=4,
        num_requests_waiting=5,
        acceptance_rate=0.8,
        drafts_per_verification=3.5,
        draft_idle_share=0.25,
        verify_wait_share=0.125,
        verdict_cache_hit_rate=0.75,
        window_occupancy=pytest.approx(0.6),
        kv_cache_usage=pytest.approx(0.6),
    )


def test_without_speculation_nothing_is_made_up() -> None:
    seen = view(replica(), replica(generation_tokens_total=5), 1.0)
    assert seen.tokens_per_s == 5.0
    assert (seen.acceptance_rate, seen.drafts_per_verification, seen.verdict_cache_hit_rate) == (None, None, None)
    assert (seen.window_occupancy, seen.kv_cache_usage) == (None, None)


def test_a_wait_that_ends_may_be_longer_than_the_interval() -> None:
    assert view(replica(), replica(draft_idle_seconds_total=9.0), 1.0).draft_idle_share == 1.0


def test_a_scheduler_that_is_gone_or_new_has_no_rates() -> None:
    gone = ReplicaStatus(replica=3, error="UNAVAILABLE: gone")
    assert view(replica(), gone, 1.0) == ReplicaView(replica=3, ready=False, reason="UNAVAILABLE: gone")
    old = replica(target_rounds_total=9, generation_tokens_total=90)
    new = replica(target_rounds_total=2, generation_tokens_total=7)
    assert view(old, new, 1.0).tokens_per_s is None
    assert view(gone, new, 1.0).tokens_per_s is None

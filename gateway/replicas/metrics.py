"""The schedulers' counters as Prometheus metrics, read at each scrape."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from echelon.pb.control_pb2 import ReplicaStatus
from echelon.pb.scheduler_pb2 import SchedulerStatus, TierStatus
from echelon.pb.worker_pb2 import EngineRole
from gateway.metrics import PREFIX


@dataclass(frozen=True, slots=True)
class _Series:
    name: str  # a counter's ends in _total on the wire
    text: str
    value: Callable[[SchedulerStatus], float]


@dataclass(frozen=True, slots=True)
class _TierSeries:
    name: str
    text: str
    value: Callable[[TierStatus], float]


def _found_outside(status: SchedulerStatus) -> int:
    """Tokens whose KV was not on the device."""
    return status.prefix_cache_hits_from_host + status.prefix_cache_hits_from_disk


_GAUGES = (
    _Series("num_requests_running", "Requests that are running.", lambda s: s.num_requests_running),
    _Series("num_requests_waiting", "Requests that wait in the queue.", lambda s: s.num_requests_waiting),
    _Series(
        "kv_cache_usage_perc",
        "Share of the target's KV blocks in use, 0 to 1.",
        lambda s: _used(s.num_blocks, s.num_free_blocks),
    ),
    _Series(
        "draft_kv_cache_usage_perc",
        "Share of the draft's KV blocks in use, 0 to 1.",
        lambda s: _used(s.num_draft_blocks, s.num_free_draft_blocks),
    ),
    _Series(
        "draft_ready", "1 if the draft group answers. Without it, requests decode plainly.", lambda s: s.draft_ready
    ),
    _Series(
        "acceptance_rate", "Share of recently compared drafts that were accepted, 0 to 1.", lambda s: s.acceptance_rate
    ),
    _Series(
        "drafts_per_verification", "Mean number of drafts in recent verifications.", lambda s: s.drafts_per_verification
    ),
    _Series(
        "window_occupancy",
        "Drafts ahead of the last commit, divided by the number that the policy allows.",
        lambda s: s.window_occupancy,
    ),
)
_COUNTERS = (
    _Series("prompt_tokens", "Prompt tokens of accepted requests.", lambda s: s.prompt_tokens_total),
    _Series("generation_tokens", "Tokens committed to the output of requests.", lambda s: s.generation_tokens_total),
    _Series("prefix_cache_queries", "Tokens looked up in the prefix cache.", lambda s: s.prefix_cache_queries),
    _Series("prefix_cache_hits", "Tokens found in the prefix cache.", lambda s: s.prefix_cache_hits),
    _Series(
        "external_prefix_cache_queries",
        "Tokens that were not found on the device and were looked up in host memory and on disk.",
        lambda s: s.prefix_cache_queries - s.prefix_cache_hits + _found_outside(s) if s.tiers else 0,
    ),
    _Series(
        "external_prefix_cache_hits",
        "Tokens whose KV came to the device from host memory or disk.",
        _found_outside,
    ),
    _Series(
        "num_preemptions", "Sequences that were preempted for lack of KV blocks.", lambda s: s.num_preemptions_total
    ),
    _Series("target_rounds", "Rounds sent to the target.", lambda s: s.target_rounds_total),
    _Series("draft_rounds", "Rounds sent to the draft.", lambda s: s.draft_rounds_total),
    _Series(
        "draft_tokens",
        "Tokens drafted by the draft model, including branches of the verdict cache.",
        lambda s: s.draft_tokens_total,
    ),
    _Series(
        "wasted_drafts",
        "Tokens of the draft model that were not accepted and can no longer be.",
        lambda s: s.wasted_draft_tokens_total,
    ),
    _Series(
        "spec_decode_num_drafts", "Verifications with at least one draft.", lambda s: s.speculation_total.num_drafts
    ),
    _Series(
        "spec_decode_num_draft_tokens",
        "Drafts that the target verified.",
        lambda s: s.speculation_total.num_draft_tokens,
    ),
    _Series(
        "spec_decode_num_accepted_tokens",
        "Drafts that the target accepted.",
        lambda s: s.speculation_total.num_accepted_tokens,
    ),
    _Series("lookup_tokens", "Verified drafts that came from suffix lookup.", lambda s: s.lookup_tokens_total),
    _Series(
        "verdict_cache_hits",
        "Mismatches whose continuation had been drafted in advance.",
        lambda s: s.verdict_cache_hits_total,
    ),
    _Series(
        "verdict_cache_misses",
        "Mismatches whose continuation had not been drafted in advance.",
        lambda s: s.verdict_cache_misses_total,
    ),
    _Series(
        "draft_idle_seconds",
        "Time in which the draft had no round although a sequence speculated.",
        lambda s: s.draft_idle_seconds_total,
    ),
    _Series(
        "verify_wait_seconds",
        "Time in which the target had no round because a sequence waited for drafts.",
        lambda s: s.verify_wait_seconds_total,
    ),
    _Series("target_losses", "Times that the target group died or hung.", lambda s: s.target_losses_total),
    _Series("draft_losses", "Times that the draft group died or hung.", lambda s: s.draft_losses_total),
    _Series(
        "non_finite_rows",
        "Rows with NaN or infinite logits; each ended its request.",
        lambda s: s.non_finite_rows_total,
    ),
)
_TIER_GAUGES = (
    _TierSeries("kv_offload_capacity_bytes", "What fits, on each rank.", lambda t: t.num_blocks * t.block_bytes),
    _TierSeries("kv_offload_used_bytes", "What lies there, on each rank.", lambda t: t.num_used_blocks * t.block_bytes),
    _TierSeries("kv_offload_paused", "1 while the tier is left alone after errors.", lambda t: t.paused),
)
_TIER_COUNTERS = (
    _TierSeries("kv_offload_store_blocks", "Blocks that came into the tier.", lambda t: t.stored_blocks_total),
    _TierSeries("kv_offload_load_blocks", "Blocks that were read from the tier.", lambda t: t.fetched_blocks_total),
    _TierSeries(
        "kv_offload_store_bytes",
        "Bytes that came into the tier, on each rank.",
        lambda t: t.stored_blocks_total * t.block_bytes,
    ),
    _TierSeries(
        "kv_offload_load_bytes",
        "Bytes that were read from the tier, on each rank.",
        lambda t: t.fetched_blocks_total * t.block_bytes,
    ),
    _TierSeries(
        "kv_offload_store_time", "Seconds that storing took, on the slowest rank.", lambda t: t.store_seconds_total
    ),
    _TierSeries(
        "kv_offload_load_time", "Seconds that reading took, on the slowest rank.", lambda t: t.fetch_seconds_total
    ),
    _TierSeries(
        "kv_offload_store_queue_time",
        "Seconds in which moves into the tier waited to begin.",
        lambda t: t.store_queue_seconds_total,
    ),
    _TierSeries(
        "kv_offload_load_queue_time",
        "Seconds in which moves out of the tier waited to begin.",
        lambda t: t.fetch_queue_seconds_total,
    ),
    _TierSeries(
        "kv_offload_avoided_time",
        "Seconds that computing the prefixes that came back would have taken.",
        lambda t: t.avoided_seconds_total,
    ),
    _TierSeries(
        "kv_offload_waited_time", "Seconds in which sequences waited for prefixes.", lambda t: t.waited_seconds_total
    ),
    _TierSeries(
        "kv_offload_checksum_failures",
        "Blocks that were read and had a wrong checksum on some rank.",
        lambda t: t.damaged_blocks_total,
    ),
    _TierSeries(
        "kv_offload_failed_blocks", "Blocks that could not be stored or read.", lambda t: t.failed_blocks_total
    ),
    _TierSeries("kv_offload_evicted_blocks", "Blocks that made room for others.", lambda t: t.evicted_blocks_total),
)


class ReplicaCollector(Collector):
    """Tells of `replicas`, set before each scrape, each with the name of its model. One that did not answer only has
    `replica_ready` with value 0."""

    def __init__(self) -> None:
        self.replicas: Sequence[tuple[str, ReplicaStatus]] = ()

    def collect(self) -> Iterator[Metric]:
        replicas = [replica for _, replica in self.replicas]
        ready = self._family(GaugeMetricFamily, "replica_ready", "1 if the replica would serve a request.")
        for replica in replicas:
            ready.add_metric(self._labels(replica), float(replica.status.ready))
        yield ready
        answering = [replica for replica in replicas if replica.HasField("status")]
        for kind, table in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS)):
            for series in table:
                family = self._family(kind, series.name, series.text)
                for replica in answering:
                    family.add_metric(self._labels(replica), float(series.value(replica.status)))
                yield family
        yield from self._tiers(answering)
        yield self._accepted_by_position(answering)

    def _tiers(self, replicas: Sequence[ReplicaStatus]) -> Iterator[Metric]:
        for kind, table in ((GaugeMetricFamily, _TIER_GAUGES), (CounterMetricFamily, _TIER_COUNTERS)):
            for series in table:
                family = self._family(kind, series.name, series.text, "engine", "tier")
                for replica in replicas:
                    for tier in replica.status.tiers:
                        labels = [*self._labels(replica), _engine_name(tier.engine), tier.tier]
                        family.add_metric(labels, float(series.value(tier)))
                yield family

    def _accepted_by_position(self, replicas: Sequence[ReplicaStatus]) -> Metric:
        family = self._family(
            CounterMetricFamily,
            "spec_decode_num_accepted_tokens_per_pos",
            "Accepted drafts by their position in the round, 0 first.",
            "position",
        )
        for replica in replicas:
            for position, num_accepted in enumerate(replica.status.speculation_total.accepted_per_position):
                family.add_metric([*self._labels(replica), str(position)], float(num_accepted))
        return family

    def _family(
        self, kind: type[GaugeMetricFamily] | type[CounterMetricFamily], name: str, text: str, *more_labels: str
    ) -> GaugeMetricFamily | CounterMetricFamily:
        return kind(PREFIX + name, text, labels=["model_name", "replica", *more_labels])

    def _labels(self, replica: ReplicaStatus) -> list[str]:
        return [self.replicas[replica.replica][0], str(replica.replica)]


def _used(num_blocks: int, num_free: int) -> float:
    return 1.0 - num_free / num_blocks if num_blocks else 0.0


def _engine_name(role: EngineRole.ValueType) -> str:
    return EngineRole.Name(role).removeprefix("ENGINE_ROLE_").lower()

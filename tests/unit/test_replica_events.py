"""Events that the statuses of a replica show, and where its processes run."""

from typing import Any

from echelon.pb.process_pb2 import GatewaySpec, PlacedProcess, SchedulerUpdate
from echelon.pb.scheduler_pb2 import SchedulerStatus, TierStatus
from echelon.pb.worker_pb2 import ENGINE_ROLE_DRAFT
from gateway.replicas.events import EventLog, StatusWatch
from gateway.replicas.topology import Topology


class Bench:
    def __init__(self) -> None:
        self.now = 100.0
        self.log = EventLog(lambda: self.now)
        self.watch = StatusWatch(self.log, 2, lambda: self.now)

    def see(self, **fields: Any) -> None:
        self.watch.on_status(SchedulerStatus(**{"ready": True, **fields}))

    @property
    def texts(self) -> list[str]:
        return [event.text for event in self.log]


def test_changes_are_told_once() -> None:
    bench = Bench()
    for _ in range(2):
        bench.see()
    for _ in range(2):
        bench.see(ready=False, not_ready_reason="target group: lost")
    bench.watch.on_unreachable("UNAVAILABLE")
    for _ in range(2):
        bench.see()
    assert bench.texts == ["ready", "not ready: target group: lost", "ready again"]
    assert {event.replica for event in bench.log} == {2}
    assert [event.number for event in bench.log] == [1, 2, 3]


def test_a_draft_that_comes_and_goes() -> None:
    bench = Bench()
    bench.see()
    bench.see(draft_lost=True, draft_not_ready_reason="killed")
    bench.see(draft_lost=True)
    bench.see()
    assert bench.texts[1:] == ["its draft is lost, requests go on without drafts: killed", "its draft is back"]


def test_counters_are_summed_up() -> None:
    bench = Bench()
    bench.see(num_preemptions_total=5)  # of before this gateway began
    for total in (6, 7, 9):
        bench.see(num_preemptions_total=total)
    bench.now += 10
    bench.see(num_preemptions_total=9)
    bench.see(num_preemptions_total=1)  # of a scheduler that was started again
    bench.now += 10
    bench.see(num_preemptions_total=3)
    what = "sequences were preempted for lack of KV blocks"
    assert bench.texts[1:] == [f"1 {what}", f"3 {what}", f"2 {what}"]


def test_a_tier_that_is_left_alone() -> None:
    bench = Bench()
    tier = TierStatus(engine=ENGINE_ROLE_DRAFT, tier="disk")
    bench.see(tiers=[tier])
    bench.see(tiers=[TierStatus(engine=ENGINE_ROLE_DRAFT, tier="disk", paused=True, last_error="EIO")])
    bench.see(tiers=[tier])
    name = "KV on the disk tier of the draft"
    assert bench.texts[1:] == [f"{name} is left alone after errors: EIO", f"{name} is used again"]


def test_the_log_keeps_the_last_events() -> None:
    bench = Bench()
    for _ in range(150):
        bench.see(ready=False, not_ready_reason="x")
        bench.see()
    assert len(bench.texts) == 200
    assert bench.texts[-1] == "ready again"


def test_replicas_bring_and_take_their_processes() -> None:
    def process(name: str, replica: int, role: str = "scheduler") -> PlacedProcess:
        return PlacedProcess(name=name, role=role, replica=replica)

    def names() -> list[str]:
        return [each.name for each in topology.processes]

    gateway = process("gateway-0", 0, "gateway")
    topology = Topology(GatewaySpec(processes=[process("scheduler-0", 0), gateway]))
    topology.on_update(SchedulerUpdate(replica=1, address="x:1", processes=[process("scheduler-1", 1)]))
    topology.on_update(SchedulerUpdate(replica=0, address="x:2"))  # it was started again where it was
    assert names() == ["scheduler-0", "gateway-0", "scheduler-1"]
    topology.on_update(SchedulerUpdate(replica=1, removed=True))
    assert names() == ["scheduler-0", "gateway-0"]

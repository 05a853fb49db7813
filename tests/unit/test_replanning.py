"""Parts of a deployment that lose their node: where they go, and what gives way to them."""

from dataclasses import replace
from pathlib import Path

import pytest

from cluster.deployment.settings import ServerSettings, Settings
from cluster.errors import PlanError
from cluster.local import LocalDraft, local_settings
from cluster.planning.plan import Inventory, Node, Plan
from cluster.planning.planner import make_plan
from cluster.planning.replanning import (
    plan_gateway_again,
    plan_group_again,
    plan_scheduler_again,
    with_freed,
    with_gateway,
    with_replica,
)
from cluster.process_id import PartId

TARGET_0, DRAFT_0, SCHEDULER_0 = PartId(role="target"), PartId(role="draft"), PartId(role="scheduler")
GATEWAY_1 = PartId(role="gateway", replica=1)
GIB = 1 << 30
MODELS = Path(__file__).parents[2] / "models"
TARGET, DRAFT = MODELS / "demo-target", MODELS / "demo-draft"


def settings(tp_size: int, *, server: ServerSettings | None = None) -> Settings:
    made = local_settings(TARGET, tp_size=tp_size, draft=LocalDraft(folder=DRAFT), device="cuda")
    return made if server is None else replace(made, server=server)


def nodes(**num_gpus: int) -> Inventory:
    """By name; the first is the head."""
    made = [
        Node(node_id=name, address=f"10.0.0.{number}", num_cpus=8, num_gpus=count, gpu_memory_bytes=80 * GIB)
        for number, (name, count) in enumerate(num_gpus.items())
    ]
    return Inventory(nodes=tuple(made), head_node_id=next(iter(num_gpus)))


def places(plan: Plan) -> dict[str, str]:
    return {process.name: process.node_id for process in plan.processes}


def test_a_group_goes_where_the_rest_of_its_replica_is_if_there_is_room() -> None:
    plan = make_plan(settings(2), nodes(head=0, a=2, b=1))
    assert places(plan) == {
        "target-0.0": "a",
        "target-0.1": "a",
        "draft-0.0": "b",
        "scheduler-0": "a",
        "gateway-0": "head",
    }
    after = with_replica(plan, plan_group_again(plan, TARGET_0, settings(2), nodes(head=0, c=3, b=2)))
    assert places(after)["target-0.0"] == places(after)["target-0.1"] == "b"
    assert places(after)["draft-0.0"] == "b"
    assert places(after)["scheduler-0"] == "a", "it moves by itself, if its node is lost"
    assert places(with_replica(after, plan_scheduler_again(after, SCHEDULER_0)))["scheduler-0"] == "b"
    elsewhere = with_replica(plan, plan_group_again(plan, TARGET_0, settings(2), nodes(head=0, c=2, b=1)))
    assert places(elsewhere)["target-0.1"] == "c"
    assert [bundle.name for bundle in elsewhere.bundles] == ["target-0.0", "target-0.1", "draft-0.0"]
    assert elsewhere.bundles[0].address == "10.0.0.1"


def test_a_draft_goes_beside_its_target() -> None:
    plan = make_plan(settings(1), nodes(head=0, a=1, b=1))
    leader = places(plan)["target-0.0"]
    left = nodes(head=0, c=4, **{leader: 1})
    assert places(with_replica(plan, plan_group_again(plan, DRAFT_0, settings(1), left)))["draft-0.0"] == leader


def test_a_target_has_a_place_once_its_draft_gives_one_up() -> None:
    plan = make_plan(settings(1), nodes(head=0, a=1, b=1))
    draft = plan.replicas[0].group("draft")
    left = nodes(head=0, **{draft[0].node_id: 0})
    with pytest.raises(PlanError, match=r"no place for target rank 0: .*no free GPU"):
        plan_group_again(plan, TARGET_0, settings(1), left)
    after = plan_group_again(plan, TARGET_0, settings(1), with_freed(left, draft))
    assert after.group("target")[0].node_id == draft[0].node_id


def test_nothing_but_the_head_is_left() -> None:
    plan = make_plan(settings(1), nodes(head=0, a=2))
    with pytest.raises(PlanError, match="no place for target rank 0"):
        plan_group_again(plan, TARGET_0, settings(1), nodes(head=0))
    with pytest.raises(PlanError, match="there is no other node"):
        plan_group_again(plan, TARGET_0, settings(1), Inventory(nodes=(), head_node_id=""))


def test_a_gateway_goes_to_a_node_that_has_none() -> None:
    everywhere = settings(1, server=ServerSettings(host="0.0.0.0", gateways=2))
    plan = make_plan(everywhere, nodes(head=2, a=0))
    assert places(plan)["gateway-1"] == "a"
    with pytest.raises(PlanError, match="no other node can have this gateway"):
        plan_gateway_again(plan, GATEWAY_1, everywhere, nodes(head=2))
    after = with_gateway(plan, plan_gateway_again(plan, GATEWAY_1, everywhere, nodes(head=2, b=0)))
    assert places(after)["gateway-1"] == "b"
    assert [gateway.port_offset for gateway in after.gateways] == [0, 0]

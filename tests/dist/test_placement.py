"""Placement on a real Ray of three nodes with pretend GPUs: hosts start where the plan says, on their own devices."""

import logging
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table

from cluster.deployment.settings import Settings
from cluster.errors import PlanError
from cluster.local import LocalDraft, local_settings
from cluster.on_ray.cluster import NAMESPACE, plan_now, remnants, remove_groups, reserve
from cluster.on_ray.host import RayChild, host_in_bundle, start_child
from cluster.planning.plan import Plan
from cluster.processes.child import Child
from cluster.processes.specs import worker_specs
from cluster.processes.startup import Launch, ProcessSet
from cluster.processes.worker_group import GroupLaunch, start_groups
from tests.helpers.model_folders import write_model_folder

FAKE = "tests.helpers.fake_child"
START_S = 60.0


@pytest.fixture(scope="module")
def node_ids() -> Iterator[dict[str, str]]:
    """The ids of three nodes: the head without GPUs, one with two GPUs and one with three."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 0})
    two = cluster.add_node(num_cpus=1, num_gpus=2)
    three = cluster.add_node(num_cpus=1, num_gpus=3)
    ray.init(address=cluster.address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    yield {"head": cluster.head_node.node_id, "two": two.node_id, "three": three.node_id}
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    return write_model_folder(tmp_path / "target"), write_model_folder(tmp_path / "draft")


def settings_for(folders: tuple[Path, Path], tp_size: int) -> Settings:
    return local_settings(folders[0], tp_size=tp_size, draft=LocalDraft(folder=folders[1]), device="cuda")


def reserved(plan: Plan, node_ids: dict[str, str]) -> list[str]:
    """The nodes on which Ray has put the deployment's bundles, the target's first."""
    names = {node_id: name for name, node_id in node_ids.items()}
    tables = {table["name"]: table for table in placement_group_table().values() if table["state"] == "CREATED"}
    return [
        names[tables[f"echelon:{plan.deployment}:{bundle.group}"]["bundles_to_node_id"][bundle.rank]]
        for bundle in plan.bundles
    ]


def test_a_deployment_that_fits_nowhere_says_why(node_ids: dict[str, str], folders: tuple[Path, Path]) -> None:
    with pytest.raises(PlanError, match=rf"no place for target rank 5: .* node {node_ids['head'][:8]} .*no free GPU"):
        plan_now(settings_for(folders, 8), patience_s=0.0)


def test_hosts_run_where_the_plan_says_on_devices_of_their_own(
    node_ids: dict[str, str], folders: tuple[Path, Path], tmp_path: Path
) -> None:
    settings = settings_for(folders, 2)
    plan = plan_now(settings)
    assert plan.gateways[0].process.node_id == node_ids["head"]
    assert [bundle.node_id for bundle in plan.bundles] == [node_ids["three"]] * 3, "target and draft fit there together"
    groups = {
        role: reserve(f"echelon:{plan.deployment}:{role}", plan.replicas[0].group(role), START_S)
        for role in ("target", "draft")
    }
    children: dict[str, RayChild] = {}

    def spawn(launch: Launch) -> Child:
        assert launch.bundle is not None
        host = host_in_bundle(f"echelon-{launch.name}:local", launch.bundle, groups[launch.bundle.group])
        fake = Launch(id=launch.id, module=FAKE, spec=launch.spec, bundle=launch.bundle, env=launch.env)
        children[launch.name] = start_child(fake, host, tmp_path)
        return children[launch.name]

    processes = ProcessSet(spawn)
    launches = [
        GroupLaunch(
            role=role,
            specs=worker_specs(settings, plan.replicas[0].group(role), 1),
            bundles=plan.replicas[0].group(role),
        )
        for role in ("target", "draft")
    ]
    start_groups(processes, launches, time.monotonic() + START_S)
    try:
        assert reserved(plan, node_ids) == ["three"] * 3
        assert {child.node_id for child in children.values()} == {node_ids["three"]}
        devices = [child.devices for child in children.values()]
        assert sorted(devices) == ["cuda:0", "cuda:1", "cuda:2"], "no device has two owners"
        draft = processes.read(lambda board: board.process("draft-0.0"))
        assert draft.devices == children["draft-0.0"].devices
        seen = processes.read(lambda board: board.worker_info("draft-0.0").device)
        assert f"gpus={draft.devices.removeprefix('cuda:')} " in seen, "the worker sees its own device alone"
    finally:
        processes.stop(grace_s=5.0)
        remove_groups(plan.deployment)
    deadline = time.monotonic() + START_S
    while remnants(plan.deployment):
        assert time.monotonic() < deadline, f"Ray still has {remnants(plan.deployment)}"


def test_the_draft_takes_another_node_if_the_target_fills_its_own(
    node_ids: dict[str, str], folders: tuple[Path, Path]
) -> None:
    plan = plan_now(settings_for(folders, 4))
    for role in ("target", "draft"):
        reserve(f"echelon:{plan.deployment}:{role}", plan.replicas[0].group(role), START_S)
    try:
        assert reserved(plan, node_ids) == ["three", "three", "three", "two", "two"]
    finally:
        remove_groups(plan.deployment)


def test_devices_taken_since_the_plan_are_an_error(node_ids: dict[str, str], folders: tuple[Path, Path]) -> None:
    plan = plan_now(settings_for(folders, 2))
    reserve("echelon:other:target", plan.replicas[0].group("target"), START_S)
    try:
        reserve("echelon:local:draft", plan.replicas[0].group("draft"), START_S)
        with pytest.raises(PlanError, match=r"did not reserve echelon:local:target .* target-0\.0 wants .*'GPU': 0\.0"):
            reserve("echelon:local:target", plan.replicas[0].group("target"), timeout_s=1.0)
        assert remnants("local") == ["echelon:local:draft"], "nothing stays reserved after a refusal"
    finally:
        remove_groups("other")
        remove_groups("local")

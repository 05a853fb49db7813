"""A node is killed with everything on it while streams run: they go on, on what is left, and the node comes back."""

from pathlib import Path

import pytest

from bench.chaos import drill_settings
from bench.crowd import Crowd, Damage, make_cases
from bench.lost_nodes import Nodes, deployed, places
from cluster.processes.status import DeploymentStatus, State

CASES = make_cases(7, 32)


@pytest.fixture
def state_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ECHELON_STATE_DIR", str(tmp_path))


async def kill_under(crowd: Crowd, nodes: Nodes) -> str:
    """While streams run; the beginning of the node's id."""
    await crowd.wait_for_tokens(crowd.most_tokens() // 4)
    return nodes.kill()[:8]


def is_degraded(status: DeploymentStatus, process: str, lost_node: str) -> bool:
    reason = f"{process}: node {lost_node}"
    return status.state is State.DEGRADED and reason in status.reason


def assert_undamaged(crowd: Crowd) -> None:
    damage = Damage()
    assert crowd.take_ended(damage)
    assert not damage.is_any, damage


@pytest.mark.slow
@pytest.mark.timeout(600)  # Ray starts three nodes, one after the other
async def test_a_pair_moves_to_what_is_left_and_drafts_come_back_with_a_node(state_dir: None) -> None:
    nodes = Nodes(1, 2)
    try:
        with deployed(nodes, drill_settings(tp=1)) as deployment:
            before = places(deployment.status())
            assert before["target-0.0"] == before["draft-0.0"] == before["scheduler-0"] != before["gateway-0"]
            crowd = Crowd(deployment.status().endpoint, CASES)
            await crowd.observe()
            async with crowd.running():
                lost = await kill_under(crowd, nodes)
                status = await deployment.until(lambda status: is_degraded(status, "draft-0.0", lost))
                now = places(status)
                assert now["target-0.0"] == now["scheduler-0"] == now["gateway-0"]
                await crowd.wait_for_tokens(crowd.most_tokens())
                assert_undamaged(crowd)
                nodes.add(1)
                status = await deployment.until(lambda status: status.state is State.READY)
                assert places(status)["draft-0.0"] not in (before["draft-0.0"], now["target-0.0"])
                await crowd.wait_for_tokens(crowd.most_tokens())
                assert_undamaged(crowd)
    finally:
        nodes.shut_down()

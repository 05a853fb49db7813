"""`up`, `status` and `down` with real workers, on a user's Ray of two nodes and on a private Ray beside it."""

import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table

from cluster import lifecycle, state_dir
from cluster.errors import DeploymentNotFoundError, PlanError, StartError
from cluster.lifecycle import ProcessChanged, UpEvent
from cluster.on_ray.cluster import connected, remnants
from cluster.on_ray.runtime import is_listening, processes_with
from cluster.processes.status import DeploymentStatus, State
from echelon import Client
from tests.helpers.listening import listening_sockets
from tests.helpers.model_folders import write_model_folder
from tests.helpers.proxies import set_proxies
from tests.helpers.scrape import fetch

MODELS = Path(__file__).parents[2] / "models"
PROMPT = "def read_lines(path):\n"
GONE_S = 30.0


@pytest.fixture(scope="module")
def ray_address() -> Iterator[str]:
    """A user's Ray: a head with one CPU and a second node with one CPU."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 0})
    cluster.add_node(num_cpus=1, num_gpus=0)
    yield cluster.address
    cluster.shutdown()


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keeps state in the test's own folder, and leaves nothing running."""
    monkeypatch.setenv("ECHELON_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    yield
    for name in lifecycle.list_deployments():
        lifecycle.down(name, grace_s=1.0)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def deployment_file(
    folder: Path,
    *,
    target: Path = MODELS / "demo-target",
    tp_size: int = 1,
    draft: bool = False,
    device: str = "cpu",
    port: int | None = None,
) -> Path:
    path = folder / "deploy.yaml"
    path.write_text(f"""
apiVersion: echelon/v1
kind: Deployment
name: e2e
target: {{model: {target}, tensor_parallel_size: {tp_size}}}
{f"draft: {{model: {MODELS / 'demo-draft'}}}" if draft else ""}
kv_cache: {{device_bytes: 16MiB}}
scheduler: {{max_num_seqs: 4, max_num_batched_tokens: 256}}
device: {device}
server: {{grpc_port: {port or free_port()}, http_port: {free_port()}}}
""")
    return path


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def pids_of(status: DeploymentStatus) -> list[int]:
    pids = [process.pid for process in status.processes if process.pid is not None]
    assert len(pids) == len(status.processes), "every process has a pid"
    return pids


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + GONE_S
    while left := [pid for pid in pids if is_running(pid)]:
        assert time.monotonic() < deadline, f"processes {left} were left behind"
        time.sleep(0.05)


def wait_for_state(name: str, wanted: State) -> DeploymentStatus:
    deadline = time.monotonic() + GONE_S
    while (status := lifecycle.status(name)).state is not wanted:
        assert time.monotonic() < deadline, f"state is {status.state}, not {wanted}"
    return status


def test_workers_spread_over_two_nodes_of_somebodys_ray(ray_address: str, tmp_path: Path) -> None:
    events: list[UpEvent] = []
    path = deployment_file(tmp_path, tp_size=2)
    status = lifecycle.up(path, ray_address=ray_address, on_event=events.append)
    assert (status.state, status.private_ray, status.ray_address) == (State.READY, False, ray_address)
    assert status.plan is not None
    planned = [bundle.node_id for bundle in status.plan.group("target")]
    assert len(set(planned)) == 2, "one CPU a node, so one rank a node"
    stages = {event.process.stage for event in events if isinstance(event, ProcessChanged)}
    assert "loading target weights" in stages, "progress of the workers is reported"

    with connected(ray_address):
        tables = [table for table in placement_group_table().values() if table["state"] == "CREATED"]
        assert [list(table["bundles_to_node_id"].values()) for table in tables] == [planned]
    with Client(status.endpoint) as client:
        assert client.generate(PROMPT, max_tokens=8, temperature=0).usage.completion_tokens == 8

    with pytest.raises(StartError, match=r"deployment 'e2e' exists; .* echelon down e2e"):
        lifecycle.up(path, ray_address=ray_address)
    assert lifecycle.status("e2e").state is State.READY, "a second up changes nothing"

    rank_1 = next(process for process in status.processes if process.name == "target-0.1")
    assert rank_1.pid is not None
    os.kill(rank_1.pid, signal.SIGKILL)
    failed = wait_for_state("e2e", State.FAILED)
    assert "target-0.1: was killed by SIGKILL" in failed.reason

    lifecycle.down("e2e")
    wait_until_gone(pids_of(status))
    with connected(ray_address):
        assert remnants("e2e") == []
    with pytest.raises(DeploymentNotFoundError, match="no deployment 'e2e' was started from here; known: none"):
        lifecycle.status("e2e")


def test_a_failed_start_says_why_and_leaves_nothing(ray_address: str, tmp_path: Path) -> None:
    broken = write_model_folder(tmp_path / "broken")
    pids: set[int] = set()

    def note(event: UpEvent) -> None:
        if isinstance(event, ProcessChanged) and event.process.pid is not None:
            pids.add(event.process.pid)
            # The plan has checked the folder, so only the worker can notice what vanishes now.
            (broken / "model.safetensors").unlink(missing_ok=True)

    with pytest.raises(StartError, match=r"^target-0\.0: .*broken"):
        lifecycle.up(deployment_file(tmp_path, target=broken), ray_address=ray_address, on_event=note)
    assert pids
    wait_until_gone(list(pids))
    assert lifecycle.list_deployments() == []
    with connected(ray_address):
        assert remnants("e2e") == []


def test_a_taken_port_is_named_before_anything_is_loaded(ray_address: str, tmp_path: Path) -> None:
    events: list[UpEvent] = []
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(StartError, match=rf"server\.grpc_port {port} on 127\.0\.0\.1 .*[Aa]ddress already in use"):
            lifecycle.up(deployment_file(tmp_path, port=port), ray_address=ray_address, on_event=events.append)
    assert not [event for event in events if isinstance(event, ProcessChanged) and event.process.pid]
    assert lifecycle.list_deployments() == []


def test_a_start_that_takes_too_long_names_who_is_late(ray_address: str, tmp_path: Path) -> None:
    path = deployment_file(tmp_path)
    with pytest.raises(StartError, match=r"not ready in time: target-0\.0: .*raise startup_timeout_s"):
        lifecycle.up(path, ray_address=ray_address, timeout_s=0.5)
    assert lifecycle.list_deployments() == []


def test_no_place_and_no_ray(ray_address: str, tmp_path: Path) -> None:
    path = deployment_file(tmp_path, device="cuda")
    with pytest.raises(PlanError, match=r"no place for target rank 0: .*no free GPU"):
        lifecycle.up(path, ray_address=ray_address)
    with pytest.raises(StartError, match=r"no Ray cluster answers at 127\.0\.0\.1:\d+; start it, or leave"):
        lifecycle.up(path, ray_address=f"127.0.0.1:{free_port()}")
    assert lifecycle.list_deployments() == []


def test_a_private_ray_comes_and_goes_beside_another(
    ray_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_proxies(monkeypatch)
    status = lifecycle.up(deployment_file(tmp_path, tp_size=2, draft=True))
    assert (status.state, status.private_ray) == (State.READY, True)
    assert {process.name for process in status.processes} == {
        *("target-0.0", "target-0.1", "draft-0.0"),
        *("scheduler-0", "gateway-0"),
    }
    with Client(status.endpoint) as client:
        completion = client.generate(PROMPT, max_tokens=16, temperature=0, speculation={"num_speculative_tokens": 4})
        assert completion.usage.completion_tokens == 16
        assert completion.speculation.num_draft_tokens > 0, "the draft took part"
    assert b'echelon:generation_tokens_total{model_name="demo-target",replica="0"} 16.0' in fetch(status.metrics_url)
    private = state_dir.load("e2e").private_ray
    assert private is not None
    ray_processes = processes_with(private.token)
    assert private.pid in ray_processes
    addresses = {address for address, _ in listening_sockets(ray_processes)}  # those of the deployment are among them
    assert addresses == {"127.0.0.1"}, "nothing is open to other machines"
    assert Path(private.temp_dir).stat().st_mode & 0o777 == 0o700

    scheduler = next(process for process in status.processes if process.name == "scheduler-0")
    assert scheduler.pid is not None
    os.kill(scheduler.pid, signal.SIGSTOP)
    silent = wait_for_state("e2e", State.NOT_RESPONDING)
    assert silent.reason.startswith("scheduler-0 has not answered for ")
    os.kill(scheduler.pid, signal.SIGCONT)
    wait_for_state("e2e", State.READY)

    lifecycle.down("e2e")
    wait_until_gone([*pids_of(status), *ray_processes])
    assert not Path(private.temp_dir).exists()
    assert not is_listening(private.address)
    with connected(ray_address):
        assert remnants("e2e") == [], "the other Ray answers and has never seen us"

"""`up`, `status` and `down` with real workers, on a user's Ray of two nodes and on a private Ray beside it."""

import contextlib
import os
import re
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table

from cluster import lifecycle, state_dir
from cluster.errors import DeploymentNotFoundError, PlanError, StartError
from cluster.lifecycle import ChangesFound, ProcessChanged, UpEvent
from cluster.on_ray.cluster import find_controller, remnants
from cluster.on_ray.joining import connected
from cluster.private_ray import is_listening, processes_with
from cluster.processes.status import DeploymentStatus, ProcessStatus, State
from echelon import Client
from echelon.control import ControlClient
from tests.helpers.listening import listening_sockets
from tests.helpers.model_folders import write_model_folder
from tests.helpers.proxies import set_proxies
from tests.helpers.scrape import fetch
from tests.helpers.strangers import answers_plainly, answers_without_certificate

MODELS = Path(__file__).parents[2] / "models"
PROMPT = "def read_lines(path):\n"
GONE_S = 30.0
START_S = 120.0
_NUM_CLIENTS = 4


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
    dtype: str = "bfloat16",
    device: str = "cpu",
    port: int | None = None,
    spares: int = 0,
    more: str = "",
) -> Path:
    path = folder / "deploy.yaml"
    path.write_text(f"""
apiVersion: echelon/v1
kind: Deployment
name: e2e
target: {{model: {target}, tensor_parallel_size: {tp_size}, dtype: {dtype}}}
{f"draft: {{model: {MODELS / 'demo-draft'}}}" if draft else ""}
kv_cache: {{device_bytes: 16MiB}}
scheduler: {{max_num_seqs: 4, max_num_batched_tokens: 256}}
device: {device}
spares: {spares}
server: {{grpc_port: {port or free_port()}, http_port: {free_port()}}}
{more}
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


def process_of(status: DeploymentStatus, name: str) -> ProcessStatus:
    return next(process for process in status.processes if process.name == name)


def kill_and_wait(status: DeploymentStatus, name: str) -> DeploymentStatus:
    """Kill a process of a deployment that serves, and wait until it serves again with another in its place."""
    killed = process_of(status, name)
    assert killed.pid is not None
    os.kill(killed.pid, signal.SIGKILL)
    deadline = time.monotonic() + START_S
    while (now := lifecycle.status("e2e")).state is not State.READY or process_of(now, name).pid == killed.pid:
        assert time.monotonic() < deadline, f"state is {now.state}: {now.reason}"
    (lost, _, came_back) = now.events[-3:]
    assert (lost.part, lost.text[:6]) == (killed.id.part.name, "lost: ")
    assert came_back.text.startswith("is up again")
    return now


def wait_for_state(name: str, wanted: State) -> DeploymentStatus:
    deadline = time.monotonic() + GONE_S
    while (status := lifecycle.status(name)).state is not wanted:
        assert time.monotonic() < deadline, f"state is {status.state}, not {wanted}"
    return status


def wait_for_spares(status: DeploymentStatus) -> DeploymentStatus:
    """Until each rank has one that is ready."""
    deadline = time.monotonic() + START_S
    while any(process.spare != "ready" for process in status.processes if process.id.rank is not None):
        assert time.monotonic() < deadline, f"spares: { {each.name: each.spare for each in status.processes} }"
        status = lifecycle.status("e2e")
    return status


def wait_for_drafts(endpoint: str) -> None:
    """Until the draft has caught up; the scheduler has heard of it by then."""
    deadline = time.monotonic() + GONE_S
    with Client(endpoint) as client:
        while not client.generate(
            PROMPT, max_tokens=16, speculation={"num_speculative_tokens": 4}
        ).speculation.num_draft_tokens:
            assert time.monotonic() < deadline, "no drafts"


def test_workers_spread_over_two_nodes_of_an_existing_ray_cluster(ray_address: str, tmp_path: Path) -> None:
    events: list[UpEvent] = []
    path = deployment_file(tmp_path, tp_size=2)
    status = lifecycle.up(path, ray_address=ray_address, on_event=events.append)
    assert (status.state, status.private_ray, status.ray_address) == (State.READY, False, ray_address)
    assert status.plan is not None
    planned = [bundle.node_id for bundle in status.plan.replicas[0].group("target")]
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

    check_ports(status)
    again = kill_and_wait(status, "target-0.1")
    for before, after in zip(status.processes, again.processes, strict=True):
        assert (before.pid == after.pid) == (before.id.role != "target"), "both ranks, and nothing else, are new"
        assert before.devices == after.devices
    with Client(status.endpoint) as client:
        assert client.generate(PROMPT, max_tokens=8, temperature=0).usage.completion_tokens == 8

    with (
        Client(status.endpoint) as client,
        client.stream(PROMPT, max_tokens=200, temperature=0, ignore_eos=True) as stream,
    ):
        next(stream)
        kill_controller(ray_address)
        after = wait_for_takeover()
        assert after.processes == again.processes, "all that ran runs on"
        assert stream.result().usage.completion_tokens == 200

    kill_controller(ray_address)
    os.kill(process_of(after, "target-0.1").pid or 0, signal.SIGKILL)
    last = wait_for_takeover(other_than=after)
    for before, now in zip(after.processes, last.processes, strict=True):
        assert (before.pid == now.pid) == (before.id.role != "target"), "what died while no controller was there"
    with Client(status.endpoint) as client:
        assert client.generate(PROMPT, max_tokens=8, temperature=0).usage.completion_tokens == 8

    lifecycle.down("e2e")
    wait_until_gone([*pids_of(status), *pids_of(again), *pids_of(last)])
    with connected(ray_address):
        assert remnants("e2e") == []
    with pytest.raises(DeploymentNotFoundError, match="no deployment 'e2e' was started from here; known: none"):
        lifecycle.status("e2e")


def check_ports(status: DeploymentStatus) -> None:
    """Whoever has no certificate gets nothing from any port but the public ones.

    Those that know no certificates are named in docs/security.md: the TCPStore and gloo of groups with several ranks.
    """
    ports = {process.name: listening_sockets([process.pid]) for process in status.processes if process.pid}
    public = {int(url.rpartition(":")[2]) for url in (status.endpoint, status.http_url)}
    assert {port for _, port in ports["gateway-0"]} == public
    guarded = {process_of(status, name).address for name in ("scheduler-0", "target-0.0")}
    assert {f"{address}:{port}" for address, port in ports["scheduler-0"]} == {
        process_of(status, "scheduler-0").address
    }
    inside = {place for name, places in ports.items() if name != "gateway-0" for place in places}
    assert guarded <= {f"{address}:{port}" for address, port in inside}
    for place in inside:
        assert not answers_plainly(place), place
        assert not answers_without_certificate(place), place


def controller_pid(ray_address: str) -> int:
    with connected(ray_address):
        controller = find_controller("e2e")
        assert controller is not None
        return int(ray.get(controller.__ray_call__.remote(lambda _: os.getpid())))


def kill_controller(ray_address: str) -> None:
    os.kill(controller_pid(ray_address), signal.SIGKILL)


def wait_for_takeover(*, other_than: DeploymentStatus | None = None) -> DeploymentStatus:
    """Until the next controller says that it has taken over, and that all is well."""
    deadline = time.monotonic() + START_S
    while True:
        now = lifecycle.status("e2e")
        has_new = other_than is None or now.processes != other_than.processes
        if now.state is State.READY and has_new and "controller" in [event.part for event in now.events]:
            return now
        assert time.monotonic() < deadline, f"{now.state}: {now.reason}"
        time.sleep(0.2)


class Streams:
    """Requests one after the other, from several clients, from `start` until `stop`."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._stopped = threading.Event()
        self._pool = ThreadPoolExecutor(_NUM_CLIENTS)

    def start(self) -> None:
        self._ends = [self._pool.submit(self._send, number) for number in range(_NUM_CLIENTS)]

    def stop(self, *, num_models: int = 1) -> set[tuple[int, ...]]:
        """The outputs of each client's requests, which are all the same request. Raises what any of them met."""
        self._stopped.set()
        outputs = [end.result() for end in self._ends]
        self._pool.shutdown()
        assert all(len(seen) <= num_models for seen in outputs), "whichever replica served, no token changes"
        return set().union(*outputs)

    def _send(self, number: int) -> set[tuple[int, ...]]:
        seen = set()
        with Client(self._address) as client:
            while not self._stopped.is_set():
                seen.add(sampled(client, number))
        return seen


def sampled(client: Client, seed: int) -> tuple[int, ...]:
    return client.generate(PROMPT, max_tokens=48, temperature=1.0, seed=seed, ignore_eos=True).token_ids


def placed(address: str) -> set[str]:
    """The processes that the gateway shows."""
    with ControlClient(address) as control:
        return {process.name for process in control.replicas().processes}


def test_replicas_come_and_go_by_the_file_while_requests_run(ray_address: str, tmp_path: Path) -> None:
    path = deployment_file(tmp_path, dtype="float32", more="replicas: {min: 1}\ndrain_timeout_s: 0")

    def edited(before: str, after: str) -> Path:
        path.write_text(path.read_text().replace(before, after))
        return path

    first = lifecycle.up(path, ray_address=ray_address)
    streams = Streams(first.endpoint)
    streams.start()
    events: list[UpEvent] = []
    both = lifecycle.apply(edited("min: 1", "min: 2"), on_event=events.append)
    assert both.plan is not None
    (one, other) = both.plan.replicas
    assert {bundle.node_id for bundle in other.bundles}.isdisjoint({bundle.node_id for bundle in one.bundles})
    assert [process.name for process in both.processes][-2:] == ["target-1.0", "scheduler-1"]
    assert [change.key for event in events if isinstance(event, ChangesFound) for change in event.changes] == [
        "replicas.min",
        "replicas.max",
    ]
    wait_for_tokens_of(first.http_url, replica=1)
    assert {"target-0.0", "scheduler-0", "target-1.0", "scheduler-1", "gateway-0"} <= placed(first.endpoint)
    edited("min: 2", "min: 3")
    with pytest.raises(PlanError, match="no place for target rank 0 of replica 2"):
        lifecycle.apply(path)
    assert lifecycle.status("e2e").state is State.READY

    back = lifecycle.apply(edited("min: 3", "min: 1"))
    assert [process.name for process in back.processes] == [process.name for process in first.processes]
    wait_until_gone([process.pid for process in both.processes[-2:] if process.pid is not None])
    assert placed(first.endpoint) == {"target-0.0", "scheduler-0", "gateway-0"}

    edited("{min: 1}", "{min: 1, max: 2, target_ongoing_requests: 2, upscale_delay_s: 0, downscale_delay_s: 1}")
    lifecycle.apply(path)
    with pytest.raises(PlanError, match="replicas follow the load"):
        lifecycle.scale("e2e", 2)
    wait_for_tokens_of(first.http_url, replica=1)
    assert len(streams.stop()) == _NUM_CLIENTS
    wait_for_replicas(1)
    edited("{min: 1, max: 2, target_ongoing_requests: 2, upscale_delay_s: 0, downscale_delay_s: 1}", "{min: 1}")
    lifecycle.apply(path)


def test_replicas_are_scaled_restarted_and_drained_by_command(ray_address: str, tmp_path: Path) -> None:
    lifecycle.up(deployment_file(tmp_path, more="drain_timeout_s: 0"), ray_address=ray_address)
    assert lifecycle.scale("e2e", 2).num_replicas == 2
    restarted = lifecycle.restart("e2e", ["scheduler-1"])
    assert [event.text for event in restarted.events if event.part == "scheduler-1"][-2:-1] == ["is started again"]
    assert lifecycle.drain("e2e") == 0
    assert lifecycle.status("e2e").state is State.DRAINED
    lifecycle.resume("e2e")
    assert lifecycle.status("e2e").state is State.READY


@pytest.mark.timeout(400)
def test_a_changed_file_rolls_replica_by_replica_while_requests_run(ray_address: str, tmp_path: Path) -> None:
    path = deployment_file(tmp_path, dtype="float32", more="replicas: {min: 1}\ndrain_timeout_s: 0")

    def edited(before: str, after: str) -> Path:
        path.write_text(path.read_text().replace(before, after))
        return path

    edited("max_num_batched_tokens: 256", "max_num_batched_tokens: 256, max_model_len: 256")
    first = lifecycle.up(path, ray_address=ray_address)
    streams = Streams(first.endpoint)
    streams.start()
    draft = Path(shutil.copytree(MODELS / "demo-draft", tmp_path / "draft"))
    edited("kv_cache:", f"draft: {{model: {draft}, placement: colocated}}\nkv_cache:")

    def break_draft(event: UpEvent) -> None:
        if isinstance(event, ProcessChanged) and event.process.name == "target-1.0":
            (draft / "model.safetensors").unlink(missing_ok=True)

    with pytest.raises(StartError, match=r"^target-1\.0: .*draft"):
        lifecycle.apply(path, on_event=break_draft)
    same = lifecycle.status("e2e")
    assert same.state is State.READY
    assert pids_of(same) == pids_of(first), "what ran before still does"

    shutil.copytree(MODELS / "demo-draft", draft, dirs_exist_ok=True)
    surged = lifecycle.apply(path)
    assert len(set(pids_of(surged)) & set(pids_of(first))) == 1, "the gateway stays"
    assert surged.settings is not None
    assert surged.settings["method"] == "draft_model"

    two = lifecycle.scale("e2e", 2)
    edited("{min: 1}", "{min: 2}")
    edited("max_num_seqs: 4", "max_num_seqs: 5")
    with pytest.raises(PlanError, match="no place for target rank 0 of replica 2"):
        lifecycle.apply(path)
    assert pids_of(lifecycle.status("e2e")) == pids_of(two)
    controller = controller_pid(ray_address)
    pids: dict[str, int | None] = {}

    def lose_controller(event: UpEvent) -> None:
        if isinstance(event, ProcessChanged):
            pids[event.process.name] = event.process.pid
            if event.process.name == "target-0.0":  # the second one to be changed
                with contextlib.suppress(ProcessLookupError):
                    os.kill(controller, signal.SIGKILL)

    with pytest.raises(StartError, match="the controller does not answer"):
        lifecycle.apply(edited("{min: 2}", "{min: 2, rollout: in_place}"), on_event=lose_controller)
    half = wait_for_takeover()
    assert half.reason == "a change has not ended: of 1 replicas, 1 has it; run echelon apply to go on or back"
    with pytest.raises(PlanError, match="a change has not ended"):
        lifecycle.scale("e2e", 3)
    rolled = lifecycle.apply(path)
    assert (rolled.state, rolled.reason, rolled.num_replicas) == (State.READY, "", 2)
    for name in ("target-1.0", "scheduler-1"):
        assert process_of(half, name).pid == process_of(rolled, name).pid == pids[name], "none is changed twice"
    assert len(set(pids_of(rolled)) & set(pids_of(two))) == 1
    of_old = streams.stop()
    assert len(of_old) == _NUM_CLIENTS

    streams = Streams(first.endpoint)
    streams.start()
    changed = lifecycle.apply(edited(str(MODELS / "demo-target"), str(MODELS / "demo-draft")))
    seen = streams.stop(num_models=2)
    with Client(first.endpoint) as client:
        assert client.model_info().model == changed.model == "demo-draft"
        of_new = {sampled(client, seed) for seed in range(_NUM_CLIENTS)}
    assert of_new <= seen <= of_old | of_new, "every output is one model's alone"
    path.write_text(re.sub(r"http_port: \d+", f"http_port: {free_port()}", path.read_text()))
    with pytest.raises(PlanError, match=r"server\.http_port cannot change while e2e runs"):
        lifecycle.apply(path)


def wait_for_replicas(number: int) -> None:
    deadline = time.monotonic() + START_S
    while (plan := lifecycle.status("e2e").plan) is None or len(plan.replicas) != number:
        assert time.monotonic() < deadline
        time.sleep(0.2)


def wait_for_tokens_of(http_url: str, *, replica: int) -> None:
    counted = re.compile(rb'^echelon:generation_tokens_total\{.*replica="%d"\} [1-9]' % replica, re.M)
    deadline = time.monotonic() + START_S
    while not counted.search(fetch(f"{http_url}/metrics")):
        assert time.monotonic() < deadline, f"replica {replica} gets no requests"


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


def test_a_start_that_takes_too_long_names_the_late_process(ray_address: str, tmp_path: Path) -> None:
    path = deployment_file(tmp_path)
    with pytest.raises(StartError, match=r"not ready in time: target-0\.0: .*raise startup_timeout_s"):
        lifecycle.up(path, ray_address=ray_address, timeout_s=2.1)
    assert lifecycle.list_deployments() == []


def test_a_signal_reaches_its_handler_after_ray_was_asked(ray_address: str, tmp_path: Path) -> None:
    """Ray takes the handler of its drivers, and `echelon serve` takes everything down in it."""
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    try:
        lifecycle.plan(deployment_file(tmp_path), ray_address=ray_address)
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]


def test_a_plan_that_fits_nowhere_and_a_missing_ray_are_errors(ray_address: str, tmp_path: Path) -> None:
    path = deployment_file(tmp_path, device="cuda")
    with pytest.raises(PlanError, match=r"no place for target rank 0: .*no free GPU"):
        lifecycle.up(path, ray_address=ray_address)
    with pytest.raises(StartError, match=r"no Ray cluster answers at 127\.0\.0\.1:\d+; start it, or leave"):
        lifecycle.up(path, ray_address=f"127.0.0.1:{free_port()}")
    assert lifecycle.list_deployments() == []


def test_a_private_ray_comes_and_goes_alongside_another(
    ray_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_proxies(monkeypatch)
    status = lifecycle.up(deployment_file(tmp_path, tp_size=2, draft=True, spares=3))
    assert (status.state, status.private_ray) == (State.READY, True)
    assert {process.name for process in status.processes} == {
        *("target-0.0", "target-0.1", "draft-0.0"),
        *("scheduler-0", "gateway-0"),
    }
    with Client(status.endpoint) as client:
        completion = client.generate(PROMPT, max_tokens=16, temperature=0, speculation={"num_speculative_tokens": 4})
        assert completion.usage.completion_tokens == 16
        assert completion.speculation.num_draft_tokens > 0, "the draft took part"
    assert b'echelon:generation_tokens_total{model_name="demo-target",replica="0"} 16.0' in fetch(
        f"{status.http_url}/metrics"
    )
    private = state_dir.load("e2e").private_ray
    assert private is not None
    ray_processes = processes_with(private.token)
    assert private.pid in ray_processes
    addresses = {address for address, _ in listening_sockets(ray_processes)}  # those of the deployment are among them
    assert addresses == {"127.0.0.1"}, "nothing is open to other machines"
    assert Path(private.temp_dir).stat().st_mode & 0o777 == 0o700

    status = wait_for_spares(status)
    drafting_again = kill_and_wait(status, "draft-0.0")
    assert drafting_again.events[-1].text.endswith(" s after it was lost, by 1 spare")
    again = kill_and_wait(drafting_again, "scheduler-0")
    wait_for_drafts(status.endpoint)
    scheduler = process_of(again, "scheduler-0")
    assert scheduler.pid is not None
    os.kill(scheduler.pid, signal.SIGSTOP)
    silent = wait_for_state("e2e", State.NOT_RESPONDING)
    assert silent.reason.startswith("scheduler-0 has not answered for ")
    os.kill(scheduler.pid, signal.SIGCONT)
    wait_for_state("e2e", State.READY)

    lifecycle.down("e2e")
    wait_until_gone([*pids_of(status), *pids_of(again), *ray_processes])
    assert not Path(private.temp_dir).exists()
    assert not is_listening(private.address)
    with connected(ray_address):
        assert remnants("e2e") == [], "the other Ray answers and has never seen us"

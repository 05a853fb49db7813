"""Machines that are written down: what `plan --inventory` makes of them, and what it says about mistakes."""

import json
from pathlib import Path

import pytest

from cluster.errors import ConfigError
from cluster.planning.inventory_file import read_inventory
from cluster.planning.plan import GIB, DiskFacts
from echelon.cli.app import main
from tests.helpers.model_folders import write_model_folder

TWO = """\
nodes:
  - address: 10.0.0.1
    cpus: 2
    memory: 8GiB
    gpus: 1
    gpu_memory: 16GiB
    disk: 1GB
  - {address: "fd00::2", cpus: 4, memory: 4GiB}
"""


def problems(tmp_path: Path, text: str) -> str:
    file = tmp_path / "machines.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_inventory(file)
    return str(caught.value).replace(str(file), "machines.yaml")


def test_machines_are_as_written(tmp_path: Path) -> None:
    file = tmp_path / "machines.yaml"
    file.write_text(TWO)
    first, second = read_inventory(file).nodes
    assert (first.num_gpus, first.gpu_memory_bytes, first.memory_bytes) == (1, 16 * GIB, 8 * GIB)
    assert first.disk == DiskFacts(problem="", free_bytes=10**9)
    assert (second.address, second.num_gpus, second.num_cpus, second.cores) == ("fd00::2", 0, 4.0, (0, 1, 2, 3))
    assert read_inventory(file).head_node_id == first.node_id


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("gpus: 1", "gpu: 1"), "line 5: nodes.0.gpu: unknown key; did you mean nodes.0.gpus?"),
        (("gpus: 1", "gpus: '1'"), "line 5: nodes.0.gpus: '1': must be a valid integer; write a whole number"),
        (("    gpu_memory: 16GiB\n", ""), "line 2: nodes.0.gpu_memory: is missing; add the memory of one of its GPUs"),
        (("memory: 8GiB", "memory: much"), "line 4: nodes.0.memory: 'much': is not a size; write bytes, or"),
        (("    cpus: 2\n", ""), "line 2: nodes.0.cpus: is missing; add it"),
        (("fd00::2", "10.0.0.1"), "line 8: nodes.1.address: 10.0.0.1: is the address of nodes.0 too; give each"),
        (("10.0.0.1", "gpu-1"), "line 2: nodes.0.address: 'gpu-1': is not an IP address; write that of the node"),
        (("    cpus: 2\n", "    cpus: 2\n    cpus: 3\n"), "line 4: nodes.0.cpus: is given twice, first in line 3"),
        (("nodes:", "machines:"), "line 1: machines: unknown key; known keys here: nodes"),
        ((TWO, "nodes: []"), "line 1: nodes: []: List should have at least 1 item"),
        ((TWO, "nodes: &n [*n]"), "line 1: nodes.0: is an alias of a section that contains it"),
        ((TWO, "nodes: 3"), "line 1: nodes: 3: must be a valid list; write a list"),
    ],
)
def test_a_mistake_is_named_with_its_line(tmp_path: Path, change: tuple[str, str], expected: str) -> None:
    assert f"machines.yaml: {expected}" in problems(tmp_path, TWO.replace(*change))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_inventory(tmp_path / "gone.yaml")


@pytest.mark.parametrize(("num_gpus", "code"), [(1, 0), (0, 1)])
def test_plan_asks_the_file_instead_of_this_machine(
    tmp_path: Path, num_gpus: int, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model_folder(tmp_path / "target")
    deployment, machines = tmp_path / "d.yaml", tmp_path / "machines.yaml"
    deployment.write_text("{apiVersion: echelon/v1, kind: Deployment, name: d, target: {model: target}}")
    machines.write_text(TWO.replace("gpus: 1", f"gpus: {num_gpus}"))
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(deployment), "--inventory", str(machines), "--json"])
    out, err = capsys.readouterr()
    assert int(ended.value.code or 0) == code
    if num_gpus:
        (bundle,) = json.loads(out)["replicas"][0]["bundles"]
        assert bundle["memory"]["weight_bytes"] + bundle["memory"]["kv_cache_bytes"] <= 16 * GIB * 0.9
    else:
        assert "no place for target rank 0" in err


def test_machines_and_a_cluster_at_once_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model_folder(tmp_path / "target")
    deployment, machines = tmp_path / "d.yaml", tmp_path / "machines.yaml"
    deployment.write_text("{apiVersion: echelon/v1, kind: Deployment, name: d, target: {model: target}}")
    machines.write_text(TWO)
    plan = ["plan", str(deployment), "--inventory", str(machines)]
    with pytest.raises(SystemExit) as ended:
        main([*plan, "--ray-address", "127.0.0.1:6379"])
    assert ended.value.code == 2
    assert "--inventory and --ray-address: give one" in capsys.readouterr().err
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    with pytest.raises(SystemExit) as ended:
        main(plan)
    assert not ended.value.code, "what the environment says is no choice"

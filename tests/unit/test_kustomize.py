"""The overlays in deploy/kustomize: what they make of the base is right, and the deployment in it fits its pods."""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from cluster.deployment.deployment_file import load_deployment
from cluster.planning.plan import GIB, MIB, Inventory, Node
from cluster.planning.planner import make_plan
from tests.helpers.kustomized import Document, check_schema, pods, render
from tests.helpers.real_shapes import write_real_shapes

DEPLOY = Path(__file__).parents[2] / "deploy"
BASE = DEPLOY / "kuberay"
OVERLAYS = sorted(path.parent for path in (DEPLOY / "kustomize").glob("*/kustomization.yaml"))


@pytest.fixture(params=OVERLAYS, ids=lambda folder: folder.name)
def overlay(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.param
    return folder


def test_the_base_is_the_manifests() -> None:
    assert list(render(BASE).values()) == list(yaml.safe_load_all((BASE / "echelon.yaml").read_text()))


def test_kubernetes_accepts_every_document_of_an_overlay(overlay: Path) -> None:
    for document in render(overlay).values():
        check_schema(document)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_kustomize_makes_the_same_of_an_overlay(overlay: Path) -> None:
    made = subprocess.run(["kubectl", "kustomize", str(overlay)], capture_output=True, text=True, check=True)
    documents: list[Document] = list(yaml.safe_load_all(made.stdout))
    assert {(each["kind"], each["metadata"]["name"]): each for each in documents} == render(overlay)


def test_the_deployment_of_an_overlay_fits_its_pod_and_its_volumes(overlay: Path, tmp_path: Path) -> None:
    documents = render(overlay)
    text = documents["ConfigMap", "echelon"]["data"]["deployment.yaml"]
    fields = yaml.safe_load(text)
    for part in ("target", "draft"):
        write_real_shapes(tmp_path / Path(fields[part]["model"]).name)
    (tmp_path / "deployment.yaml").write_text(text.replace("/models/", f"{tmp_path}/"))
    settings = load_deployment(tmp_path / "deployment.yaml")
    limits = pods(documents["RayCluster", "echelon"])["worker"]["containers"][0]["resources"]["limits"]
    worker = Node(
        node_id="worker",
        address="10.0.0.2",
        num_cpus=float(limits["cpu"]),
        num_gpus=int(limits["nvidia.com/gpu"]),
        memory_bytes=int(limits["memory"].removesuffix("Gi")) * GIB,
        gpu_memory_bytes=81559 * MIB,
    )
    head = Node(node_id="head", address="10.0.0.1", num_cpus=8.0, num_gpus=0)
    plan = make_plan(settings, Inventory(nodes=(head, worker), head_node_id="head"))
    assert {bundle.node_id for bundle in plan.bundles} == {"worker"}
    disk = settings.kv_cache.disk
    assert disk is not None
    claim = documents["PersistentVolumeClaim", "echelon-kv"]["spec"]["resources"]["requests"]["storage"]
    assert int(claim.removesuffix("Gi")) * GIB > disk.bytes
    server = settings.server
    ports = {
        port["name"]: port["containerPort"]
        for port in pods(documents["RayCluster", "echelon"])["head"]["containers"][0]["ports"]
    }
    assert (ports["http"], ports["grpc"]) == (server.http_port, server.grpc_port)

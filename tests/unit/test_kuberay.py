"""The manifests of deploy/kuberay: their schemas, and that names, ports and files agree with the deployment in them."""

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from cluster.deployment.deployment_file import load_deployment
from cluster.deployment.schema import DeploymentFile
from cluster.planning.plan import GIB, MIB, Inventory, Node
from cluster.planning.planner import make_plan
from tests.helpers.kustomized import KUBERNETES, check_schema, pods
from tests.helpers.real_shapes import write_real_shapes

ROOT = Path(__file__).parents[2]
DOCUMENTS: list[dict[str, Any]] = list(yaml.safe_load_all((ROOT / "deploy" / "kuberay" / "echelon.yaml").read_text()))


def of_kind(kind: str) -> dict[str, dict[str, Any]]:
    return {document["metadata"]["name"]: document for document in DOCUMENTS if document["kind"] == kind}


CLUSTER = of_kind("RayCluster")["echelon"]
PODS = pods(CLUSTER)
DEPLOYMENT = DeploymentFile.model_validate(yaml.safe_load(of_kind("ConfigMap")["echelon"]["data"]["deployment.yaml"]))


def container(pod: str) -> dict[str, Any]:
    (only,) = PODS[pod]["containers"]
    return only  # type: ignore[no-any-return]


def mounts(pod: str) -> dict[str, dict[str, Any]]:
    """The volume at each path."""
    volumes = {volume["name"]: volume for volume in PODS[pod]["volumes"]}
    return {mount["mountPath"]: volumes[mount["name"]] for mount in container(pod)["volumeMounts"]}


def environment(pod: str) -> dict[str, str]:
    return {variable["name"]: variable.get("value", "") for variable in container(pod)["env"]}


@pytest.mark.parametrize(
    "document", DOCUMENTS, ids=lambda document: f"{document['kind']}-{document['metadata']['name']}"
)
def test_kubernetes_accepts_every_document(document: dict[str, Any]) -> None:
    check_schema(document)


def test_a_misspelt_key_of_a_pod_is_found() -> None:
    spec = {"containers": [{**container("head"), "livenesProbe": {}}]}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": spec}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


@pytest.mark.parametrize("pod", PODS)
def test_a_pod_is_probed_bounded_and_locked(pod: str) -> None:
    assert {"startupProbe", "readinessProbe", "livenessProbe"} <= container(pod).keys()
    assert container(pod)["resources"].keys() == {"requests", "limits"}
    assert container(pod)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    security = PODS[pod]["securityContext"]
    assert (security["runAsNonRoot"], security["runAsUser"], security["fsGroup"]) == (True, 1000, 1000)
    assert PODS[pod]["automountServiceAccountToken"] is False
    assert container(pod)["lifecycle"]["preStop"]
    assert mounts(pod)["/tmp"]["emptyDir"]["sizeLimit"]


def test_the_head_serves_the_deployment() -> None:
    server = DEPLOYMENT.server
    ports = {port["name"]: port["containerPort"] for port in container("head")["ports"]}
    assert (ports["http"], ports["grpc"]) == (server.http_port, server.grpc_port)
    probes = [container("head")[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")]
    assert [probe["path"] for probe in probes] == ["/health", "/health", "/live"]
    assert all((probe["port"], probe["scheme"]) == ("http", "HTTPS") for probe in probes)
    (script,) = container("head")["args"]
    assert "exec echelon serve /etc/echelon/deployment.yaml" in script
    assert f'--ray-address "$POD_IP:{ports["gcs-server"]}"' in script
    assert container("head")["lifecycle"]["preStop"]["exec"]["command"] == ["echelon", "down"]


def test_the_head_may_take_as_long_as_the_cluster_and_the_start() -> None:
    wait_s = float(container("head")["args"][0].split("--wait")[1].split()[0])
    probe = container("head")["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] > wait_s + DEPLOYMENT.startup_timeout_s


def test_what_the_deployment_names_is_mounted() -> None:
    server, disk = DEPLOYMENT.server, DEPLOYMENT.kv_cache.disk
    assert server.tls is not None
    assert server.auth is not None
    assert disk is not None
    head, worker = mounts("head"), mounts("worker")
    assert head["/etc/echelon/deployment.yaml"]["configMap"]["name"] in of_kind("ConfigMap")
    for path in (server.tls.cert, server.tls.key, server.auth.tokens_file):
        assert "secret" in head[str(Path(path).parent)]
    assert DEPLOYMENT.draft is not None
    for model in (DEPLOYMENT.target.model, DEPLOYMENT.draft.model):
        assert head[str(Path(model).parent)] == worker[str(Path(model).parent)]
    assert "persistentVolumeClaim" in worker[str(Path(disk.path).parent)]
    assert "persistentVolumeClaim" in head[str(Path(environment("head")["ECHELON_STATE_DIR"]).parent)]
    for pod in PODS:
        for volume in mounts(pod).values():
            claim = volume.get("persistentVolumeClaim", {}).get("claimName")
            assert claim is None or claim in of_kind("PersistentVolumeClaim")


def test_the_pods_have_room_for_the_plan(tmp_path: Path) -> None:
    text = of_kind("ConfigMap")["echelon"]["data"]["deployment.yaml"]
    for name in ("Llama-3.3-70B-Instruct", "Llama-3.2-3B-Instruct"):
        write_real_shapes(tmp_path / name)
    (tmp_path / "deployment.yaml").write_text(text.replace("/models/", f"{tmp_path}/"))
    limits = container("worker")["resources"]["limits"]
    num_gpus = int(limits["nvidia.com/gpu"])
    worker = Node(
        node_id="worker",
        address="10.0.0.2",
        num_cpus=float(limits["cpu"]),
        num_gpus=num_gpus,
        memory_bytes=int(limits["memory"].removesuffix("Gi")) * GIB,
        gpu_memory_bytes=81559 * MIB,
    )
    head = Node(node_id="head", address="10.0.0.1", num_cpus=8.0, num_gpus=0)
    plan = make_plan(
        load_deployment(tmp_path / "deployment.yaml"), Inventory(nodes=(head, worker), head_node_id="head")
    )
    assert [bundle.node_id for bundle in plan.bundles] == ["worker"] * num_gpus
    assert plan.gateways[0].process.node_id == "head"


def test_only_the_pods_of_the_cluster_reach_the_inner_ports() -> None:
    inside, gateway = (of_kind("NetworkPolicy")[name]["spec"] for name in ("echelon-inside", "echelon-gateway"))
    ours = {"ray.io/cluster": CLUSTER["metadata"]["name"]}
    assert inside["podSelector"]["matchLabels"] == ours
    assert inside["ingress"] == [{"from": [{"podSelector": {"matchLabels": ours}}]}]
    (rule,) = gateway["ingress"]
    assert {port["port"] for port in rule["ports"]} == {DEPLOYMENT.server.http_port, DEPLOYMENT.server.grpc_port}
    head = {**ours, "ray.io/node-type": "head"}
    assert gateway["podSelector"]["matchLabels"] == head == of_kind("Service")["echelon"]["spec"]["selector"]


def test_ray_asks_for_a_token_and_has_the_version_of_the_image() -> None:
    assert CLUSTER["spec"]["authOptions"] == {"mode": "token"}
    requirement = next(line for line in (ROOT / "pyproject.toml").read_text().splitlines() if '"ray>=' in line)
    major, minor, _ = CLUSTER["spec"]["rayVersion"].split(".")
    assert f"ray>={major}.{minor}," in requirement
    assert PODS["head"]["containers"][0]["image"] == PODS["worker"]["containers"][0]["image"]

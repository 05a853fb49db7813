"""What kustomize makes of a folder, as far as the folders in deploy/ use it; and what Kubernetes says of a document."""

from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml

KUBERNETES = "1.31"
_KEYS = {"apiVersion", "kind", "resources", "images", "configMapGenerator", "generatorOptions", "patches"}
_CLUSTER_KEYS = {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"}

Document = dict[str, Any]


def check_schema(document: Document) -> None:
    """Raises ValidationError. The RayCluster's own keys are KubeRay's, so of it the pods are checked."""
    if document["apiVersion"] != "ray.io/v1":
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
        return
    assert set(document["spec"]) == _CLUSTER_KEYS
    for spec in pods(document).values():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": spec}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def pods(cluster: Document) -> dict[str, Document]:
    """The specs of the pods of a RayCluster."""
    head, worker = cluster["spec"]["headGroupSpec"], cluster["spec"]["workerGroupSpecs"][0]
    return {"head": head["template"]["spec"], "worker": worker["template"]["spec"]}


def render(folder: Path) -> dict[tuple[str, str], Document]:
    """The documents by kind and name."""
    rules = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert rules.keys() <= _KEYS, f"{folder}: uses {rules.keys() - _KEYS}"
    documents: dict[tuple[str, str], Document] = {}
    for resource in rules["resources"]:
        documents |= _resource(folder / resource)
    for generator in rules.get("configMapGenerator", ()):
        assert generator["behavior"] == "replace"
        data = {name: (folder / name).read_text() for name in generator["files"]}
        documents["ConfigMap", generator["name"]]["data"] = data
    for patch in rules.get("patches", ()):
        for operation in yaml.safe_load(patch["patch"]):
            _replace(documents[patch["target"]["kind"], patch["target"]["name"]], operation)
    for image in rules.get("images", ()):
        for document in documents.values():
            _set_image(document, image)
    return documents


def _resource(path: Path) -> dict[tuple[str, str], Document]:
    if path.is_dir():
        return render(path)
    documents: list[Document] = list(yaml.safe_load_all(path.read_text()))
    return {(document["kind"], document["metadata"]["name"]): document for document in documents}


def _replace(document: Any, operation: Document) -> None:
    """RFC 6902; KeyError and IndexError where nothing is to be replaced."""
    assert operation["op"] == "replace"
    *way, last = [int(step) if step.isdigit() else step for step in operation["path"].split("/")[1:]]
    for step in way:
        document = document[step]
    assert document[last] is not None
    document[last] = operation["value"]


def _set_image(part: Any, image: Document) -> None:
    if isinstance(part, list):
        for item in part:
            _set_image(item, image)
    elif isinstance(part, dict):
        for container in part.get("containers", ()):
            name, _, tag = container["image"].rpartition(":")
            if name == image["name"]:
                container["image"] = f"{image.get('newName', name)}:{image.get('newTag', tag)}"
        for value in part.values():
            _set_image(value, image)

"""The cases of tests/corpus/model_folders and tests/corpus/deployments, as folders on disk."""

import os
import shutil
from pathlib import Path
from typing import Any

import yaml

from tests.helpers.corpus import CORPUS, read
from tests.helpers.valid_folders import read_with_header, write_json, write_valid_folder, write_with_header

FOLDER_CASES = {path.stem: path for path in sorted((CORPUS / "model_folders").glob("*.json"))}
DEPLOYMENT_CASES = {path.stem: path for path in sorted((CORPUS / "deployments").glob("*.yaml"))}
_DEPLOYMENT: dict[str, Any] = {
    "apiVersion": "echelon/v1",
    "kind": "Deployment",
    "name": "a",
    "target": {"model": "target"},
    "device": "cpu",
    "kv_cache": {"device_bytes": "1MiB"},
    "scheduler": {"max_num_seqs": 4, "max_num_batched_tokens": 64},
}


def write_folder_case(case: dict[str, Any], root: Path) -> Path:
    """Writes a valid target, and a draft if the case has one, each with its changes. Returns the deployment file."""
    shape = {"weights": case.get("weights", "BF16"), "num_shards": case.get("num_shards", 1)}
    target = write_valid_folder(root / "target", case.get("family", "llama"), **shape)
    for name, changes in case["files"].items():
        _change_file(target / name, changes)
    deployment = dict(_DEPLOYMENT)
    if "draft" in case:
        draft = write_valid_folder(root / "draft", "llama")
        for name, changes in case["draft"].items():
            _change_file(draft / name, changes)
        deployment["draft"] = {"model": "draft"}
    file = root / "deployment.yaml"
    file.write_text(yaml.safe_dump(change(deployment, case.get("deployment", {})), sort_keys=False))
    return file


def write_deployment_case(name: str, root: Path) -> tuple[Path, dict[str, Any]]:
    """Writes the file beside the models `target` and `draft` and a link `loop` to itself. Returns it and the expected
    outcome."""
    write_valid_folder(root / "target", "llama")
    write_valid_folder(root / "draft", "llama")
    (root / "loop").symlink_to("loop")
    path = DEPLOYMENT_CASES[name]
    return Path(shutil.copy(path, root / "deployment.yaml")), read(path.with_suffix(".json"))


def change(content: Any, changes: dict[str, Any]) -> Any:
    """`delete` removes paths like a/b/c, `set` puts values there."""
    for path in changes.get("delete", []):
        place, key = _place(content, path)
        del place[key]
    for path, value in changes.get("set", {}).items():
        place, key = _place(content, path)
        place[key] = value
    return content


def _place(content: Any, path: str) -> tuple[dict[str, Any], str]:
    *parents, key = path.split("/")
    for parent in parents:
        content[parent] = dict(content[parent])
        content = content[parent]
    return content, key


def _change_file(file: Path, changes: dict[str, Any]) -> None:
    if "copy_of" in changes:
        shutil.copy(file.with_name(changes["copy_of"]), file)
    if "text" in changes:
        file.write_text(changes["text"])
    if changes.get("gone"):
        file.unlink()
    if changes.get("folder"):
        file.mkdir()
    if changes.get("pipe"):
        os.mkfifo(file)
    if "cut" in changes:
        file.write_bytes(file.read_bytes()[: changes["cut"]])
    if "add" in changes:
        file.write_bytes(file.read_bytes() + changes["add"].encode())
    if file.suffix == ".safetensors" and changes.keys() & {"set", "delete", "header", "rename"}:
        _change_header(file, changes)
    elif changes.keys() & {"set", "delete"}:
        write_json(file, change(read(file), changes))


def _change_header(file: Path, changes: dict[str, Any]) -> None:
    header, data = read_with_header(file)
    for name, new in changes.get("rename", {}).items():
        header[new] = header.pop(name)
    write_with_header(file, changes.get("header", change(header, changes)), data)

"""A cluster that is written down instead of asked: planning for machines that are not there, or not there yet."""

import ipaddress
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, ValidationError

from cluster.deployment.field_types import Size
from cluster.deployment.problems import problems_of
from cluster.deployment.schema import Section
from cluster.deployment.yaml_lines import read_document
from cluster.errors import Problem
from cluster.planning.plan import DiskFacts, Inventory, Node


def _check_address(value: str) -> str:
    try:
        return str(ipaddress.ip_address(value))
    except ValueError as err:
        raise ValueError("is not an IP address; write that of the node in the cluster's network") from err


class WrittenNode(Section):
    """One machine of an inventory."""

    address: Annotated[str, AfterValidator(_check_address)]
    cpus: Annotated[int, Field(ge=1, le=4096)]
    memory: Size  # of the machine, free for us
    gpus: Annotated[int, Field(ge=0, le=64)] = 0
    gpu_memory: Size | None = None  # of each of them
    disk: Size | None = None  # free at kv_cache.disk.path


class InventoryFile(Section):
    """The machines of a cluster. The first one is its head, where the gateway runs."""

    nodes: Annotated[list[WrittenNode], Field(min_length=1, max_length=1024)]


def read_inventory(path: Path) -> Inventory:
    """Raises ConfigError with every problem found, each with its line."""
    document = read_document(path)
    try:
        nodes = InventoryFile.model_validate(document.value).nodes
    except ValidationError as err:
        raise document.error(path, problems_of(err, InventoryFile)) from None
    if problems := list(_problems(nodes)):
        raise document.error(path, problems)
    return Inventory(nodes=tuple(_node(str(number), node) for number, node in enumerate(nodes)), head_node_id="0")


def _problems(nodes: Sequence[WrittenNode]) -> Iterator[Problem]:
    """How the values go together."""
    first: dict[str, int] = {}
    for number, node in enumerate(nodes):
        path = f"nodes.{number}"
        if first.setdefault(node.address, number) != number:
            message = f"is the address of nodes.{first[node.address]} too"
            yield Problem(path=f"{path}.address", value=node.address, message=message, remedy="give each node its own")
        if node.gpus and node.gpu_memory is None:
            remedy = "add the memory of one of its GPUs, as nvidia-smi shows it, such as 81559MiB"
            yield Problem(path=f"{path}.gpu_memory", message="is missing", remedy=remedy)


def _node(node_id: str, written: WrittenNode) -> Node:
    return Node(
        node_id=node_id,
        address=written.address,
        num_cpus=float(written.cpus),
        num_gpus=written.gpus,
        cores=tuple(range(written.cpus)),
        memory_bytes=written.memory,
        gpu_memory_bytes=written.gpu_memory,
        disk=None if written.disk is None else DiskFacts(problem="", free_bytes=written.disk),
    )

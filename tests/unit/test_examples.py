"""The examples in deploy/ fit the machines that they are written for, and no smaller ones."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from cluster.deployment.deployment_file import load_deployment
from cluster.deployment.schema import DeploymentFile
from cluster.errors import PlanError
from cluster.planning.inventory_file import read_inventory
from cluster.planning.plan import Inventory, Plan
from cluster.planning.planner import make_plan
from tests.helpers.real_shapes import CONFIGS, real_tensors, write_real_shapes

EXAMPLES = Path(__file__).parents[2] / "deploy" / "examples"
FILES = sorted(EXAMPLES.glob("*.yaml"))
NAMES = [path.name for path in FILES]
COMMAND = re.compile(r"^#   echelon plan (\S+) --inventory (\S+)$", flags=re.MULTILINE)
PUBLISHED = {  # parameters
    "Llama-3.1-8B-Instruct": 8_030_261_248,
    "Llama-3.3-70B-Instruct": 70_553_706_496,
    "Llama-3.2-1B-Instruct": 1_235_814_400,
    "Llama-3.2-3B-Instruct": 3_212_749_824,
    "Qwen3-32B": 32_762_123_264,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-1.7B": 1_720_574_976,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every model that an example names."""
    folder = tmp_path_factory.mktemp("models")
    for name in CONFIGS:
        write_real_shapes(folder / name)
    return folder


def inventory_of(example: Path) -> Inventory:
    """That of the command in the example's head."""
    found = COMMAND.search(example.read_text())
    assert found is not None
    assert found[1] == example.name
    return read_inventory(EXAMPLES / found[2])


def plan(example: Path, models: Path, inventory: Inventory, tmp_path: Path) -> Plan:
    file = tmp_path / "deployment.yaml"
    file.write_text(example.read_text().replace("/path/to", str(models)))
    return make_plan(load_deployment(file), inventory)


def test_the_models_have_as_many_parameters_as_those_that_were_published() -> None:
    found = {name: sum(map(math.prod, real_tensors(config).values())) for name, config in CONFIGS.items()}
    assert found == PUBLISHED


@pytest.mark.parametrize("example", FILES, ids=NAMES)
def test_an_example_uses_every_gpu_of_its_inventory(example: Path, models: Path, tmp_path: Path) -> None:
    inventory = inventory_of(example)
    made = plan(example, models, inventory, tmp_path)
    for node in inventory.nodes:
        assert sum(bundle.num_gpus for bundle in made.bundles if bundle.node_id == node.node_id) == node.num_gpus
    for replica in made.replicas:
        assert len({bundle.node_id for bundle in replica.bundles}) == 1, "a replica talks within one machine"
    assert not [note for note in made.notes if "startup_timeout_s" in note]


@pytest.mark.parametrize("example", FILES, ids=NAMES)
def test_an_example_does_not_fit_with_a_gpu_less(example: Path, models: Path, tmp_path: Path) -> None:
    inventory = inventory_of(example)
    first, *others = inventory.nodes
    smaller = replace(inventory, nodes=(replace(first, num_gpus=first.num_gpus - 1), *others))
    with pytest.raises(PlanError, match="no place for"):
        plan(example, models, smaller, tmp_path)


@pytest.mark.parametrize("example", FILES, ids=NAMES)
def test_the_lock_of_an_example_is_a_comment_that_is_valid(example: Path) -> None:
    text = example.read_text()
    opened = re.sub(r"^  # (?=(host|tls|auth):)", "  ", text, flags=re.MULTILINE)
    server = DeploymentFile.model_validate(yaml.safe_load(opened)).server
    assert server.tls is not None
    assert server.auth is not None
    assert DeploymentFile.model_validate(yaml.safe_load(text)).server.host == "127.0.0.1"


def test_every_inventory_is_that_of_an_example() -> None:
    used = {COMMAND.search(path.read_text())[2] for path in FILES}  # type: ignore[index]
    assert used == {str(path.relative_to(EXAMPLES)) for path in (EXAMPLES / "inventories").iterdir()}

"""The deployment files in the documents are valid; only their model folders do not exist."""

import re
import textwrap
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from cluster.deployment.deployment_file import load_deployment
from cluster.deployment.schema import DeploymentFile
from cluster.errors import ConfigError

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^( *)```yaml\n(.*?)^\1```", flags=re.DOTALL | re.MULTILINE)
SECTIONS = {"apiVersion": "echelon/v1", "kind": "Deployment", "name": "doc", "target": {"model": "/models/target"}}


def blocks() -> dict[str, str]:
    """Every YAML block of README and docs, by page and number."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return {
        f"{page.name}-{number}": textwrap.dedent(match[2])
        for page in pages
        for number, match in enumerate(FENCE.finditer(page.read_text()))
    }


BLOCKS = blocks()
WHOLE = {name: text for name, text in BLOCKS.items() if "apiVersion:" in text}


def test_the_documents_show_deployment_files() -> None:
    assert len(WHOLE) >= 6


@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_every_block_follows_the_schema(name: str) -> None:
    """A block that shows only some sections is completed with the required ones."""
    DeploymentFile.model_validate({**SECTIONS, **yaml.safe_load(BLOCKS[name])})


@pytest.mark.parametrize("name", sorted(WHOLE))
def test_only_the_models_of_a_whole_file_are_missing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    file = tmp_path / "deployment.yaml"
    file.write_text(WHOLE[name])
    with pytest.raises(ConfigError) as caught:
        load_deployment(file)
    assert {problem.path for problem in caught.value.problems} <= {"target.model", "draft.model"}


def test_an_unknown_key_is_found() -> None:
    with pytest.raises(ValidationError):
        DeploymentFile.model_validate({**SECTIONS, "speculation": {"windows": 4}})

"""Every model folder and deployment file in tests/corpus has the outcome that its case states."""

from pathlib import Path
from typing import Any

import pytest

from cluster.deployment.settings import Settings
from echelon.cli.app import main
from tests.helpers.corpus import read
from tests.helpers.folder_cases import DEPLOYMENT_CASES, FOLDER_CASES, write_deployment_case, write_folder_case
from tests.helpers.folder_oracle import Kind, outcome_of

EXIT_CODES = {Kind.SERVED: 0, Kind.REFUSED: 2}


def facts(settings: Settings) -> dict[str, Any]:
    return {
        "max_model_len": settings.max_model_len,
        "dtype": settings.target.dtype,
        "weight_bytes": settings.target.weight_bytes,
    }


def check(file: Path, expected: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    """What `plan` prints and its exit code; what it accepts is also loaded."""
    kind = Kind(expected["outcome"])
    outcome = outcome_of(file)
    assert outcome.kind is kind, outcome.text
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(file)])
    assert (ended.value.code or 0) == EXIT_CODES[kind]
    out, err = capfd.readouterr()
    said = " ".join((out if kind is Kind.SERVED else err).split())
    assert all(words in said for words in expected.get("says", [])), said
    if outcome.settings is not None:
        assert expected.get("settings", {}).items() <= facts(outcome.settings).items()


@pytest.mark.parametrize("name", FOLDER_CASES)
def test_model_folders(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    case = read(FOLDER_CASES[name])
    check(write_folder_case(case, tmp_path), case, capfd)


@pytest.mark.parametrize("name", DEPLOYMENT_CASES)
def test_deployment_files(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file, expected = write_deployment_case(name, tmp_path)
    check(file, expected, capfd)

"""A slice of tests/property/mutated_folders.py, the same in every run."""

from collections import Counter
from pathlib import Path

import pytest

from tests.helpers.folder_oracle import Kind
from tests.property.mutated_folders import Folders, run_case

SEED = 0
CASES_A_TEST = 30


@pytest.mark.parametrize("first", range(0, 150, CASES_A_TEST))
def test_damaged_folders_are_served_or_refused_with_a_message(first: int, tmp_path: Path) -> None:
    folders = Folders(tmp_path / "valid")
    cases = [run_case(number, SEED, folders, tmp_path / "case") for number in range(first, first + CASES_A_TEST)]
    faults = [
        f"case {case.number}: {case.changes}: {case.outcome.text}" for case in cases if case.outcome.kind is Kind.FAULT
    ]
    assert not faults, "\n".join(faults)
    kinds = Counter(case.outcome.kind for case in cases)
    assert kinds[Kind.SERVED] > 2, "hardly any damage is harmless: does the oracle still load anything?"
    assert kinds[Kind.REFUSED] > 10

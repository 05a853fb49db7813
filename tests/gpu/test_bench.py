"""The benchmark of the operators runs on a GPU, by the same code as on a CPU."""

import pytest

from bench.kernels import main

pytestmark = pytest.mark.gpu


def test_every_contender_runs(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--device", "cuda", "--quick", "--runs", "2"])
    text = capsys.readouterr().out
    assert "## MXFP4" in text
    assert "saved as" not in text

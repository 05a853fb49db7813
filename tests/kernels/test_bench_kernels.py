"""The benchmark of the operators runs and reports a number for every implementation."""

import re

import pytest

from bench.kernels import main

SECTIONS = ["Attention", "Verifying", "The other operators", "Products", "Sampling", "MXFP4"]
CONTENDERS = ["rms_norm", "fused_add_rms_norm", "silu_and_mul", "reshape_and_cache", "temperature", "torch: argmax"]


@pytest.mark.usefixtures("torch_threads")
def test_every_table_has_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--device", "cpu", "--quick", "--runs", "1", "--threads", "1"])
    text = capsys.readouterr().out
    assert re.search(r"Copies move \d+ GB/s", text)
    for section in SECTIONS:
        assert f"## {section}" in text
    for name in CONTENDERS:
        assert re.search(rf"\| {name} +\| \d+ \(\d+-\d+\)", text), name
    attention = re.findall(r"\dx +\|$", text, re.M)
    assert len(attention) == 3 + 1 + 1  # shapes, verifying, MXFP4
    assert "saved as" not in text

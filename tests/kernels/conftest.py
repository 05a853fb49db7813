from collections.abc import Iterator

import pytest
import torch

from kernels.native.linear import why_not


@pytest.fixture
def torch_threads() -> Iterator[None]:
    """Restores torch's number of threads after a test that sets it."""
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(params=["compiled", "torch"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test on both CPU implementations: the compiled kernels, and torch, which computes where they cannot be
    compiled."""
    name: str = request.param
    monkeypatch.setenv("ECHELON_COMPILE", "auto" if name == "compiled" else "off")
    if name == "compiled" and (reason := why_not()):
        pytest.skip(f"cannot be compiled here: {reason}")
    return name

from collections.abc import Iterator

import pytest
import torch

from kernels.native.linear import why_not


@pytest.fixture
def torch_threads() -> Iterator[None]:
    """Gives torch its number of threads back after a test that sets it."""
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(params=["compiled", "torch"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which of the two ways of a CPU computes: the compiled kernels, or what serves where they cannot be compiled."""
    name: str = request.param
    monkeypatch.setenv("ECHELON_COMPILE", "auto" if name == "compiled" else "off")
    if name == "compiled" and (reason := why_not()):
        pytest.skip(f"cannot be compiled here: {reason}")
    return name

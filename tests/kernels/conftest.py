from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def torch_threads() -> Iterator[None]:
    """Gives torch its number of threads back after a test that sets it."""
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)

"""Each Triton kernel, compared with its reference: on a GPU if there is one, else through Triton's interpreter.

The interpreter runs kernels on CPU tensors in a process that was started with TRITON_INTERPRET=1, as `make test` does.
In any other process without a GPU, there is nothing to test here. The interpreter's tl.dot is wrong for bfloat16, so
bfloat16 is tested on a GPU only.
"""

import pytest
import torch

from kernels.dispatch import INTERPRETED

ON_GPU = torch.cuda.is_available() and not INTERPRETED
collect_ignore_glob = [] if ON_GPU or INTERPRETED else ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if ON_GPU and "tests/triton" in item.path.as_posix():
            item.add_marker(pytest.mark.gpu)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with an argument `dtype` runs once for each floating dtype that can be tested on this machine."""
    if "dtype" in metafunc.fixturenames:
        dtypes = [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])]
        metafunc.parametrize("dtype", dtypes, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if ON_GPU else "cpu")

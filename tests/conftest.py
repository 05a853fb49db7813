"""What libraries read when they are imported, which is before any test.

One compute thread: several processes share a few cores, and spinning threads cost more than they give.
"""

import os
from collections.abc import Iterator

import pytest

import echelon.cli  # noqa: F401  # before grpc, as in a process of its own: the command keeps gRPC's core quiet

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def _warm_workers() -> Iterator[None]:
    from tests.helpers.warm_workers import warm_workers  # after the environment is set

    with warm_workers():
        yield

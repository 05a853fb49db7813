"""A worker that runs on kernels calls no operator of torch for which there is a kernel."""

from pathlib import Path

import pytest
import torch

from echelon.pb.process_pb2 import WorkerSpec
from tests.helpers.engines import TARGET, drive, engine_spec
from tests.helpers.hot_path import hot_rounds
from tests.helpers.launched import launched_by, replaced_operators
from tests.helpers.rounds import Driver
from tests.helpers.tiny_models import make_tiny_model
from workers.process.cohort import Cohort
from workers.process.load import load_engines


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("qwen3", tmp_path_factory.mktemp("tiny")).folder  # it has head norms as well


@pytest.fixture
def driver(folder: Path, device: torch.device) -> Driver:
    spec = WorkerSpec(rank=0, world_size=1, device=device.type, engines=[engine_spec(folder, TARGET)])
    return drive(load_engines(spec, Cohort(0, 1, None), lambda stage, done, total: None)[TARGET])


def test_rounds_call_only_our_kernels(driver: Driver) -> None:
    for name, step in hot_rounds(driver, [3, 1, 4, 1, 5, 9, 2]).items():
        launched = launched_by(step)
        assert launched.operators, "the profiler saw nothing"
        assert replaced_operators(launched.operators, vocab_size=driver.info.vocab_size) == [], name

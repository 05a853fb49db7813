"""A folder that cannot be the disk tier of a rank is refused in words of the deployment file."""

from pathlib import Path

import pytest
import torch

from echelon.pb.process_pb2 import EngineSpec, TierSpec
from workers.engine.kv_cache import KVLayout
from workers.process.tier_setup import open_store
from workers.tiers.folder import StoreError

LAYOUT = KVLayout(num_layers=3, block_size=4, num_kv_heads=2, head_dim=8, dtype=torch.float32)


def refusal(path: Path, *, num_bytes: int = 4 << 20) -> str:
    spec = EngineSpec(tiers=TierSpec(num_host_slots=1, disk_path=str(path), disk_bytes=num_bytes))
    with pytest.raises(StoreError) as caught:
        open_store(spec, LAYOUT, {"dtype": "float32"}, role="target", rank=0, num_ranks=1).close()
    return str(caught.value)


def test_a_path_that_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "kv"
    path.touch()
    assert refusal(path) == f"kv_cache.disk.path: {path} is a file; give a folder"


def test_a_folder_that_the_system_cannot_open(tmp_path: Path) -> None:
    spec = EngineSpec(tiers=TierSpec(num_host_slots=1, disk_path=str(tmp_path), disk_bytes=4 << 20))
    open_store(spec, LAYOUT, {"dtype": "float32"}, role="target", rank=0, num_ranks=1).close()
    lock = next(tmp_path.rglob("*/*/lock"))
    lock.unlink()
    lock.mkdir()
    message = refusal(tmp_path)
    assert message.startswith(f"kv_cache.disk.path: {lock.parent}")
    assert "Is a directory" in message


def test_bytes_for_less_than_two_segments(tmp_path: Path) -> None:
    assert refusal(tmp_path, num_bytes=100_000).startswith(
        "kv_cache.disk.bytes: 100,000 bytes for one rank hold no two segments"
    )

"""The file from which a controller learns what its predecessor kept up."""

from dataclasses import replace
from pathlib import Path

import pytest

from cluster.deployment.deployment_file import load_deployment
from cluster.deployment.settings import (
    AuthSettings,
    DiskSettings,
    KvCacheSettings,
    ServerSettings,
    Settings,
    TlsSettings,
)
from cluster.errors import StartError
from cluster.local import LocalDraft, local_settings
from cluster.on_ray.desired import DesiredState, load, save
from cluster.planning.inventory import inventory_of, machine_facts
from cluster.planning.planner import make_plan

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "models"


def made_draft() -> Settings:
    draft = LocalDraft(folder=MODELS / "demo-target", quantization="int4", num_layers=4)
    disk = DiskSettings(path="/var/lib/kv", bytes=1 << 30)
    server = ServerSettings(tls=TlsSettings(cert="c", key="k"), auth=AuthSettings(tokens_file="t"), gateways=2)
    return replace(
        local_settings(MODELS / "demo-target", draft=draft, batch_invariant=True, num_replicas=2),
        kv_cache=KvCacheSettings(device_bytes=1 << 24, cpu_bytes=1 << 20, disk=disk),
        server=server,
    )


def layer_parallel_draft() -> Settings:
    draft = LocalDraft(folder=MODELS / "demo-draft", layer_parallel_size=2)
    return local_settings(MODELS / "demo-target", tp_size=2, draft=draft)


@pytest.mark.parametrize(
    "settings", [load_deployment(ROOT / "deploy" / "demo.yaml"), made_draft(), layer_parallel_draft()]
)
def test_what_is_read_is_what_was_written(settings: Settings, tmp_path: Path) -> None:
    plan = make_plan(replace(settings, kv_cache=replace(settings.kv_cache, disk=None)), inventory_of(machine_facts()))
    desired = DesiredState(settings=settings, plan=plan, log_dir=tmp_path / "logs", timeout_s=5.0)
    save(replace(desired, timeout_s=1.0))
    save(desired)
    assert load(desired.path) == desired
    assert desired.path.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == [desired.path.name]


def test_a_deployment_that_has_never_served_has_no_file(tmp_path: Path) -> None:
    assert load(tmp_path / "desired.json") is None


def test_a_file_that_is_damaged_or_of_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "desired.json"
    path.write_text('{"settings": 1}')
    with pytest.raises(StartError, match=r"desired\.json cannot be read: .* run echelon down and up"):
        load(path)
    settings = load_deployment(ROOT / "deploy" / "demo.yaml")
    plan = make_plan(settings, inventory_of(machine_facts()))
    save(DesiredState(settings=settings, plan=plan, log_dir=tmp_path / "logs", timeout_s=5.0, version="0.0.1"))
    with pytest.raises(StartError, match=r"is of Echelon 0\.0\.1, this is"):
        load(path)

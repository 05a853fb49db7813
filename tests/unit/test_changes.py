"""What `echelon apply` finds between a deployment and its edited file."""

from dataclasses import replace
from pathlib import Path

import pytest

from cluster.deployment.changes import Effect, changes
from cluster.deployment.settings import KvCacheSettings, ScalingSettings, ServerSettings, Settings, TlsSettings
from cluster.local import LocalDraft, local_settings
from tests.helpers.model_folders import write_model_folder


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    folder = write_model_folder(tmp_path / "model")
    return local_settings(folder, draft=LocalDraft(folder=folder))


def found(old: Settings, new: Settings) -> list[tuple[str, str, str, bool]]:
    return [(change.key, change.old, change.new, change.effect is Effect.LIVE) for change in changes(old, new)]


def test_nothing_differs_from_itself(settings: Settings) -> None:
    assert changes(settings, settings) == []


def test_replicas_change_while_the_deployment_runs(settings: Settings) -> None:
    assert found(settings, replace(settings, num_replicas=3, max_replicas=3)) == [
        ("replicas.min", "1", "3", True),
        ("replicas.max", "1", "3", True),
    ]
    scaling = ScalingSettings(target_ongoing_requests=4, upscale_delay_s=1, downscale_delay_s=2)
    follows = replace(settings, scaling=scaling)
    assert found(settings, follows) == [("replicas.target_ongoing_requests", "none", "4", True)]
    slower = replace(follows, scaling=replace(scaling, downscale_delay_s=9))
    assert found(follows, slower) == [("replicas.downscale_delay_s", "2", "9", True)]
    with_tier = replace(settings, kv_cache=KvCacheSettings(cpu_bytes=1 << 30))
    assert found(with_tier, replace(with_tier, max_replicas=2)) == [("replicas.max", "1", "2", False)]


def test_other_keys_are_named_as_in_the_file(settings: Settings, tmp_path: Path) -> None:
    other = local_settings(write_model_folder(tmp_path / "other"), tp_size=2, draft=None)
    keys = {change.key for change in changes(settings, other)}
    assert {"target.model", "target.tensor_parallel_size", "draft", "speculation.method"} <= keys
    longer = replace(settings, scheduler=replace(settings.scheduler, max_model_len=64))
    assert {change.effect for change in [*changes(settings, other), *changes(settings, longer)]} == {Effect.ROLLED}
    server = ServerSettings(grpc_port=0, http_port=0, tls=TlsSettings(cert="c", key="k"))
    (change,) = changes(settings, replace(settings, server=server))
    assert (change.key, change.old, change.effect) == ("server.tls", "none", Effect.DOWN)


def test_what_a_draft_is_made_of_is_told_as_the_file_says_it(settings: Settings, tmp_path: Path) -> None:
    folder, small = tmp_path / "model", write_model_folder(tmp_path / "small", num_hidden_layers=1)

    def differences(old: LocalDraft, new: LocalDraft) -> list[tuple[str, str, str, bool]]:
        return found(local_settings(folder, draft=old), local_settings(folder, draft=new))

    plain, beneath = LocalDraft(folder=folder), LocalDraft(folder=folder, lower_folder=small)
    layers = settings.target.folder.config.num_layers
    whole = f"{folder}, layers: {layers}"
    assert differences(plain, beneath) == [("draft.draft.model", "none", f"{small}, layers: 1", False)]
    assert differences(beneath, replace(beneath, lower_folder=folder)) == [
        ("draft.draft.model", f"{small}, layers: 1", whole, False)
    ]
    assert differences(plain, replace(plain, lower_draft="suffix")) == [("draft.draft.method", "none", "suffix", False)]
    assert differences(beneath, replace(beneath, tp_size=2)) == [("draft.tensor_parallel_size", "1", "2", False)]
    assert differences(plain, replace(plain, quantization="int8")) == [
        ("draft.model", whole, f"{folder} in int8, layers: {layers}", False)
    ]


def test_keys_that_stand_for_two_settings_are_told_once(settings: Settings) -> None:
    folder = settings.target.folder.path
    in_fp8 = local_settings(folder, draft=LocalDraft(folder=folder), kv_cache=KvCacheSettings(dtype="fp8"))
    assert found(settings, in_fp8) == [("kv_cache.dtype", "auto", "fp8", False)]
    fixed = replace(settings, speculation=replace(settings.speculation, adaptive=False))
    assert found(settings, fixed) == [("speculation.num_speculative_tokens", "auto", "fixed", False)]

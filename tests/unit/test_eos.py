"""Which tokens end a stream, and what the plan says about them."""

import json
from pathlib import Path
from typing import Any

import pytest

from checkpoint.eos import EosToken
from checkpoint.errors import LoadError
from checkpoint.folder import read_model_folder
from cluster.deployment.deployment_file import load_deployment
from cluster.planning.inventory import MachineFacts, inventory_of
from cluster.planning.planner import make_plan
from cluster.processes.specs import scheduler_spec
from echelon.pb import process_pb2
from gateway.requests.tokenization import PromptTokenizer
from tests.helpers.model_folders import write_model_folder

EOS_OBJECT = {"__type": "AddedToken", "content": "</s>", "lstrip": False, "special": True}


def eos_of(
    path: Path, *, config: Any = None, generation: Any = None, vocab_size: int = 100, **tokenizer_config: Any
) -> list[tuple[int, list[str]]]:
    """EOS ids of a folder with these values of eos_token_id and this tokenizer_config.json, with the files that name
    them."""
    folder = write_model_folder(path / "target", eos_token_id=config, vocab_size=vocab_size)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    if tokenizer_config:
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return [(token.token_id, list(token.files)) for token in read_model_folder(folder).eos]


def test_generation_config_comes_before_config(tmp_path: Path) -> None:
    assert eos_of(tmp_path, config=4, generation=[2, 5]) == [
        (2, ["generation_config.json"]),
        (5, ["generation_config.json"]),
    ]


def test_config_counts_if_generation_config_says_nothing(tmp_path: Path) -> None:
    assert eos_of(tmp_path, config=4) == [(4, ["config.json"])]


@pytest.mark.parametrize("eos", ["</s>", EOS_OBJECT])
def test_the_tokenisers_own_eos_always_counts(tmp_path: Path, eos: Any) -> None:
    assert eos_of(tmp_path, config=[4, 2], eos_token=eos) == [
        (4, ["config.json"]),
        (2, ["config.json", "tokenizer_config.json"]),
    ]


def test_the_older_file_of_special_tokens_counts_too(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "target", eos_token_id=None)
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>"}))
    assert read_model_folder(folder).eos == (EosToken(token_id=2, text="</s>", files=("special_tokens_map.json",)),)


def test_a_token_that_the_model_cannot_choose_does_not_count(tmp_path: Path) -> None:
    assert eos_of(tmp_path, config=2, eos_token="<|new|>", vocab_size=6) == [(2, ["config.json"])]


@pytest.mark.parametrize("eos", [100, -1, 2.5, "2", [2, None], True])
def test_an_invalid_id_is_refused(tmp_path: Path, eos: Any) -> None:
    with pytest.raises(LoadError, match=r"generation_config\.json.*eos_token_id"):
        eos_of(tmp_path, config=2, generation=eos)


def test_every_process_stops_at_the_tokens_of_the_plan(tmp_path: Path) -> None:
    eos_of(tmp_path, config=None, eos_token="</s>")
    settings, plan = planned(tmp_path)
    spec = scheduler_spec(settings, process=plan.replicas[0].scheduler, target=process_pb2.GroupEndpoint(), draft=None)
    assert list(spec.eos_token_ids) == [token.token_id for token in plan.eos] == [2]
    assert PromptTokenizer(tmp_path / "target").eos_token_ids(settings.target.folder.config.vocab_size) == [2]
    assert plan.notes == ()


def test_the_plan_warns_if_nothing_ends_a_text(tmp_path: Path) -> None:
    eos_of(tmp_path, config=None)
    _, plan = planned(tmp_path)
    assert plan.eos == ()
    (note,) = plan.notes
    assert "every stream runs to max_tokens" in note
    assert "set eos_token_id in generation_config.json" in note


def planned(path: Path) -> tuple[Any, Any]:
    file = path / "a.yaml"
    file.write_text("apiVersion: echelon/v1\nkind: Deployment\nname: a\ndevice: cpu\ntarget: {model: target}\n")
    settings = load_deployment(file)
    return settings, make_plan(settings, inventory_of(MachineFacts(cores=(0, 1), memory_bytes=None, gpus=())))

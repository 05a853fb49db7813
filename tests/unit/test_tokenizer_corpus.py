"""Every tokeniser and pair in tests/corpus has the outcome that its case states."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from checkpoint.token_table import TokenTable
from checkpoint.tokenizer import load_tokenizer
from checkpoint.tokenizer_pair import compare_tokenizers
from cluster.deployment.deployment_file import load_deployment
from cluster.errors import ConfigError
from scheduler.requests.detokenizer import Detokenizer
from tests.helpers.corpus import CORPUS, PAIRS, TOKENIZERS, changed, read, tokenizers_that
from tests.helpers.model_folders import write_model_folder

DEPLOYMENT = "apiVersion: echelon/v1\nkind: Deployment\nname: a\ndevice: cpu\ntarget: {model: target}\n"


def folder_of(name: str, path: Path) -> Path:
    """A model folder with that tokeniser."""
    write_model_folder(path)
    (path / "tokenizer.json").unlink()
    shutil.copytree(TOKENIZERS[name], path, dirs_exist_ok=True)
    return path


@pytest.mark.parametrize("name", tokenizers_that("texts"))
def test_texts_get_the_same_ids_as_in_transformers(name: str) -> None:
    ours = load_tokenizer(TOKENIZERS[name])
    theirs = PreTrainedTokenizerFast.from_pretrained(TOKENIZERS[name])
    for case in read(TOKENIZERS[name] / "expected.json")["texts"]:
        assert theirs(case["text"]).input_ids == case["ids"], case["text"]
        assert ours.encode(case["text"]).ids == case["ids"], case["text"]


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("name", tokenizers_that("texts"))
def test_streams_give_the_same_text_as_transformers(name: str, skip: bool) -> None:
    table = TokenTable(load_tokenizer(TOKENIZERS[name]))
    theirs = PreTrainedTokenizerFast.from_pretrained(TOKENIZERS[name])
    for case in read(TOKENIZERS[name] / "expected.json")["texts"]:
        detokenizer = Detokenizer(table, skip_special_tokens=skip, follows_text=False)
        text = "".join(map(detokenizer.push, case["ids"])) + detokenizer.flush()
        assert text == theirs.decode(case["ids"], skip_special_tokens=skip)


def broken() -> Iterator[tuple[str, str]]:
    """Names of tokenisers, and the roles in which each cannot be used."""
    for name in tokenizers_that("error"):
        expected = read(TOKENIZERS[name] / "expected.json")
        yield from ((name, role) for role in ("target", "draft") if expected.get("role", role) == role)


@pytest.mark.parametrize(("name", "role"), list(broken()))
def test_broken_files_are_found_by_the_plan(name: str, role: str, tmp_path: Path) -> None:
    words = read(TOKENIZERS[name] / "expected.json")["error"]
    for folder in {"target", role}:
        folder_of(name, tmp_path / folder) if folder == role else write_model_folder(tmp_path / folder)
    (tmp_path / "a.yaml").write_text(DEPLOYMENT + ("draft: {model: draft}\n" if role == "draft" else ""))
    with pytest.raises(ConfigError) as caught:
        load_deployment(tmp_path / "a.yaml")
    (problem,) = caught.value.problems
    assert (problem.path, problem.value, problem.line) == (f"{role}.model", f"'{role}'", 5 + (role == "draft"))
    assert all(word in problem.message for word in words), problem.message
    assert problem.remedy


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name: str) -> None:
    case = read(PAIRS[name])
    target = load_tokenizer(TOKENIZERS[case["target"]])
    content = changed(read(TOKENIZERS[case["draft"]] / "tokenizer.json"), case)
    report = compare_tokenizers(target, Tokenizer.from_str(json.dumps(content)))
    if case["problem"] is None:
        assert report.problem is None
    else:
        assert re.search(case["problem"], report.problem or "")
    said = " ".join(report.notes)
    assert all(words in said for words in case["notes"]), said
    assert bool(report.notes) == bool(case["notes"]), said


def test_cases_are_small() -> None:
    assert all(path.stat().st_size < 30_000 for path in CORPUS.rglob("*") if path.is_file())

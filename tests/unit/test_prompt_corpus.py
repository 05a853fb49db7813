"""Every case in tests/corpus/templates and tests/corpus/requests has the outcome that its file states."""

import json
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from echelon.client import GenerateOptions
from echelon.pb import inference_pb2 as pb
from echelon.pb.process_pb2 import GatewaySpec
from echelon.requests import build_request
from gateway.requests.refusal import Refusal
from gateway.requests.validation import RequestValidator, build_validator
from tests.helpers.demo_folders import MODEL_DIR, make_folder

CORPUS = Path(__file__).parents[1] / "corpus"
CONVERSATIONS = sorted((CORPUS / "templates").glob("*/*.json"))
REQUESTS = sorted((CORPUS / "requests").glob("*.json"))
_OPTIONS = ("add_generation_prompt", "continue_final_message", "chat_template_kwargs")


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def validator_of(folder: Path, *, max_model_len: int) -> RequestValidator:
    return build_validator(
        GatewaySpec(model_name="demo", model_dir=str(folder), max_model_len=max_model_len, vocab_size=4096)
    )


@pytest.fixture(scope="module")
def theirs() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.mark.parametrize("path", CONVERSATIONS, ids=name_of)
def test_a_conversation_becomes_the_same_text_as_in_transformers(
    path: Path, tmp_path: Path, theirs: PreTrainedTokenizerBase
) -> None:
    """This covers the whole way from the client's arguments to token ids."""
    case = json.loads(path.read_text())
    template = path.parent.with_suffix(".jinja").read_text(encoding="utf-8")
    options: GenerateOptions = {name: case[name] for name in _OPTIONS if name in case}  # type: ignore[assignment]
    data = build_request(case["messages"], options).SerializeToString()
    validator = validator_of(make_folder(tmp_path, jinja=template), max_model_len=4096)
    if "error" in case:
        with pytest.raises(Refusal) as refused:
            validator.read(data)
        assert case["error"] in refused.value.message
        return
    adds = case.get("add_generation_prompt", not case.get("continue_final_message", False))
    rendered = theirs.apply_chat_template(
        case["messages"],
        chat_template=template,
        tokenize=False,
        add_generation_prompt=adds,
        continue_final_message=case.get("continue_final_message", False),
        **case.get("chat_template_kwargs", {}),
    )
    assert rendered == case["text"], "the file is wrong, or transformers has changed"
    expected: Any = theirs(case["text"], add_special_tokens=False)["input_ids"]
    assert list(validator.read(data).prompt_token_ids) == expected


@pytest.fixture(scope="module")
def validator() -> RequestValidator:
    return validator_of(MODEL_DIR, max_model_len=64)


@pytest.mark.parametrize("path", REQUESTS, ids=lambda path: path.stem)
def test_a_request_is_served_or_refused_as_its_file_says(path: Path, validator: RequestValidator) -> None:
    case = json.loads(path.read_text())
    if "bytes" in case:
        data = bytes.fromhex(case["bytes"]) * case.get("times", 1)
    else:
        data = json_format.ParseDict(case["request"], pb.GenerateRequest()).SerializeToString()
    if case["outcome"] == "OK":
        submit = json_format.MessageToDict(validator.read(data), preserving_proto_field_name=True)
        fields = {**submit, **submit["sampling"]}
        assert {name: fields[name] for name in case["submit"]} == case["submit"]
        return
    with pytest.raises(Refusal) as refused:
        validator.read(data)
    assert refused.value.code.name == case["outcome"]
    assert case["says"] in refused.value.message

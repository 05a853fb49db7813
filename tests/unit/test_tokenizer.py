"""A folder's tokeniser equals the one that transformers builds from it, whichever files say what."""

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from checkpoint.tokenizer import load_tokenizer
from cluster.deployment.deployment_file import load_deployment
from tests.helpers.model_folders import TOKENS, write_model_folder
from tests.helpers.tiny_tokenizers import KINDS

MODEL_DIR = Path(__file__).parents[2] / "models" / "demo-target"
SAVED = {kind: build().to_str() for kind, build in KINDS.items()}
TEXTS = ["a <im>b<end> c", "<a b>  x [X] <tool> b <|start|>a</s>", "hello <s>hello ab  <im>  hello", "x<im>y <left> a"]
NEW_TOKENS = ["<im>", "<end>", "<a b>", "[X]", "\u2581x"]
OLD_TOKENS = ["<tool>", "<|start|>", "<s>", "</s>", "a"]
NAMES = ["bos_token", "eos_token", "pad_token", "image_token"]
FLAGS = st.fixed_dictionaries({flag: st.booleans() for flag in ("lstrip", "rstrip", "normalized", "single_word")})


@st.composite
def side_files(draw: Callable[..., Any]) -> dict[str, Any]:
    """A tokenizer_config.json that gives all its tokens the same flags."""
    flags = {text: draw(FLAGS) for text in NEW_TOKENS}
    some_tokens = st.lists(st.sampled_from(NEW_TOKENS), unique=True, max_size=3)
    config: dict[str, Any] = {
        name: draw(st.sampled_from(NEW_TOKENS + OLD_TOKENS)) for name in draw(st.sets(st.sampled_from(NAMES)))
    }
    if draw(st.booleans()):
        first_id = draw(st.integers(0, 400))
        numbered = [{"content": text, **flags[text], "special": draw(st.booleans())} for text in draw(some_tokens)]
        config["added_tokens_decoder"] = {str(first_id + 3 * index): token for index, token in enumerate(numbered)}
    key = draw(st.sampled_from(["additional_special_tokens", "extra_special_tokens"]))
    config[key] = [
        {"__type": "AddedToken", "content": text, **flags[text], "special": True} for text in draw(some_tokens)
    ]
    return config | {"split_special_tokens": draw(st.booleans())}


@pytest.mark.parametrize("kind", KINDS)
@given(side_files())
@settings(max_examples=25, deadline=None)
def test_side_files_mean_the_same_as_in_transformers(kind: str, config: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tokenizer.json").write_text(SAVED[kind])
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        ours, theirs = load_tokenizer(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    for text in TEXTS:
        token_ids = theirs(text).input_ids
        assert ours.encode(text).ids == token_ids
        assert ours.decode(token_ids) == theirs.decode(token_ids, skip_special_tokens=True)
    assert ours.encode(TEXTS[0], add_special_tokens=False).ids == theirs(TEXTS[0], add_special_tokens=False).input_ids


def test_tokens_of_tokenizer_config_alone(tmp_path: Path) -> None:
    """Without them, each became about eight pieces."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL_DIR / name, tmp_path)
    file = tmp_path / "tokenizer_config.json"
    token = {"special": True, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    added = {str(4096 + i): {"content": text, **token} for i, text in enumerate(["<|im_start|>", "<|im_end|>"])}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"added_tokens_decoder": added}))
    text = "<|im_start|>user\nhi<|im_end|>"
    assert load_tokenizer(tmp_path).encode(text).ids == [0, 4096, 1550, 199, 3058, 4097]
    assert AutoTokenizer.from_pretrained(tmp_path)(text).input_ids == [0, 4096, 1550, 199, 3058, 4097]


def test_truncation_and_padding_from_training_are_off(tmp_path: Path) -> None:
    tokenizer = KINDS["byte_level"]()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=100)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode("a b c d e f").ids == KINDS["byte_level"]().encode("a b c d e f").ids


def test_the_plan_says_which_tokens_a_model_cannot_take(tmp_path: Path) -> None:
    write_model_folder(tmp_path / "target", vocab_size=5)
    write_model_folder(tmp_path / "draft", vocab_size=4, tokens=(*TOKENS, "ba"))
    models = "target: {model: target}\ndraft: {model: draft}\n"
    (tmp_path / "a.yaml").write_text(f"apiVersion: echelon/v1\nkind: Deployment\nname: a\ndevice: cpu\n{models}")
    beyond, different, unknown = load_deployment(tmp_path / "a.yaml").notes
    assert "1 token ('ab') beyond its vocab_size of 5: a prompt that holds one is refused" in beyond
    assert "(1 in the draft alone): token 6 is missing in the target and 'ba' in the draft" in different
    assert "no embedding for 2 tokens ('b', ...) of the target (its vocab_size is 4)" in unknown


def test_the_plan_says_where_an_id_differs_from_the_file(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "target")
    added = {"2": {"content": "</s>"}, "9": {"content": "<new>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    (tmp_path / "a.yaml").write_text(
        "apiVersion: echelon/v1\nkind: Deployment\nname: a\ndevice: cpu\ntarget: {model: target}\n"
    )
    (note,) = load_deployment(tmp_path / "a.yaml").notes
    assert "'<new>' is 6, not 9" in note
    assert PreTrainedTokenizerFast.from_pretrained(folder).convert_tokens_to_ids("<new>") == 6

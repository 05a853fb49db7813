"""The bundled demo pair loads, fits and speaks Python; the pure parts of its training do what they say."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors")

MODELS = Path(__file__).parents[2] / "models"
TARGET, DRAFT = MODELS / "demo-target", MODELS / "demo-draft"

# Written for this test, so neither model has seen it.
SNIPPET = '''import os


class LineCounter:
    """Count the lines of the files in a directory."""

    def __init__(self, root, encoding="utf-8"):
        self.root = root
        self.encoding = encoding
        self.counts = {}

    def count(self, name):
        """Return the number of lines of one file."""
        path = os.path.join(self.root, name)
        if not os.path.exists(path):
            raise ValueError("no such file: %r" % path)
        with open(path, encoding=self.encoding) as f:
            self.counts[name] = sum(1 for line in f)
        return self.counts[name]
'''


@pytest.fixture(scope="module")
def beside_the_script() -> Iterator[None]:
    """Makes modules importable as they are when the script runs."""
    sys.path.insert(0, str(MODELS))
    yield
    sys.path.remove(str(MODELS))


@pytest.fixture(scope="module")
def script(beside_the_script: None) -> ModuleType:
    return importlib.import_module("train_demo")


@pytest.fixture(scope="module")
def text(beside_the_script: None) -> ModuleType:
    return importlib.import_module("demo_text")


@pytest.fixture(scope="module")
def tokenizer() -> transformers.PreTrainedTokenizerBase:
    return transformers.AutoTokenizer.from_pretrained(TARGET)


@pytest.fixture(scope="module")
def target() -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def draft() -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(DRAFT, dtype=torch.float32).eval()


def snippet_ids(tokenizer: transformers.PreTrainedTokenizerBase) -> torch.Tensor:  # [1, num_tokens]
    return tokenizer(SNIPPET, return_tensors="pt")["input_ids"]


# --------------------------------------------------------------------------------------------------- folders


def test_weights_are_bf16_and_small() -> None:
    files = [folder / "model.safetensors" for folder in (TARGET, DRAFT)]
    assert sum(file.stat().st_size for file in files) < 24e6
    for file in files:
        with safetensors.safe_open(file, framework="pt") as weights:
            assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}  # noqa: SIM118


@pytest.mark.parametrize("folder", [TARGET, DRAFT], ids=lambda folder: folder.name)
def test_every_tensor_parallel_size_divides_the_shapes(folder: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(folder)
    for tp_size in (1, 2, 4):
        sizes = (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size, config.vocab_size)
        assert all(size % tp_size == 0 for size in sizes)


def test_generation_ends_at_the_end_of_text_token() -> None:
    for folder in (TARGET, DRAFT):
        config = transformers.GenerationConfig.from_pretrained(folder)
        assert (config.bos_token_id, config.eos_token_id) == (0, 0)


# ------------------------------------------------------------------------------------------------- tokenizer


def test_both_models_share_one_tokenizer() -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (TARGET / name).read_bytes() == (DRAFT / name).read_bytes()


@pytest.mark.parametrize("text", [SNIPPET, "s = 'na\u00efve \u6f22\u5b57 \U0001f40d'\n\tpass\r\n", " ", ""])
def test_tokenizer_round_trip(tokenizer: transformers.PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id == tokenizer.eos_token_id == 0
    assert 0 not in ids[1:]
    assert len(tokenizer) == 4096
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_chat_is_the_messages_text(tokenizer: transformers.PreTrainedTokenizerBase) -> None:
    messages = [{"role": "user", "content": "import os"}, {"role": "user", "content": "import sys"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<|endoftext|>import os\nimport sys\n"


# ---------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("name", ["target", "draft"])
def test_new_python_source_is_likely(
    request: pytest.FixtureRequest, tokenizer: transformers.PreTrainedTokenizerBase, name: str
) -> None:
    model, ids = request.getfixturevalue(name), snippet_ids(tokenizer)
    with torch.inference_mode():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert loss < 4.0  # a uniform guess has log(4096) = 8.3


def test_draft_agrees_with_most_of_the_targets_greedy_tokens(
    tokenizer: transformers.PreTrainedTokenizerBase,
    target: transformers.PreTrainedModel,
    draft: transformers.PreTrainedModel,
) -> None:
    prompt, num_tokens = snippet_ids(tokenizer), 48
    text = target.generate(prompt, max_new_tokens=num_tokens, min_new_tokens=num_tokens)
    with torch.inference_mode():
        predicted = draft(input_ids=text[:, :-1]).logits.argmax(-1)
    agreement = (predicted[:, -num_tokens:] == text[:, -num_tokens:]).float().mean().item()
    assert agreement > 0.6


# ---------------------------------------------------------------------------------------------------- script


def test_python_files_skips_what_is_not_the_library(text: ModuleType, tmp_path: Path) -> None:
    contents = {
        "a.py": b"a = 1\n",
        "pkg/b.py": b"# -*- coding: latin-1 -*-\nb = '\xe9'\n",
        "site-packages/c.py": b"c = 1\n",
        "_sysconfigdata_linux.py": b"d = 1\n",
        "broken.py": b"\xff\xfe",
        "empty.py": b"",
        "table.py": b"#" * (text.MAX_FILE_CHARS + 1),
    }
    for path, content in contents.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(content)
    files = dict(text.python_files(tmp_path))
    assert files == {"a.py": "a = 1\n", "pkg/b.py": "# -*- coding: latin-1 -*-\nb = '\u00e9'\n"}


def test_deduplicate_keeps_the_first_of_each_path_and_content(text: ModuleType) -> None:
    files = [("a.py", "one"), ("b.py", "two"), ("a.py", "newer"), ("moved/b.py", "two"), ("c.py", "three")]
    assert text.deduplicate(files) == {"a.py": "one", "b.py": "two", "c.py": "three"}


def test_split_follows_the_name_and_not_the_folder(text: ModuleType) -> None:
    names = [f"module{i}.py" for i in range(2000)]
    held_out = [name for name in names if text.is_held_out(name)]
    assert 0.02 < len(held_out) / len(names) < 0.06
    assert all(text.is_held_out(f"some/folder/{name}") for name in held_out)


def test_packages_are_split_one_by_one(text: ModuleType) -> None:
    assert {text.is_held_out(f"package{i}/__init__.py") for i in range(500)} == {True, False}


def test_load_corpus_holds_out_files_of_the_first_source_only(text: ModuleType, tmp_path: Path) -> None:
    held = [name for name in (f"m{i}.py" for i in range(300)) if text.is_held_out(name)]
    for source, path in [("first", held[0]), ("first", "m0.py"), ("second", held[1]), ("second", f"moved/{held[0]}")]:
        file = tmp_path / source / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{source} {path}")
    corpus = text.load_corpus([tmp_path / "first", tmp_path / "second"])
    assert (set(corpus.held_out), set(corpus.train)) == ({held[0]}, {"m0.py"} - set(held))


def test_pack_marks_each_files_start(text: ModuleType, tokenizer: transformers.PreTrainedTokenizerBase) -> None:
    ids = text.pack(["import os\n", "x = 1\n"], tokenizer.backend_tokenizer).tolist()
    assert ids[0] == 0
    assert ids.count(0) == 2
    assert tokenizer.decode(ids) == "<|endoftext|>import os\n<|endoftext|>x = 1\n"


def test_batches_visit_every_window_once_an_epoch(script: ModuleType) -> None:
    length, rows_per_batch = 512, 8
    batches = script.Batches(torch.arange(2 * rows_per_batch * length + length), rows_per_batch * length)
    rows = torch.cat([batches.draw(length) for _ in range(2)])
    assert rows.shape == (2 * rows_per_batch, length + 1)
    assert torch.equal(rows, rows[:, :1] + torch.arange(length + 1))
    assert len(set(rows[:, 0].tolist())) == len(rows)


def test_batches_need_enough_tokens(script: ModuleType) -> None:
    with pytest.raises(ValueError, match="too few"):
        script.Batches(torch.arange(300), 1024).draw(256)


def test_learning_rate_warms_up_holds_and_ends_at_zero(script: ModuleType) -> None:
    assert [script.lr_scale(progress) for progress in (0.0, 0.01, 0.2, 0.7, 1.0)] == pytest.approx([0, 0.5, 1, 0.5, 0])

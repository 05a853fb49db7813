"""The text that the demo pair learns from, and its tokenizer."""

from __future__ import annotations

import hashlib
import json
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

END_OF_TEXT = "<|endoftext|>"  # precedes every file, so it is both bos and eos
END_OF_TEXT_ID = 0
VOCAB_SIZE = 4096
MAX_POSITIONS = 2048
HELD_OUT_SHARE = 0.04
MAX_FILE_CHARS = 200_000  # the library's longer files are generated tables and prose
EXCLUDED_PARTS = frozenset({"site-packages", "__pycache__", "encodings", "pydoc_data"})  # not the library, or tables
TEST_PARTS = frozenset({"test", "tests", "idle_test"})
# A code completer's chat is the messages' text, one after another.
CHAT_TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] + '\\n' }}{% endfor %}"


@dataclass(frozen=True, slots=True)
class Corpus:
    """Source text by relative path, split by file."""

    train: dict[str, str] = field(default_factory=dict)
    held_out: dict[str, str] = field(default_factory=dict)


def python_files(root: Path) -> Iterator[tuple[str, str]]:
    """(relative path, text) of each library file under `root`, in the order of the paths."""
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        # _sysconfigdata names the folders of the machine that built the interpreter.
        if EXCLUDED_PARTS.intersection(relative.parts) or path.name.startswith("_sysconfigdata"):
            continue
        try:
            with tokenize.open(path) as file:
                text = file.read(MAX_FILE_CHARS + 1)
        except (SyntaxError, UnicodeDecodeError):
            continue  # the library's tests hold files that are broken on purpose
        if 0 < len(text) <= MAX_FILE_CHARS:
            yield relative.as_posix(), text


def deduplicate(files: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Keeps the first file of each path and of each content: a later source only adds what is new."""
    kept: dict[str, str] = {}
    seen: set[bytes] = set()
    for path, text in files:
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
        if path not in kept and digest not in seen:
            kept[path] = text
            seen.add(digest)
    return kept


def is_held_out(path: str) -> bool:
    """Goes by the file's name alone: versions of Python move files between folders, and the copies must not leak."""
    parts = PurePosixPath(path).parts
    name = "/".join(parts[-2:]) if parts[-1].startswith("__") else parts[-1]  # every package has an __init__.py
    fraction = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32
    return fraction < HELD_OUT_SHARE


def is_test(path: str) -> bool:
    return bool(TEST_PARTS.intersection(PurePosixPath(path).parts))


def load_corpus(sources: list[Path]) -> Corpus:
    """Trains on all sources; measures on the first one's held-out files."""
    corpus = Corpus()
    first_paths = {path for path, _ in python_files(sources[0])}
    for path, text in deduplicate(file for root in sources for file in python_files(root)).items():
        if not is_held_out(path):
            corpus.train[path] = text
        elif path in first_paths:
            corpus.held_out[path] = text
    return corpus


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Byte-level BPE; encoding puts the end-of-text token in front, where every training file has it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, END_OF_TEXT_ID)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()  # all 256 bytes, so that every text can be encoded
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_POSITIONS,
    }
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def pack(texts: Iterable[str], tokenizer: Tokenizer) -> Tensor:  # [num_tokens]
    """All files in one stream, each after its end-of-text token."""
    encodings = tokenizer.encode_batch(list(texts))
    return torch.tensor([token for encoding in encodings for token in encoding.ids], dtype=torch.long)

"""The tokens that end a text, and who says so."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from checkpoint.fields import Fields
from checkpoint.json_files import read_optional_json_object
from checkpoint.side_files import read_side_files


@dataclass(frozen=True, slots=True, kw_only=True)
class EosToken:
    token_id: int
    text: str  # as the tokeniser writes it; empty where it has no such token
    files: tuple[str, ...]  # that name it


def read_eos_tokens(folder: Path, tokenizer: Tokenizer, vocab_size: int) -> tuple[EosToken, ...]:
    """What generation_config.json lists as eos_token_id, where chat models have the tokens that end a turn, else
    config.json; and always the tokeniser's own eos_token, as vLLM does it. `tokenizer` is the folder's.

    Raises LoadError.
    """
    files: dict[int, list[str]] = {}
    for token_id, file in (*_configured(folder, vocab_size), *_of_tokenizer(folder, tokenizer, vocab_size)):
        files.setdefault(token_id, []).append(file)
    return tuple(
        EosToken(token_id=token_id, text=tokenizer.id_to_token(token_id) or "", files=tuple(names))
        for token_id, names in files.items()
    )


def _configured(folder: Path, vocab_size: int) -> Iterator[tuple[int, str]]:
    for name in ("generation_config.json", "config.json"):
        fields = Fields(name, read_optional_json_object(folder / name))
        eos = fields.get("eos_token_id")
        if eos is None:
            continue
        ids = eos if isinstance(eos, list) else [eos]
        if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < vocab_size for i in ids):
            raise fields.wrong("eos_token_id", f"an integer from 0 to {vocab_size - 1} (vocab_size), or such a list")
        yield from ((token_id, name) for token_id in dict.fromkeys(ids))
        return


def _of_tokenizer(folder: Path, tokenizer: Tokenizer, vocab_size: int) -> Iterator[tuple[int, str]]:
    side_files = read_side_files(folder)
    token = side_files.named.get("eos_token")
    token_id: int | None = None if token is None else tokenizer.token_to_id(token.content)
    if token_id is not None and token_id < vocab_size:  # beyond it is none that the model can choose
        yield token_id, side_files.file_of["eos_token"]

"""Log-probabilities in the shapes of OpenAI's two APIs, as columns of JSON that grow with the output."""

import asyncio
import json
from collections.abc import Sequence

from echelon.pb.reading_pb2 import Echo
from echelon.pb.sampling_pb2 import PositionLogprobs, TokenLogprob
from gateway.doors.json_text import AT_ONCE, Written, as_list

Columns = dict[str, list[str]]  # by the name of the field; the JSON of each position
_LEAST_LOGPROB = -9999.0  # JSON knows no infinity


def write_columns(columns: Columns) -> dict[str, Written] | None:
    return {name: as_list(column) for name, column in columns.items()} or None


def extend_columns(columns: Columns, more: Columns) -> None:
    for name, column in more.items():
        columns.setdefault(name, []).extend(column)


def chat_columns(positions: Sequence[PositionLogprobs]) -> Columns:
    return {"content": [json.dumps(_chat_position(position)) for position in positions]}


def completion_columns(positions: Sequence[PositionLogprobs], start: int) -> Columns:
    """`start` is where the first of these tokens begins, in characters."""
    columns: Columns = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for position in positions:
        columns["tokens"].append(json.dumps(position.chosen.text))
        columns["token_logprobs"].append(json.dumps(_finite(position.chosen.logprob)))
        columns["top_logprobs"].append(json.dumps(_by_text(position)))
        columns["text_offset"].append(str(start))
        start += len(position.chosen.text)
    return columns


async def prompt_columns(echo: Echo, positions: Sequence[PositionLogprobs]) -> Columns:
    """Those of a completion for the prompt that it echoes, written with pauses, as a prompt can be long."""
    columns: Columns = {
        "tokens": [json.dumps(echo.first_token)],
        "token_logprobs": ["null"],
        "top_logprobs": ["null"],
        "text_offset": ["0"],
    }
    start = len(echo.first_token) if echo.text.startswith(echo.first_token) else 0  # a BOS is not in a client's text
    for begin in range(1, len(positions), AT_ONCE):
        some = positions[begin : begin + AT_ONCE]
        extend_columns(columns, completion_columns(some, start))
        start += num_chars(some)
        await asyncio.sleep(0)
    return columns


def num_chars(positions: Sequence[PositionLogprobs]) -> int:
    return sum(len(position.chosen.text) for position in positions)


def prompt_position(position: PositionLogprobs) -> str:
    """As vLLM writes it: by token id; null for the first token."""
    if not position.HasField("chosen"):
        return "null"
    by_id = {candidate.token_id: candidate for candidate in (*position.top, position.chosen)}
    return json.dumps({str(token_id): _prompt_token(candidate) for token_id, candidate in by_id.items()})


def _prompt_token(token: TokenLogprob) -> dict[str, object]:
    return {"logprob": _finite(token.logprob), "rank": token.rank or None, "decoded_token": token.text}


def _chat_position(position: PositionLogprobs) -> dict[str, object]:
    return {**_chat_token(position.chosen), "top_logprobs": [_chat_token(token) for token in position.top]}


def _chat_token(token: TokenLogprob) -> dict[str, object]:
    return {"token": token.text, "logprob": _finite(token.logprob), "bytes": list(token.text.encode())}


def _by_text(position: PositionLogprobs) -> dict[str, float]:
    """The likeliest tokens and the chosen one; of tokens with one text the likelier."""
    by_text: dict[str, float] = {}
    for token in (*position.top, position.chosen):
        by_text.setdefault(token.text, _finite(token.logprob))
    return by_text


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST_LOGPROB)

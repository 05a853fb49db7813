"""When a seq ends, and which text its tokens become."""

from collections.abc import Iterable
from dataclasses import dataclass

from echelon.pb import inference_pb2
from scheduler.detokenizer import Detokenizer

__all__ = ["Finish", "OutputText", "StopRules", "StopStrings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    reason: "inference_pb2.FinishReason.ValueType"
    stop_str: str = ""
    stop_token_id: int | None = None


class StopStrings:
    """Tables that find stop strings in a stream of characters (Knuth, Morris, Pratt). Shared by a request's seqs."""

    def __init__(self, strings: Iterable[str]) -> None:
        self.strings = tuple(dict.fromkeys(s for s in strings if s))
        self.fallbacks = tuple(_fallback_table(s) for s in self.strings)


def _fallback_table(string: str) -> list[int]:
    """[i]: length of the longest proper prefix of `string` that ends string[: i + 1]."""
    table = [0] * len(string)
    length = 0
    for i in range(1, len(string)):
        while length and string[i] != string[length]:
            length = table[length - 1]
        length += string[i] == string[length]
        table[i] = length
    return table


class StopScan:
    """Finds the stop string that ends first (the longest of those), however the text is cut into pieces."""

    __slots__ = ("_held", "_matched", "_stops")

    def __init__(self, stops: StopStrings) -> None:
        self._stops = stops
        self._matched = [0] * len(stops.strings)  # characters of each stop string at the end of the text so far
        self._held = ""

    def push(self, piece: str) -> tuple[str, str | None]:
        """-> (text that no stop string can take back, stop string found behind it if any)."""
        if not self._stops.strings:
            return piece, None
        text = self._held + piece
        for i, char in enumerate(piece, start=len(self._held) + 1):
            found = self._step(char)
            if found is not None:
                return text[: i - len(found)], found
        num_held = max(self._matched)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held], None

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held

    def _step(self, char: str) -> str | None:
        longest: str | None = None
        for i, string in enumerate(self._stops.strings):
            length = self._matched[i]
            while length and string[length] != char:
                length = self._stops.fallbacks[i][length - 1]
            length += string[length] == char
            self._matched[i] = length
            if length == len(string) and (longest is None or length > len(longest)):
                longest = string
        return longest


@dataclass(frozen=True, slots=True, kw_only=True)
class StopRules:
    """What ends the seqs of one request."""

    stop_token_ids: frozenset[int]  # EOS included unless it is ignored
    strings: StopStrings
    include_stop_str: bool
    min_tokens: int
    max_tokens: int


class OutputText:
    """The output of one seq: counts its tokens, decodes them, and says when it is over.

    The result depends on the tokens alone, not on how many of them one round brought.
    """

    __slots__ = ("_detokenizer", "_pieces", "_rules", "_scan", "num_tokens")

    def __init__(self, rules: StopRules, detokenizer: Detokenizer) -> None:
        self._rules = rules
        self._detokenizer = detokenizer
        self._scan = StopScan(rules.strings)
        self._pieces: list[str] = []
        self.num_tokens = 0

    def push(self, token_id: int) -> Finish | None:
        """Add a token; a seq that is finished takes no further one."""
        rules = self._rules
        self.num_tokens += 1
        may_stop = self.num_tokens > rules.min_tokens
        if may_stop and token_id in rules.stop_token_ids:
            self.end()
            return Finish(reason=inference_pb2.FINISH_REASON_STOP, stop_token_id=token_id)
        found = self._add_text(self._detokenizer.push(token_id), may_stop)
        if found is not None:
            return Finish(reason=inference_pb2.FINISH_REASON_STOP, stop_str=found)
        if self.num_tokens >= rules.max_tokens:
            found = self.end()
            if found is not None:
                return Finish(reason=inference_pb2.FINISH_REASON_STOP, stop_str=found)
            return Finish(reason=inference_pb2.FINISH_REASON_LENGTH)
        return None

    def take_text(self) -> str:
        """The text that became certain since the last call."""
        text = "".join(self._pieces)
        self._pieces.clear()
        return text

    def end(self) -> str | None:
        """Nothing more will come: what was held back is text after all, unless it completes a stop string."""
        found = self._add_text(self._detokenizer.flush(), self.num_tokens > self._rules.min_tokens)
        if found is None:
            self._pieces.append(self._scan.flush())
        return found

    def _add_text(self, piece: str, may_stop: bool) -> str | None:
        if not may_stop:
            self._pieces.append(piece)
            return None
        text, found = self._scan.push(piece)
        self._pieces.append(text)
        if found is not None and self._rules.include_stop_str:
            self._pieces.append(found)
        return found

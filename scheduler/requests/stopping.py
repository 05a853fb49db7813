"""Decides when a seq ends and which text its tokens become."""

from collections.abc import Iterable
from dataclasses import dataclass

from echelon.pb import inference_pb2
from scheduler.requests.detokenizer import Detokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    reason: "inference_pb2.FinishReason.ValueType"
    stop_str: str = ""
    stop_token_id: int | None = None


class StopStrings:
    """Tables to find stop strings in a stream of characters (Knuth, Morris, Pratt). A request's seqs share them."""

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
    """Finds the stop string that ends first (the longest of those), wherever the text is cut into pieces."""

    __slots__ = ("_held", "_matched", "_stops")

    def __init__(self, stops: StopStrings) -> None:
        self._stops = stops
        self._matched = [0] * len(stops.strings)  # characters of each stop string at the end of the text so far
        self._held = ""

    def push(self, piece: str) -> tuple[str, str | None]:
        """Returns the text that no stop string can take back, and the stop string found after it, if any."""
        text = self._held + piece
        for i, char in enumerate(piece, start=len(self._held) + 1):
            found = self._step(char)
            if found is not None:
                return text[: i - len(found)], found
        num_held = max(self._matched, default=0)
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
    final_token_ids: frozenset[int]  # of these, those that end a seq even before min_tokens
    strings: StopStrings
    include_stop_str: bool
    min_tokens: int
    max_tokens: int


class OutputText:
    """The output of one seq: counts its tokens, decodes them and says when it has ended.

    The result depends on the tokens alone, not on how many of them a round brought. Without stop strings the text does
    not affect when a seq ends, so tokens are decoded only on demand, while the next round already runs.
    """

    __slots__ = ("_detokenizer", "_num_known", "_pieces", "_rules", "_scan", "_undecoded", "num_tokens")

    def __init__(self, rules: StopRules, detokenizer: Detokenizer) -> None:
        self._rules = rules
        self._detokenizer = detokenizer
        self._scan = StopScan(rules.strings) if rules.strings.strings else None
        self._pieces: list[str] = []
        self._undecoded: list[int] = []
        self._num_known = 0  # characters to come that the client has already
        self.num_tokens = 0

    def skip(self, num_chars: int) -> None:
        """The client has so much of the text that will come."""
        self._num_known += num_chars

    def push(self, token_id: int) -> Finish | None:
        """Add a token. A finished seq takes no more tokens."""
        rules = self._rules
        self.num_tokens += 1
        if token_id in rules.stop_token_ids and (
            self.num_tokens > rules.min_tokens or token_id in rules.final_token_ids
        ):
            self.end()
            return Finish(reason=inference_pb2.FINISH_REASON_STOP, stop_token_id=token_id)
        found: str | None = None
        if self._scan is None:
            self._undecoded.append(token_id)
        else:
            found = self._scan_text(self._detokenizer.push(token_id), self._scan)
        if found is None and self.num_tokens >= rules.max_tokens:
            found = self.end()
            if found is None:
                return Finish(reason=inference_pb2.FINISH_REASON_LENGTH)
        return None if found is None else Finish(reason=inference_pb2.FINISH_REASON_STOP, stop_str=found)

    def take_text(self) -> str:
        """The text that became certain since the last call."""
        self._decode()
        text = "".join(self._pieces)
        self._pieces.clear()
        num_known = min(self._num_known, len(text))
        self._num_known -= num_known
        return text[num_known:]

    def end(self) -> str | None:
        """No more tokens will come: text that was held back is released, unless it completes a stop string."""
        self._decode()
        rest = self._detokenizer.flush()
        if self._scan is None:
            self._pieces.append(rest)
            return None
        found = self._scan_text(rest, self._scan)
        if found is None:
            self._pieces.append(self._scan.flush())
        return found

    def _decode(self) -> None:
        if self._undecoded:
            self._pieces += map(self._detokenizer.push, self._undecoded)
            self._undecoded.clear()

    def _scan_text(self, piece: str, scan: StopScan) -> str | None:
        if self.num_tokens <= self._rules.min_tokens:
            self._pieces.append(piece)
            return None
        text, found = scan.push(piece)
        self._pieces.append(text)
        if found is not None and self._rules.include_stop_str:
            self._pieces.append(found)
        return found

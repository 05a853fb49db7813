"""Turns token ids into text, one token at a time, never half a character.

A table of bytes (`checkpoint/token_table.py`) and an incremental UTF-8 decoder give exactly the text of the whole
output at constant cost per token. Invalid UTF-8 becomes U+FFFD as soon as no further byte could complete it.
"""

import codecs

from checkpoint.token_table import TokenTable

_new_utf8_decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """The text of one seq's output.

    `follows_text`: whether visible text precedes the first token. At the start of a text, some decoders remove the
    space before the first word.
    """

    __slots__ = ("_bytes_of", "_is_first", "_num_spaces_to_drop", "_skipped", "_starts", "_table", "_utf8")

    def __init__(self, table: TokenTable, *, skip_special_tokens: bool, follows_text: bool) -> None:
        self._table = table
        self._bytes_of = table.bytes_of
        self._skipped = table.special_ids if skip_special_tokens else frozenset()
        self._utf8 = _new_utf8_decoder("replace")
        self._num_spaces_to_drop = 0 if follows_text else table.num_leading_spaces
        self._is_first = table.has_first_form and not follows_text
        self._starts = self._is_first or self._num_spaces_to_drop > 0

    def push(self, token_id: int) -> str:
        """The text that becomes certain with this token. Bytes of an unfinished character wait for the next token."""
        if token_id in self._skipped or token_id >= len(self._bytes_of):
            return ""
        if self._starts:
            return self._start(token_id)
        return self._utf8.decode(self._bytes_of[token_id])

    def flush(self) -> str:
        """The output has ended: an unfinished character becomes U+FFFD."""
        return self._utf8.decode(b"", final=True)

    def _start(self, token_id: int) -> str:
        """Like `push`, at the start of the text, where spaces are dropped until a token is something else."""
        data = self._table.first_bytes_of(token_id) if self._is_first else self._bytes_of[token_id]
        self._is_first = False
        text = self._utf8.decode(data)
        stripped = text.lstrip(" ")
        num_dropped = min(self._num_spaces_to_drop, len(text) - len(stripped))
        self._num_spaces_to_drop -= num_dropped
        self._starts = self._num_spaces_to_drop > 0 and not stripped
        return text[num_dropped:]

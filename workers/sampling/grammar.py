"""Grammars that outputs keep to: which tokens may come next is a function of a seq's output alone.

llguidance computes it: an Earley parser over derivatives of regular expressions walks a trie of the vocabulary. It is
imported for the first request that has a grammar.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from checkpoint.errors import LoadError
from echelon.pb.sampling_pb2 import Grammar

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

TokenBits = NDArray[np.int32]  # [ceil(vocab_size / 32)]: bit v % 32 of word v // 32 says whether token v may come

_MAX_COMPILED = 256  # some 100 KB each


class GrammarError(Exception):
    """No token can be chosen. The message says why."""


class CompiledGrammar:
    """A grammar that seqs share. Returns at once; the first use waits for the thread that compiles."""

    def __init__(self, compile_anew: "Callable[[], LLMatcher]", thread: ThreadPoolExecutor) -> None:
        self._compile_anew = compile_anew
        self._thread = thread
        self._compiled = thread.submit(compile_anew)

    def start(self) -> "LLMatcher":
        """A parser at the beginning of an output. Raises GrammarError."""
        return self._compiled.result().deep_copy()

    def renew(self) -> None:
        """The parsers that started from one compilation fill tables of a limited size together. Later ones get new
        tables."""
        self._compiled = self._thread.submit(self._compile_anew)


class GrammarCompiler:
    """Compiles grammars for the vocabulary of a model folder, beside the rounds. Called by one thread."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        """`vocab_size`: the model's; it may pad or cut the tokeniser's. The folder is read for the first grammar."""
        self._folder = folder
        self._vocab_size = vocab_size
        self._vocabularies: dict[tuple[int, ...], LLTokenizer] = {}
        self._thread: ThreadPoolExecutor | None = None
        self._compiled: OrderedDict[bytes, CompiledGrammar] = OrderedDict()

    def start(self, grammar: Grammar) -> "GrammarState":
        """The state of a seq without output."""
        key = grammar.SerializeToString(deterministic=True)
        compiled = self._compiled.pop(key, None)
        if compiled is None:
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammars")
            compile_anew = partial(self._compile, grammar.source, tuple(grammar.eos_token_ids))
            compiled = CompiledGrammar(compile_anew, self._thread)
        self._compiled[key] = compiled
        if len(self._compiled) > _MAX_COMPILED:
            self._compiled.popitem(last=False)
        return GrammarState(compiled, frozenset(grammar.eos_token_ids), self._vocab_size)

    def _compile(self, source: str, eos_token_ids: tuple[int, ...]) -> "LLMatcher":
        """Raises GrammarError. On a thread of its own, so the vocabularies are its alone."""
        from workers.sampling.vocabulary import compile_grammar, load_vocabulary

        try:
            if eos_token_ids not in self._vocabularies:
                self._vocabularies[eos_token_ids] = load_vocabulary(self._folder, self._vocab_size, eos_token_ids)
            return compile_grammar(self._vocabularies[eos_token_ids], source)
        except (LoadError, ValueError) as err:
            raise GrammarError(str(err)) from err


class GrammarState:
    """A grammar after the output of one seq. The parser follows the output when something is asked of it."""

    __slots__ = ("_compiled", "_end", "_eos_token_ids", "_num_parsed", "_output", "_parser", "_vocab_size")

    def __init__(self, compiled: CompiledGrammar, eos_token_ids: frozenset[int], vocab_size: int) -> None:
        self._compiled = compiled
        self._eos_token_ids = eos_token_ids
        self._vocab_size = vocab_size
        self._output: list[int] = []
        self._end: int | None = None  # the place of the first EOS
        self._parser: LLMatcher | None = None  # has read the first _num_parsed tokens
        self._num_parsed = 0

    def extend(self, token_ids: Sequence[int]) -> None:
        if self._end is None and (place := self._eos_in(token_ids)) is not None:
            self._end = len(self._output) + place
        self._output.extend(token_ids)

    def truncate(self, num_output: int) -> None:
        """Forget all but the first `num_output` tokens."""
        del self._output[num_output:]
        if self._end is not None and self._end >= num_output:
            self._end = None
        if self._parser is not None and self._num_parsed > num_output:
            self._parser.rollback(self._num_parsed - num_output)
            self._num_parsed = num_output

    def branch(self) -> "GrammarState":
        """Later changes to either do not affect the other."""
        twin = copy(self)
        twin._output = self._output.copy()
        if self._parser is not None:
            twin._parser = self._parser.deep_copy()
        return twin

    def num_legal(self, drafts: Sequence[int]) -> int:
        """How many of the tokens may follow the output, one after the other. None follows EOS."""
        end = self._eos_in(drafts)
        try:
            parser = self._at_end()
        except GrammarError:
            return 0
        num_legal = 0 if parser is None else parser.validate_tokens(list(drafts[:end]))
        return num_legal + (num_legal == end)  # whether EOS may come there, a comparison will show

    def bits_behind(
        self, drafts: Sequence[int], suppressed: Sequence[int] | NDArray[np.int64] = ()
    ) -> TokenBits | None:
        """The tokens that may follow the output and `drafts`; None where that does not matter, since what comes before
        has ended the seq or cannot be.

        EOS is one of them where the grammar allows the end. `suppressed` tokens are not, unless nothing else is left.
        Raises GrammarError.
        """
        if self._end is not None or self._eos_in(drafts) is not None:
            return None
        try:
            bits = self._read_bits(drafts)
        except GrammarError:  # perhaps what other seqs have done to the tables is to blame
            self._compiled.renew()
            bits = self._read_bits(drafts)
        return bits if bits is None else _without(bits, suppressed)

    def error(self) -> str:
        """Why no token can follow the output; empty: some can."""
        try:
            self.bits_behind(())
        except GrammarError as err:
            return str(err)
        return ""

    def _eos_in(self, token_ids: Sequence[int]) -> int | None:
        return next((i for i, token_id in enumerate(token_ids) if token_id in self._eos_token_ids), None)

    def _at_end(self) -> "LLMatcher | None":
        """The parser, which has read the whole output; None if that has ended. Raises GrammarError."""
        if self._end is not None:
            return None
        if self._parser is None:
            self._parser, self._num_parsed = self._compiled.start(), 0
        rest = self._output[self._num_parsed :]
        if rest:
            self._num_parsed += self._parser.try_consume_tokens(rest)
        if self._num_parsed < len(self._output):
            raise GrammarError(self._parser.get_error() or f"output token {self._num_parsed} is not allowed")
        return self._parser

    def _read_bits(self, drafts: Sequence[int]) -> TokenBits | None:
        try:
            parser = self._at_end()
            assert parser is not None, "the output has not ended"
            num_parsed = parser.try_consume_tokens(list(drafts))
            bits = self._next_bits(parser) if num_parsed == len(drafts) or parser.is_error() else None
            parser.rollback(num_parsed)
        except GrammarError:
            self._parser = None  # it never recovers from an error
            raise
        return bits

    def _next_bits(self, parser: "LLMatcher") -> TokenBits:
        bits: TokenBits = np.zeros(-(-self._vocab_size // 32), np.int32)
        parser.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        if parser.is_error():
            raise GrammarError(parser.get_error())
        if not bits.any():
            raise GrammarError("no token of the vocabulary continues the output")
        return bits


def _without(bits: TokenBits, token_ids: Sequence[int] | NDArray[np.int64]) -> TokenBits:
    if not len(token_ids):
        return bits
    ids = np.asarray(token_ids, np.int64)
    ids = ids[ids < 32 * len(bits)]
    left = bits.copy()
    np.bitwise_and.at(left, ids // 32, ~np.left_shift(np.int32(1), (ids % 32).astype(np.int32)))
    return left if left.any() else bits

"""Grammars of seqs: which tokens may follow an output, whoever asks, in whatever order."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from tokenizers import Tokenizer

from echelon.pb.inference_pb2 import Choice, StructuredOutput
from echelon.pb.reading_pb2 import (
    CALL_FORM_DEEPSEEK,
    CALL_FORM_HERMES,
    CALL_FORM_LLAMA_JSON,
    CALL_FORM_MISTRAL,
    CALL_FORM_PYTHONIC,
    CALL_FORM_QWEN_XML,
    REASONING_BEGUN,
    REASONING_POSSIBLE,
    REASONING_UNSPECIFIED,
    CallForm,
)
from echelon.pb.sampling_pb2 import Grammar
from gateway.doors.replies.reply_parser import Argued, Called, ReplyParser, Said
from gateway.requests.call_grammars import Tool, calls_grammar
from gateway.requests.grammar import composed, grammar_of
from gateway.requests.refusal import Refusal
from tests.helpers import tiny_tokenizers
from tests.helpers.structured import EOS, SCHEMA
from workers.sampling.grammar import GrammarCompiler, GrammarError, GrammarState

DEMO = Path(__file__).parents[2] / "models" / "demo-target"
VOCAB_SIZE = 4100  # the tokeniser's 4096 and padding
TEXT = '{"name":"Ada L.","age":36,"tags":["bb","a"]}'


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(DEMO / "tokenizer.json"))


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(DEMO, VOCAB_SIZE)


def start(compiler: GrammarCompiler, reasoning: Any = REASONING_UNSPECIFIED, **form: Any) -> GrammarState:
    return compiler.start(Grammar(source=grammar_of(StructuredOutput(**form), reasoning), eos_token_ids=[EOS]))


def allowed(state: GrammarState, drafts: Sequence[int] = (), suppressed: Sequence[int] = ()) -> set[int]:
    bits = state.bits_behind(drafts, suppressed)
    assert bits is not None
    return set(np.unpackbits(bits.view(np.uint8), bitorder="little").nonzero()[0].tolist())


def accepts(state: GrammarState, tokenizer: Tokenizer, text: str) -> bool:
    """Whether the whole text, and no more of it, is in the grammar."""
    token_ids = tokenizer.encode(text, add_special_tokens=False).ids
    return state.num_legal(token_ids) == len(token_ids) and EOS in allowed(state, token_ids)


def test_every_token_of_a_valid_text_is_allowed_and_eos_at_its_end_alone(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    state = start(compiler, json_schema=json.dumps(SCHEMA))
    token_ids = tokenizer.encode(TEXT, add_special_tokens=False).ids
    for token_id in token_ids:
        assert token_id in allowed(state)
        assert EOS not in allowed(state)
        state.extend([token_id])
    assert allowed(state) == {EOS}
    state.extend([EOS])
    assert state.bits_behind((), ()) is None, "what follows the end is dropped"


def test_choosing_among_allowed_tokens_always_gives_a_valid_object(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    rng = random.Random(1)
    for _ in range(20):
        state, output = start(compiler, json_schema=json.dumps(SCHEMA)), []
        while EOS not in output:
            output.append(rng.choice(sorted(allowed(state))))
            state.extend(output[-1:])
        jsonschema.validate(json.loads(tokenizer.decode(output)), SCHEMA)


def test_what_is_allowed_depends_on_the_output_alone(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    """A state that has been cut, branched, and asked about drafts equals one that simply got its tokens."""
    rng = random.Random(2)
    token_ids = [*tokenizer.encode(TEXT, add_special_tokens=False).ids, EOS]
    form = json.dumps(SCHEMA)
    truth = []
    for size in range(len(token_ids)):
        fresh = start(compiler, json_schema=form)
        fresh.extend(token_ids[:size])
        truth.append(allowed(fresh))
    state, size = start(compiler, json_schema=form), 0
    for _ in range(200):
        grown = rng.randint(size, min(size + 5, len(token_ids) - 1))
        state.extend(token_ids[size:grown])
        size = grown
        drafts = token_ids[size : size + rng.randint(0, 4)]
        if rng.random() < 0.5:
            drafts = [*drafts, rng.randrange(VOCAB_SIZE)]  # hardly ever legal
        state.bits_behind(drafts, ())
        assert state.num_legal(drafts) >= len(drafts) - 1
        if rng.random() < 0.3:
            other, state = state, state.branch()
            other.extend([5, 5, 5])
            other.error()
        if rng.random() < 0.5:
            size = rng.randint(0, size)
            state.truncate(size)
        assert allowed(state) == truth[size]
        ahead = rng.randint(size, len(token_ids) - 1)
        assert allowed(state, token_ids[size:ahead]) == truth[ahead]


def test_drafts_that_leave_the_grammar_are_counted_up_to_there(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    state = start(compiler, json_schema=json.dumps(SCHEMA))
    token_ids = tokenizer.encode(TEXT, add_special_tokens=False).ids
    wrong = tokenizer.token_to_id("}")
    assert state.num_legal([*token_ids[:3], wrong, *token_ids[3:]]) == 3
    assert state.num_legal([*token_ids, EOS, *token_ids]) == len(token_ids) + 1
    assert state.bits_behind([*token_ids[:3], wrong], ()) is None, "the verdict ends before"
    assert state.bits_behind([*token_ids, EOS], ()) is None
    assert state.num_legal(token_ids) == len(token_ids), "the questions changed nothing"


def test_suppressed_tokens_are_allowed_only_where_nothing_else_is(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    state = start(compiler, regex="(ab)+")
    state.extend(tokenizer.encode("ab", add_special_tokens=False).ids)
    assert EOS in allowed(state)
    assert EOS not in allowed(state, suppressed=[EOS, 9_000_000]) != set()
    state = start(compiler, choice=Choice(texts=["ab"]))
    state.extend(tokenizer.encode("ab", add_special_tokens=False).ids)
    assert allowed(state, suppressed=[EOS]) == {EOS}


def test_reasoning_before_the_answer_is_free(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    begun = start(compiler, REASONING_BEGUN, json_schema=json.dumps(SCHEMA))
    thought = 'Let me see: {"name": 3 < 5}, "</th" and\n\nso on.'
    assert accepts(begun, tokenizer, f"{thought}</think>\n\n{TEXT}")
    assert not accepts(begun, tokenizer, TEXT), "the prompt has opened the reasoning"
    assert EOS not in allowed(begun, tokenizer.encode(thought, add_special_tokens=False).ids)
    possible = start(compiler, REASONING_POSSIBLE, json_schema=json.dumps(SCHEMA))
    assert accepts(possible, tokenizer, f"<think>\n{thought}\n</think>{TEXT}")
    assert accepts(possible, tokenizer, TEXT)
    assert not accepts(possible, tokenizer, f"{thought}{TEXT}")


FORMS = [
    (CALL_FORM_HERMES, False),
    (CALL_FORM_QWEN_XML, False),
    (CALL_FORM_LLAMA_JSON, False),
    (CALL_FORM_PYTHONIC, False),
    (CALL_FORM_MISTRAL, False),
    (CALL_FORM_MISTRAL, True),
    (CALL_FORM_DEEPSEEK, False),
    (CALL_FORM_DEEPSEEK, True),
]


@pytest.mark.parametrize("one_call", [False, True])
@pytest.mark.parametrize(("form", "is_newer"), FORMS)
def test_forced_calls_are_found(
    compiler: GrammarCompiler, tokenizer: Tokenizer, form: CallForm.ValueType, is_newer: bool, one_call: bool
) -> None:
    """At random, with names and arguments of the tools alone; in the vocabulary no tag is a special token."""
    options = {"properties": {"a": {"type": "string", "enum": ["x", "y"]}, "b": {"type": "number"}}, "type": "object"}
    tools = [Tool("f", SCHEMA, "tools[0]"), Tool("q", {**options, "additionalProperties": False}, "tools[1]")]
    answer = calls_grammar(form, tools, one_call=one_call, is_newer=is_newer)
    source = composed(answer, REASONING_UNSPECIFIED, field="tool_choice")
    rng, found = random.Random(3), set[str]()
    for _ in range(10):
        calls = calls_in(walked(compiler, source, rng, tokenizer), form)
        assert len(calls) == 1 or not one_call
        for name, arguments in calls:
            jsonschema.validate(json.loads(arguments), next(tool.parameters for tool in tools if tool.name == name))
            found.add(name)
    assert len(found) == 2


def walked(compiler: GrammarCompiler, source: str, rng: random.Random, tokenizer: Tokenizer) -> str:
    """A text of the grammar: at each place a token at random, but the end where it may come."""
    state, output = compiler.start(Grammar(source=source, eos_token_ids=[EOS])), list[int]()
    while EOS not in output:
        ids = sorted(allowed(state))
        closing = (
            [i for i in ids if tokenizer.decode([i]).startswith(("\n</par", '"', "}"))] if len(output) > 60 else []
        )
        output.append(EOS if EOS in ids else rng.choice(closing or ids))
        state.extend(output[-1:])
    text: str = tokenizer.decode(output)
    return text


def calls_in(text: str, form: CallForm.ValueType) -> list[tuple[str, str]]:
    types = {"f": {"name": "string"}, "q": {"a": "string"}}
    parser = ReplyParser(
        finds_reasoning=False, begins_in_reasoning=False, call_form=form, max_calls=99, parameter_types=types
    )
    calls = list[tuple[str, str]]()
    for piece in parser.feed(text, is_last=True):
        match piece:
            case Called(name=name, arguments=arguments):
                calls.append((name, arguments))
            case Argued(arguments=arguments):
                calls[-1] = (calls[-1][0], calls[-1][1] + arguments)
            case Said(said):
                assert not said.strip(), text
    return calls


def test_tags_that_are_special_tokens_are_written_as_such(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    tag = tokenizer.token_to_id("<|endoftext|>")
    grammar = calls_grammar(
        CALL_FORM_MISTRAL, [Tool("f", {"enum": [{}]}, "tools[0]")], one_call=True, special_id=lambda text: tag
    )
    source = composed(grammar, REASONING_UNSPECIFIED, field="tool_choice")
    state = compiler.start(Grammar(source=source, eos_token_ids=[3000]))
    assert allowed(state) == {tag}
    assert "[" in {tokenizer.decode([i])[0] for i in allowed(state, [tag])}


@pytest.mark.parametrize(
    ("form", "valid", "invalid"),
    [
        ({"json_object": True}, '{"a": [1, {"b": null}]}', "[1]"),
        ({"regex": r"^\d{3}/[a-z]+$"}, "123/ab", "12/ab"),
        ({"choice": Choice(texts=['yes "so"', "nein\u00fc"])}, 'yes "so"', "yes"),
        ({"grammar": 'start: "a" start "b" | "c"'}, "aacbb", "aacb"),
        ({"grammar": 'root ::= "x" [0-9]+'}, "x17", "x"),
    ],
)
def test_forms(compiler: GrammarCompiler, tokenizer: Tokenizer, form: dict[str, Any], valid: str, invalid: str) -> None:
    assert accepts(start(compiler, **form), tokenizer, valid)
    assert not accepts(start(compiler, **form), tokenizer, invalid)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"json_schema": '{"type": "array", "uniqueItems": true}'}, 'Unimplemented keys: ["uniqueItems"]'),
        ({"json_schema": '{"$ref": "http://example.org/s"}'}, "json_schema: cannot be enforced"),
        ({"json_schema": "{"}, "json_schema: is not JSON"),
        ({"json_schema": "[]"}, "json_schema: must be a JSON object, got list"),
        ({"regex": "(?=a)b"}, "regex: cannot be enforced"),
        ({"grammar": "start: other"}, 'unknown name: "other"'),
        ({"grammar": "%%%"}, "grammar: "),
        ({"choice": Choice()}, "choice: needs texts"),
        ({"choice": Choice(texts=["a" * 300_000])}, "choice: at most 262144 bytes"),
        ({}, "structured_output: one of json_schema"),
    ],
)
def test_what_cannot_be_enforced_is_refused_by_name(form: dict[str, Any], message: str) -> None:
    with pytest.raises(Refusal) as refused:
        grammar_of(StructuredOutput(**form), REASONING_UNSPECIFIED)
    assert refused.value.message.startswith("structured_output")
    assert message in refused.value.message


def test_a_vocabulary_that_lacks_bytes_is_an_error(tmp_path: Path) -> None:
    tiny_tokenizers.word_piece().save(str(tmp_path / "tokenizer.json"))
    state = GrammarCompiler(tmp_path, 40).start(Grammar(source='start: "a"', eos_token_ids=[2]))
    assert "has no token for some bytes" in state.error()
    with pytest.raises(GrammarError):
        state.branch().bits_behind((), ())


def wander(state: GrammarState, num_tokens: int) -> None:
    rng, drafts = random.Random(0), list[int]()
    while len(drafts) < num_tokens:
        drafts.append(rng.choice(sorted(allowed(state, drafts) - {EOS})))


def test_a_grammar_that_becomes_too_complex_is_an_error_there_alone(compiler: GrammarCompiler) -> None:
    """The parser never recovers from an error, but the seq goes on from where it was."""
    state = start(compiler, regex="(.*a.{1,200}){1,5}b")
    before = allowed(state)
    with pytest.raises(GrammarError, match="too many"):
        wander(state, 100)
    assert allowed(state) == before


def test_a_source_that_does_not_compile_is_an_error(compiler: GrammarCompiler) -> None:
    state = compiler.start(Grammar(source="start: nothing", eos_token_ids=[EOS]))
    assert "nothing" in state.error()
    assert state.num_legal([1]) == 0


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece", "metaspace"])
def test_tokens_of_every_kind_spell_the_texts_that_clients_get(kind: str, tmp_path: Path) -> None:
    made = tiny_tokenizers.KINDS[kind]()
    made.save(str(tmp_path / "tokenizer.json"))
    eos = made.token_to_id("</s>")
    state = GrammarCompiler(tmp_path, made.get_vocab_size()).start(
        Grammar(source=r"start: /[ a-z]{0,9}/", eos_token_ids=[eos])
    )
    rng, output = random.Random(0), [made.encode("a").ids[-1]]
    state.extend(output)
    while eos not in output:
        output.append(rng.choice(sorted(allowed(state))))
        state.extend(output[-1:])
    assert set(made.decode(output)) <= set(" abcdefghijklmnopqrstuvwxyz'")

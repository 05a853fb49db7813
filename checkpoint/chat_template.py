"""Chat templates, rendered as `transformers` renders them, without importing it."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from checkpoint.errors import LoadError
from checkpoint.fields import Fields
from checkpoint.json_files import read_optional_json_object, read_text
from checkpoint.side_files import read_side_files

_CONFIG = "tokenizer_config.json"
_FILE = "chat_template.jinja"


class ChatError(ValueError):
    """The template cannot be read, or refused the conversation."""


class _GenerationBlock(Extension):
    """`{% generation %}`, which marks the assistant's tokens for training: here it only passes its body on."""

    tags = {"generation"}  # noqa: RUF012 (declared by jinja2 without ClassVar)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: Macro) -> str:
        return caller()


class ChatTemplate:
    """A compiled template. `special_tokens` are the variables bos_token, eos_token ... that it may use.

    Templates come with a model's files and are code of somebody else: they run in jinja2's immutable sandbox.
    Raises ChatError for a template that does not compile.
    """

    def __init__(self, source: str, *, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as err:
            raise ChatError(f"chat template, line {err.lineno}: {err.message}") from err
        except (SyntaxError, ValueError, ArithmeticError, RecursionError) as err:  # of Python, which it becomes
            raise ChatError(f"chat template: {err}") from err
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool) -> str:
        """The prompt's text, special tokens written out. Raises ChatError with the template's own words."""
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as err:
            raise ChatError(f"the model's chat template refused the conversation: {err}") from err


def load_chat_template(folder: Path) -> ChatTemplate | None:
    """The template of a Hugging Face folder: chat_template.jinja, else tokenizer_config.json's `chat_template`, a
    string or a list of named templates of which "default" is taken; None without one. Raises LoadError."""
    config = read_optional_json_object(folder / _CONFIG)
    file = folder / _FILE if (folder / _FILE).exists() else folder / _CONFIG
    source = read_text(file) if file.name == _FILE else _default_template(Fields(_CONFIG, config))
    if source is None:
        return None
    named = read_side_files(folder).named
    try:
        return ChatTemplate(source, special_tokens={name: token.content for name, token in named.items()})
    except ChatError as err:
        raise LoadError(f"{file}: {err}", "repair the template, or take it out: texts are served without one") from err


def _default_template(config: Fields) -> str | None:
    source = config.get("chat_template")
    if isinstance(source, list):
        named = [entry if isinstance(entry, dict) else {} for entry in source]
        if not all(isinstance(entry.get("name"), str) and isinstance(entry.get("template"), str) for entry in named):
            raise config.wrong("chat_template", "a string, or a list of objects with name and template")
        source = {entry["name"]: entry["template"] for entry in named}.get("default")
    if source is not None and not isinstance(source, str):
        raise config.wrong("chat_template", "a string, or a list of objects with name and template")
    return source


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike jinja2's own filter it leaves `<`, `>`, `&` and quotes alone."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)

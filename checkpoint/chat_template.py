"""Chat templates, rendered as `transformers` renders them, without importing it."""

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
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
_MAX_SOURCE_CHARS = 128 << 10  # some have 40,000; jinja2 takes up to 15 s for so many, by the square of their number
_MAX_CHARS = 16 << 20  # of a rendered conversation
_END_OF_MESSAGE = "CONTINUE_FINAL_MESSAGE_TAG "
# What a message's reasoning is called, in the order in which it is looked for; templates read the first.
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")


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


class _UnfoldingGenerator(CodeGenerator):
    """Computes nothing while it compiles: `{{ 9 ** (9 ** 9) }}` costs who renders it, not who reads the folder.

    `optimized=False` of an environment leaves constants alone everywhere but in the two places below.
    """

    def _output_child_to_const(self, node: nodes.Expr, frame: Frame, finalize: CodeGenerator._FinalizeInfo) -> str:
        if not isinstance(node, nodes.TemplateData):
            raise nodes.Impossible
        return super()._output_child_to_const(node, frame, finalize)

    def visit_EvalContextModifier(self, node: nodes.EvalContextModifier, frame: Frame) -> None:
        if not all(isinstance(option.value, nodes.Const) for option in node.options):
            self.fail("autoescape takes true or false", node.lineno)
        super().visit_EvalContextModifier(node, frame)


class _Environment(ImmutableSandboxedEnvironment):
    code_generator_class = _UnfoldingGenerator


class ChatTemplate:
    """A compiled template. `special_tokens` are the variables bos_token, eos_token ... that it may use.

    Templates come with a model's files and are code of somebody else: they run in jinja2's immutable sandbox. That does
    not bound what `render` costs; to compile one takes time and memory by its length alone. Raises ChatError for a
    template that does not compile.
    """

    def __init__(self, source: str, *, special_tokens: Mapping[str, str], source_with_tools: str | None = None) -> None:
        self._default = _Compiled(source)
        self._with_tools = self._default if source_with_tools is None else _Compiled(source_with_tools)
        self._special_tokens = dict(special_tokens)
        self._sources = source + (source_with_tools or "")

    def mentions(self, word: str) -> bool:
        """Whether the word stands in the template, which tells what the model was taught."""
        return word in self._sources

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text, special tokens written out.

        With `continue_final_message` it ends where the last message's content ends. `variables` are for the template,
        `tools` and `documents` among them; they win over special tokens. Raises ChatError, with the template's own
        words if it has any.
        """
        given = {"tools": None, "documents": None, **self._special_tokens, **(variables or {})}
        template = self._default if given["tools"] is None else self._with_tools
        chat = [_with_reasoning(message) for message in messages]
        if continue_final_message:
            _mark_end(chat, template)
        text = template.render({**given, "messages": chat, "add_generation_prompt": add_generation_prompt})
        return _before_mark(text, messages[-1]["content"]) if continue_final_message else text


class _Compiled:
    def __init__(self, source: str) -> None:
        if len(source) > _MAX_SOURCE_CHARS:
            raise ChatError(f"chat template: has {len(source)} characters, and at most {_MAX_SOURCE_CHARS} are read")
        environment = _Environment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols], optimized=False
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as err:
            raise ChatError(f"chat template, line {err.lineno}: {err.message}") from err
        except (RecursionError, MemoryError) as err:
            raise ChatError("chat template: is nested too deeply") from err
        except (SyntaxError, ValueError, ArithmeticError) as err:  # of Python, which it becomes
            raise ChatError(f"chat template: {err}") from err
        self.reads_content = "content" in source

    def render(self, variables: Mapping[str, Any]) -> str:
        try:
            return _joined(self._template.generate(variables))
        except ChatError:
            raise
        except RecursionError as err:
            raise ChatError("the model's chat template calls itself too often with this conversation") from err
        except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as err:
            raise ChatError(f"the model's chat template refused the conversation: {err}") from err


def load_chat_template(folder: Path) -> ChatTemplate | None:
    """The template of a Hugging Face folder: chat_template.jinja, else tokenizer_config.json's `chat_template`, a
    string or a list of named templates of which "default" and "tool_use" are taken; None without a default. Raises
    LoadError."""
    config = read_optional_json_object(folder / _CONFIG)
    file = folder / _FILE if (folder / _FILE).exists() else folder / _CONFIG
    sources = {"default": read_text(file)} if file.name == _FILE else _named_templates(Fields(_CONFIG, config))
    if "default" not in sources:
        return None
    special_tokens = {name: token.content for name, token in read_side_files(folder).named.items()}
    try:
        return ChatTemplate(
            sources["default"], special_tokens=special_tokens, source_with_tools=sources.get("tool_use")
        )
    except ChatError as err:
        raise LoadError(f"{file}: {err}", "repair the template, or take it out: texts are served without one") from err


def _named_templates(config: Fields) -> dict[str, str]:
    source = config.get("chat_template")
    if source is None:
        return {}
    if isinstance(source, str):
        return {"default": source}
    named = [entry if isinstance(entry, dict) else {} for entry in source] if isinstance(source, list) else [{}]
    if not all(isinstance(entry.get("name"), str) and isinstance(entry.get("template"), str) for entry in named):
        raise config.wrong("chat_template", "a string, or a list of objects with name and template")
    return {entry["name"]: entry["template"] for entry in named}


def _mark_end(chat: list[dict[str, Any]], template: _Compiled) -> None:
    if not isinstance(chat[-1].get("content"), str):
        raise ChatError("continue_final_message: the last message has no text to continue")
    if not template.reads_content:
        raise ChatError("continue_final_message: the model's chat template does not read a message's content")
    chat[-1]["content"] += _END_OF_MESSAGE


def _with_reasoning(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message without null fields, with its reasoning under the names that templates know."""
    given = {key: value for key, value in message.items() if value is not None}
    reasoning = next((given[key] for key in _REASONING_KEYS if key in given), None)
    return given if reasoning is None else {"thinking": reasoning, **given, "reasoning_content": reasoning}


def _joined(pieces: Iterable[str]) -> str:
    parts, num_chars = [], 0
    for piece in pieces:
        num_chars += len(piece)
        if num_chars > _MAX_CHARS:
            raise ChatError(f"the model's chat template writes more than {_MAX_CHARS} characters")
        parts.append(piece)
    return "".join(parts)


def _before_mark(text: str, content: str) -> str:
    """What stands before the mark that ends the last message."""
    mark = _END_OF_MESSAGE.strip()
    if content.strip() not in text or mark not in text:
        raise ChatError("continue_final_message: the model's chat template leaves out the end of the last message")
    end = text.rindex(mark)
    # A template that trims what it writes has trimmed the content's own end too.
    return text[:end] if text.startswith(_END_OF_MESSAGE, end) else text[:end].rstrip()


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

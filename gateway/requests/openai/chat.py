"""The body of /v1/chat/completions, and other conversations, in the words of gRPC."""

import json
from collections.abc import Callable
from typing import Any

from checkpoint.chat_template import ChatTemplate
from echelon.pb.inference_pb2 import ChatMessage, ChatMessages
from echelon.pb.reading_pb2 import Presentation
from gateway.requests.calls import call_form_of, forced_calls, parameter_types, shows_special_tokens, tools_of
from gateway.requests.openai.bodies import ChatBody, ChatFields, ChatMessageBody, parse_body
from gateway.requests.openai.reading import Asked, common_request, presentation_of
from gateway.requests.openai.structured import structured_words
from gateway.requests.reasoning import reasoning_of
from gateway.requests.refusal import Refusal, Words, invalid, reworded, shown

SpecialId = Callable[[str], int | None]

_FOR_THE_TEMPLATE = ("tools", "documents", "reasoning_effort")


def ask_chat(data: bytes, template: ChatTemplate | None, special_id: SpecialId = lambda text: None) -> Asked:
    """`special_id`: of texts that are special tokens. Raises Refusal."""
    return ask_conversation(parse_body(ChatBody, data), template, special_id)


def ask_conversation(
    body: ChatBody, template: ChatTemplate | None, special_id: SpecialId, skin_words: Words = ()
) -> Asked:
    """For the body of another API, `skin_words` say what it calls the fields of a ChatBody. Raises Refusal."""
    try:
        return _ask(body, template, special_id, skin_words)
    except Refusal as refusal:
        raise reworded(refusal, skin_words) from refusal


def _ask(body: ChatBody, template: ChatTemplate | None, special_id: SpecialId, skin_words: Words) -> Asked:
    _check(body)
    length = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    body.max_tokens = getattr(body, length)
    request = common_request(body)
    if body.logprobs:
        request.sampling.logprobs = body.top_logprobs or 0
    request.chat.CopyFrom(chat_of(body))
    presentation = _presentation(body, template)
    if body.skip_special_tokens is None and shows_special_tokens(presentation.call_form, special_id):
        request.sampling.skip_special_tokens = False
    words = (("sampling.logprobs:", "top_logprobs:"), ("sampling.max_tokens:", f"{length}:"), ("sampling.", ""))
    return Asked(
        requests=[request],
        presentation=presentation,
        forced_calls=_forced_calls(body, template, special_id),
        words=(*words, *structured_words(body), ("chat:", "messages:"), ("chat.", "")),
        skin_words=skin_words,
    )


def chat_of(body: ChatFields) -> ChatMessages:
    """Raises Refusal."""
    chat = ChatMessages(
        messages=[_message(f"messages[{i}]", message) for i, message in enumerate(body.messages)],
        continue_final_message=bool(body.continue_final_message),
    )
    if body.add_generation_prompt is not None:
        chat.add_generation_prompt = body.add_generation_prompt
    variables = dict(body.chat_template_kwargs or {})
    variables |= {name: value for name in _FOR_THE_TEMPLATE if (value := getattr(body, name)) is not None}
    if variables:
        chat.chat_template_kwargs = json.dumps(variables)
    return chat


def _check(body: ChatBody) -> None:
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs: needs logprobs: true")
    if body.add_special_tokens:
        raise invalid("add_special_tokens: must be false, because the chat template writes special tokens itself")


def _forced_calls(body: ChatBody, template: ChatTemplate | None, special_id: SpecialId) -> list[dict[str, Any]] | None:
    choice = body.tool_choice
    if choice == "none":
        return None
    if body.tools and not call_form_of(template):
        raise invalid(
            'tool_choice: must be "none", with which the template still sees the tools, because how this model writes '
            "calls is not known here"
        )
    tools = tools_of(body.tools or ())
    if choice in (None, "auto"):
        return None
    if template is None or not tools:
        raise invalid("tool_choice: needs tools")
    one_call = body.parallel_tool_calls is False
    return forced_calls(choice, tools, template, one_call=one_call, special_id=special_id)


def _presentation(body: ChatBody, template: ChatTemplate | None) -> Presentation:
    presentation = presentation_of(body)
    presentation.reasoning = reasoning_of(template)
    if body.tools and body.tool_choice != "none":
        presentation.call_form = call_form_of(template)
        presentation.parameter_types = json.dumps(parameter_types(body.tools))
    presentation.one_call = body.parallel_tool_calls is False
    return presentation


def _message(field: str, message: ChatMessageBody) -> ChatMessage:
    extra = {name: value for name, value in (message.model_extra or {}).items() if value is not None}
    if message.tool_calls is not None:
        extra["tool_calls"] = [
            _tool_call(f"{field}.tool_calls[{i}]", call) for i, call in enumerate(message.tool_calls)
        ]
    return ChatMessage(
        role=message.role,
        content=_text(f"{field}.content", message.content),
        extra=json.dumps(extra) if extra else "",
    )


def _text(field: str, content: str | list[dict[str, Any]] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(_text_of_part(f"{field}[{i}]", part) for i, part in enumerate(content))


def _text_of_part(field: str, part: dict[str, Any]) -> str:
    if part.get("type") != "text":
        raise invalid(f'{field}.type: must be "text", got {shown(str(part.get("type")))}')
    text = part.get("text")
    if not isinstance(text, str):
        raise invalid(f"{field}.text: must be a string")
    return text


def _tool_call(field: str, call: dict[str, Any]) -> dict[str, Any]:
    """With its arguments as an object, as templates want them; on the wire they are a text."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError) as err:
        raise invalid(f"{field}.function.arguments: is not JSON: {err}") from err
    return {**call, "function": {**function, "arguments": arguments}}

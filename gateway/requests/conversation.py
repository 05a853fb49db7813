"""A request's conversation to the text that its template makes of it."""

import json
from typing import Any

from checkpoint.chat_template import ChatError, ChatTemplate
from echelon.pb import inference_pb2
from gateway.requests.refusal import invalid

_FIELDS_OF_THEIR_OWN = ("messages", "add_generation_prompt", "continue_final_message")


def render_chat(chat: inference_pb2.ChatMessages, template: ChatTemplate) -> str:
    """Raises Refusal naming the field."""
    if not chat.messages:
        raise invalid("chat.messages: is empty")
    messages = [_message(i, message) for i, message in enumerate(chat.messages)]
    if not template.mentions("developer"):
        messages = [_spoken_by_the_system(message) for message in messages]
    variables = _variables(chat)
    if chat.continue_final_message and chat.add_generation_prompt:
        raise invalid(
            "chat.add_generation_prompt: begins a new message, and continue_final_message goes on with the last one: "
            "leave one of them out"
        )
    adds = chat.add_generation_prompt if chat.HasField("add_generation_prompt") else not chat.continue_final_message
    try:
        text = template.render(
            messages,
            add_generation_prompt=adds,
            continue_final_message=chat.continue_final_message,
            variables=variables,
        )
        text.encode()
    except ChatError as err:
        raise invalid(f"chat.messages: {err}") from err
    except UnicodeEncodeError as err:  # JSON can spell halves of characters
        raise invalid(f"chat: is not valid Unicode: {err.reason} at character {err.start}") from err
    return text


def _message(i: int, message: inference_pb2.ChatMessage) -> dict[str, Any]:
    if not message.role:
        raise invalid(f"chat.messages[{i}].role: is empty; usual roles are system, user and assistant")
    field = f"chat.messages[{i}].extra"
    extra = _json_object(message.extra, field)
    for key in ("role", "content"):
        if key in extra:
            raise invalid(f"{field}: {key} is a field of its own")
    return {"role": message.role, "content": message.content, **extra}


def _spoken_by_the_system(message: dict[str, Any]) -> dict[str, Any]:
    """The role "developer" is OpenAI's new name for "system"; older templates would write it out, or refuse it."""
    return {**message, "role": "system"} if message["role"] == "developer" else message


def _variables(chat: inference_pb2.ChatMessages) -> dict[str, Any]:
    field = "chat.chat_template_kwargs"
    variables = _json_object(chat.chat_template_kwargs, field)
    for name in _FIELDS_OF_THEIR_OWN:
        if name in variables:
            raise invalid(f"{field}: {name} is a field of its own")
    for name in ("tools", "documents"):
        value = variables.get(name)
        if value is not None and not (isinstance(value, list) and all(isinstance(item, dict) for item in value)):
            raise invalid(f"{field}: {name} must be a list of objects")
    return variables


def _json_object(text: str, field: str) -> dict[str, Any]:
    """{} for an empty text."""
    if not text:
        return {}
    try:
        value = json.loads(text)
    except ValueError as err:
        raise invalid(f"{field}: is not JSON: {err}") from err
    except RecursionError as err:
        raise invalid(f"{field}: is nested too deeply") from err
    if not isinstance(value, dict):
        raise invalid(f"{field}: must be a JSON object, got {type(value).__name__}")
    return value

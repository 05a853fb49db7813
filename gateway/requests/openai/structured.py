"""The ways in which clients of OpenAI's API and of vLLM ask for structured output."""

import json
from typing import Any

from echelon.pb.inference_pb2 import Choice, StructuredOutput
from gateway.requests.openai.bodies import GenerateBody
from gateway.requests.refusal import invalid, shown

_TYPES = ("text", "json_object", "json_schema", "regex", "grammar", "choice")


def structured_output_of(body: GenerateBody) -> tuple[StructuredOutput, str] | None:
    """What the answer shall keep to, and the field that says so. Raises Refusal."""
    found = [*_formatted(body), *_as_in_vllm(body)]
    if len(found) > 1:
        raise invalid(f"{found[1][1]}: {found[0][1]} is given too; leave one of them out")
    return found[0] if found else None


def structured_words(body: GenerateBody) -> list[tuple[str, str]]:
    """Messages about our field are about the client's."""
    found = structured_output_of(body)
    if found is None:
        return []
    wanted, field = found
    return [(f"structured_output.{wanted.WhichOneof('form')}:", f"{field}:"), ("structured_output:", f"{field}:")]


def _formatted(body: GenerateBody) -> list[tuple[StructuredOutput, str]]:
    wanted = body.response_format
    if wanted is None:
        return []
    kind = wanted.get("type")
    if kind not in _TYPES:
        raise invalid(f"response_format.type: must be one of {', '.join(_TYPES)}, got {shown(json.dumps(kind))}")
    if kind == "text":
        return []
    field = "response_format" if kind == "json_object" else f"response_format.{kind}"
    value = wanted.get(kind)
    if kind == "json_schema":
        if not isinstance(value, dict):
            raise invalid(f"{field}: must be an object with a schema")
        field, value = f"{field}.schema", value.get("schema")
    return [(_form(kind, value, field), field)]


def _as_in_vllm(body: GenerateBody) -> list[tuple[StructuredOutput, str]]:
    fields: list[tuple[str, str, Any]] = [
        ("json_schema", "guided_json", body.guided_json),
        ("regex", "guided_regex", body.guided_regex),
        ("choice", "guided_choice", body.guided_choice),
        ("grammar", "guided_grammar", body.guided_grammar),
    ]
    given = body.structured_outputs
    if given is not None:
        fields += [
            ("json_schema", "structured_outputs.json", given.as_json),
            ("json_object", "structured_outputs.json_object", given.json_object or None),
            ("regex", "structured_outputs.regex", given.regex),
            ("choice", "structured_outputs.choice", given.choice),
            ("grammar", "structured_outputs.grammar", given.grammar),
        ]
    return [(_form(form, value, field), field) for form, field, value in fields if value is not None]


def _form(form: str, value: Any, field: str) -> StructuredOutput:
    match form:
        case "json_schema" if isinstance(value, (dict, bool)):
            return StructuredOutput(json_schema=json.dumps(value))
        case "json_schema" if isinstance(value, str) and "json_schema.schema" not in field:
            return StructuredOutput(json_schema=value)
        case "json_object":
            return StructuredOutput(json_object=True)
        case "choice" if isinstance(value, list) and all(isinstance(text, str) for text in value):
            return StructuredOutput(choice=Choice(texts=value))
        case "regex" if isinstance(value, str):
            return StructuredOutput(regex=value)
        case "grammar" if isinstance(value, str):
            return StructuredOutput(grammar=value)
    wants = {"json_schema": "a JSON schema", "choice": "a list of texts"}.get(form, "a text")
    raise invalid(f"{field}: must be {wants}, got {shown(json.dumps(value))}")

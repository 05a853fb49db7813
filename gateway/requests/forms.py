"""The forms in which a request arrives, and how each is read."""

import enum

from checkpoint.chat_template import ChatTemplate
from echelon.pb.inference_pb2 import GenerateRequest
from echelon.pb.reading_pb2 import Reading
from echelon.pb.scheduler_pb2 import Submit
from gateway.requests.anthropic.messages import ask_messages, prompt_of
from gateway.requests.openai.bodies import ChatFields, DetokenizeBody, TokenizeBody, TokenizeChatBody, parse_body
from gateway.requests.openai.chat import SpecialId, ask_chat, chat_of
from gateway.requests.openai.completion import ask_completion
from gateway.requests.openai.job_lines import read_item, read_lines
from gateway.requests.openai.reading import read_asked
from gateway.requests.openai.responses import ask_response
from gateway.requests.refusal import invalid
from gateway.requests.validation import RequestValidator, decode_request, is_simple


class Form(enum.Enum):
    """What a request's bytes are."""

    GENERATE = b"g"  # a GenerateRequest
    COMPLETION = b"c"  # these and the following: the bodies of the paths of these names
    CHAT = b"h"
    MESSAGES = b"m"
    COUNT_TOKENS = b"n"  # of a body of MESSAGES
    RESPONSE = b"r"  # of join_request
    TOKENIZE = b"t"
    DETOKENIZE = b"d"
    JOB_LINES = b"l"  # of join_lines
    JOB_ITEM = b"i"  # of join_item


def read_request(form: Form, data: bytes, validator: RequestValidator) -> Reading:
    """What this costs depends on the client's text. Raises Refusal."""
    match form:
        case Form.GENERATE:
            return Reading(submits=[validator.read(data)])
        case Form.COMPLETION:
            return read_asked(ask_completion(data), validator)
        case Form.CHAT:
            return read_asked(ask_chat(data, *_model_words(validator)), validator)
        case Form.MESSAGES:
            return read_asked(ask_messages(data, *_model_words(validator)), validator)
        case Form.COUNT_TOKENS:
            return _tokenize_conversation(*prompt_of(data), validator)
        case Form.RESPONSE:
            return read_asked(ask_response(data, *_model_words(validator)), validator)
        case Form.TOKENIZE:
            return _tokenize(data, validator)
        case Form.DETOKENIZE:
            return _detokenize(data, validator)
        case Form.JOB_LINES:
            return read_lines(data)
        case Form.JOB_ITEM:
            return read_item(data, *_model_words(validator), validator)


def _model_words(validator: RequestValidator) -> tuple[ChatTemplate | None, SpecialId]:
    return validator.tokenizer.chat_template, validator.tokenizer.special_id


def read_simple_request(form: Form, data: bytes, validator: RequestValidator) -> Reading | None:
    """The same, if it costs no more than the bytes do; else None. Raises Refusal."""
    match form:
        case Form.GENERATE:
            request = decode_request(data)
            return Reading(submits=[validator.validate(request)]) if is_simple(request) else None
        case Form.COMPLETION:
            asked = ask_completion(data)
            return read_asked(asked, validator) if asked.is_simple else None
    return None


def _tokenize(data: bytes, validator: RequestValidator) -> Reading:
    body = parse_body(TokenizeBody, data)
    if body.prompt is None:
        return _tokenize_conversation(parse_body(TokenizeChatBody, data), body.model, validator)
    request = GenerateRequest(model=body.model or "", text=body.prompt)
    if body.add_special_tokens is not None:
        request.add_special_tokens = body.add_special_tokens
    return Reading(submits=[Submit(prompt_token_ids=validator.tokenize(request))])


def _tokenize_conversation(fields: ChatFields, model: str | None, validator: RequestValidator) -> Reading:
    request = GenerateRequest(model=model or "", chat=chat_of(fields))
    return Reading(submits=[Submit(prompt_token_ids=validator.tokenize(request))])


def _detokenize(data: bytes, validator: RequestValidator) -> Reading:
    body = parse_body(DetokenizeBody, data)
    validator.check_model(body.model or "")
    for i, token_id in enumerate(body.tokens):
        if token_id >= validator.vocab_size:
            raise invalid(f"tokens[{i}]: token id {token_id} is outside the vocabulary of {validator.vocab_size}")
    return Reading(text=validator.tokenizer.decode(body.tokens))

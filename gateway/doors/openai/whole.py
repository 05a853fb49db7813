"""An answer of OpenAI's API in one piece."""

from typing import Any

from echelon.pb.inference_pb2 import Finished, GenerateChunk, GenerateComplete
from gateway.core import Replies
from gateway.doors.json_text import as_list, to_json, write_list
from gateway.doors.openai.answers import Answer, Choice
from gateway.doors.openai.logprobs import extend_columns, prompt_columns, prompt_position, write_columns


async def whole_answer(answer: Answer, replies: Replies) -> str:
    """JSON. Raises Refusal."""
    completes: dict[int, GenerateComplete] = {}
    async for number, reply in replies:
        if isinstance(reply, GenerateComplete):
            completes[number] = reply
            answer.complete(reply)
        else:
            _collect(answer, answer.choices[number, reply.index], reply)
    choices, beside = [], {}
    for number, complete in sorted(completes.items()):
        said_of_prompt = await _said_of_prompt(answer, number, complete)
        beside = said_of_prompt if answer.shape.has_one_prompt else {}
        for finished in complete.finished:
            choice = await _choice(answer, answer.choices[number, finished.index], complete, finished)
            choices.append(choice if answer.shape.has_one_prompt else {**choice, **said_of_prompt})
    kind = {"object": answer.shape.kind}
    return to_json({**answer.head, **kind, "choices": choices, "usage": answer.usage(), **beside})


def _collect(answer: Answer, choice: Choice, chunk: GenerateChunk) -> None:
    answer.count(chunk)
    if answer.wishes.only_echo:
        return
    choice.text.append(chunk.text)
    answer.collect(choice, chunk)


async def _choice(answer: Answer, choice: Choice, complete: GenerateComplete, finished: Finished) -> dict[str, Any]:
    columns = choice.columns
    if answer.wishes.echoes and answer.wants_logprobs(choice):
        columns = await prompt_columns(answer.wishes.echoes[choice.number], complete.prompt_logprobs)
        extend_columns(columns, choice.columns)
    tokens: dict[str, Any] = {}
    if answer.wishes.token_ids:
        tokens["token_ids"] = as_list(map(str, choice.token_ids))
    if answer.wishes.drafted:
        tokens["drafted"] = choice.drafted
    return {
        "index": choice.index,
        **answer.shape.whole(choice.echo + "".join(choice.text), choice.parser),
        "logprobs": write_columns(columns),
        **answer.finish(choice, finished),
        **tokens,
    }


async def _said_of_prompt(answer: Answer, number: int, complete: GenerateComplete) -> dict[str, Any]:
    said: dict[str, Any] = await answer.prompt_token_ids(number)
    if complete.prompt_logprobs:
        said["prompt_logprobs"] = await write_list(complete.prompt_logprobs, prompt_position)
    return said

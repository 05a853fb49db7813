"""A request that goes on here after the scheduler that began it was lost, or the gateway."""

import math
from collections.abc import Iterable

from echelon.pb import inference_pb2, scheduler_pb2
from scheduler.requests.checks import InvalidRequestError, check_token_ids
from scheduler.requests.request import Request, Seq
from scheduler.requests.stopping import Finish


def replay(
    submit: scheduler_pb2.Submit, request: Request, vocab_size: int, approximations: Iterable[str]
) -> list[tuple[Seq, Finish]]:
    """If the request goes on, give each sample the tokens that its client has. Returns those that have ended with them.

    `approximations`: what may have made these tokens approximate. Whether it did, nobody knows any longer.

    Raises InvalidRequestError.
    """
    if not submit.HasField("resume_from"):
        return []
    resume = submit.resume_from
    if len(resume.samples) != len(request.seqs):
        raise InvalidRequestError(
            f"resume_from.samples must be as many as n, {len(request.seqs)}, got {len(resume.samples)}"
        )
    if not 0 <= resume.first_token_s <= resume.elapsed_s < math.inf:
        times = f"{resume.first_token_s:g} and {resume.elapsed_s:g}"
        raise InvalidRequestError(f"resume_from: needs 0 <= first_token_s <= elapsed_s, got {times}")
    ended = []
    for seq, sample in zip(request.seqs, resume.samples, strict=True):
        finish = _replay(seq, sample, vocab_size)
        if finish is not None:
            ended.append((seq, finish))
    _keep_prompt_logprobs(request, [seq for seq, _ in ended])
    request.arrived_s -= resume.elapsed_s
    if any(seq.num_outputs for seq in request.seqs):
        request.approximations.update(approximations)
    if resume.HasField("first_token_s"):
        request.note_token(request.arrived_s + resume.first_token_s)
    return ended


def _replay(seq: Seq, sample: inference_pb2.ResumedSample, vocab_size: int) -> Finish | None:
    where = f"resume_from.samples[{seq.index}].token_ids"
    token_ids = list(sample.token_ids)
    check_token_ids(token_ids, vocab_size, where)
    seq.output.skip(sample.num_chars)
    for number, token_id in enumerate(token_ids, start=1):
        seq.token_ids.append(token_id)
        finish = seq.output.push(token_id)
        if finish is not None:
            if number < len(token_ids):
                raise InvalidRequestError(f"{where}: the sample ends with token {number}, but has {len(token_ids)}")
            return finish
    return None


def _keep_prompt_logprobs(request: Request, ended: list[Seq]) -> None:
    """They come from the sample that computes the prompt. If the first one has ended, another one does it."""
    first = request.seqs[0]
    if request.prompt_logprobs is None or first not in ended:
        return
    others = [seq for seq in request.seqs if seq not in ended]
    if not others:
        raise InvalidRequestError("prompt_logprobs: they were lost, though all tokens had come; ask again")
    others[0].sampling.prompt_logprobs = first.sampling.prompt_logprobs

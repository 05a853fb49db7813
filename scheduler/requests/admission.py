"""Turns a client's Submit into a request, or into an error that names the field."""

from collections.abc import Iterable

from checkpoint.token_table import TokenTable
from childproc.block_digests import DigestChain, root_digest
from echelon.pb import sampling_pb2, scheduler_pb2
from scheduler.config import SchedulerConfig
from scheduler.requests.checks import check_grammar, check_submit, check_token_ids
from scheduler.requests.detokenizer import Detokenizer
from scheduler.requests.request import Request, Seq
from scheduler.requests.stopping import OutputText, StopRules, StopStrings


def build_request(
    submit: scheduler_pb2.Submit,
    *,
    config: SchedulerConfig,
    max_model_len: int,
    vocab_size: int,
    table: TokenTable,
    block_size: int,
    number: int,
    now: float,
) -> Request:
    """A request with its seqs, none of them started. `number`: its place in the order of arrival.

    Raises InvalidRequestError.
    """
    check_submit(submit, max_model_len=max_model_len, vocab_size=vocab_size)
    check_grammar(submit, config.eos_token_ids)
    sampling = submit.sampling
    prompt = list(submit.prompt_token_ids)
    check_token_ids(prompt, vocab_size, "prompt_token_ids")
    max_len = _max_len(submit, max_model_len)
    request = _new_request(submit, now)
    rules = _stop_rules(submit, config, max_tokens=max_len - len(prompt))
    root = root_digest(config.model_name, block_size, submit.cache_salt)
    request.seqs += [
        Seq(
            request=request,
            index=index,
            order=(submit.is_background, number, index),
            token_ids=prompt.copy(),
            max_len=max_len,
            sampling=_seq_sampling(submit, config, rules.stop_token_ids, index),
            output=OutputText(rules, _detokenizer(submit, table)),
            digests=DigestChain(root, block_size),
        )
        for index in range(sampling.n)
    ]
    return request


def _new_request(submit: scheduler_pb2.Submit, now: float) -> Request:
    num_prompt = len(submit.prompt_token_ids)
    return Request(
        request_id=submit.request_id,
        tenant=submit.tenant,
        is_background=submit.is_background,
        is_budgeted=submit.attention.mode == "budgeted",
        num_prompt_tokens=num_prompt,
        arrived_s=now,
        deadline_s=now + submit.timeout_s if submit.HasField("timeout_s") else None,
        seed=submit.sampling.seed,
        prompt_logprobs=[None] * (num_prompt - 1) if submit.sampling.HasField("prompt_logprobs") else None,
    )


def _stop_rules(submit: scheduler_pb2.Submit, config: SchedulerConfig, *, max_tokens: int) -> StopRules:
    sampling = submit.sampling
    return StopRules(
        stop_token_ids=_stop_token_ids(sampling, config),
        final_token_ids=config.eos_token_ids if submit.grammar else frozenset(),
        strings=StopStrings(sampling.stop),
        include_stop_str=sampling.include_stop_str_in_output,
        min_tokens=sampling.min_tokens,
        max_tokens=max_tokens,
    )


def _detokenizer(submit: scheduler_pb2.Submit, table: TokenTable) -> Detokenizer:
    skips = submit.sampling.skip_special_tokens
    follows_text = table.has_start_rule and table.shows(submit.prompt_token_ids, skip_special_tokens=skips)
    return Detokenizer(table, skip_special_tokens=skips, follows_text=follows_text)


def _max_len(submit: scheduler_pb2.Submit, max_model_len: int) -> int:
    num_prompt, sampling = len(submit.prompt_token_ids), submit.sampling
    room = max_model_len - num_prompt
    return num_prompt + (min(sampling.max_tokens, room) if sampling.HasField("max_tokens") else room)


def _stop_token_ids(sampling: sampling_pb2.SamplingParams, config: SchedulerConfig) -> frozenset[int]:
    own: Iterable[int] = sampling.stop_token_ids
    return frozenset(own) if sampling.ignore_eos else config.eos_token_ids.union(own)


def _seq_sampling(
    submit: scheduler_pb2.Submit, config: SchedulerConfig, stop_token_ids: frozenset[int], index: int
) -> sampling_pb2.SeqSampling:
    sampling = submit.sampling
    resolved = sampling_pb2.SeqSampling(
        seed=sampling.seed,
        sample_index=index,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=dict(sampling.logit_bias),
        min_tokens=sampling.min_tokens,
        suppressed_token_ids=sorted(stop_token_ids),
    )
    if sampling.HasField("logprobs"):
        resolved.logprobs = sampling.logprobs
    if sampling.HasField("prompt_logprobs") and index == 0:
        resolved.prompt_logprobs = sampling.prompt_logprobs
    if submit.grammar:
        resolved.grammar.source = submit.grammar
        resolved.grammar.eos_token_ids.extend(sorted(config.eos_token_ids))
    return resolved

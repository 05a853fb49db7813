"""What a request says of attention, against what the engine can do."""

from typing import Any

from childproc.request_limits import ATTENTION_MODES
from echelon.pb import scheduler_pb2
from scheduler.engines.engine import EngineView
from scheduler.requests.checks import InvalidRequestError
from scheduler.requests.request import Request


def longest_seq(submit: scheduler_pb2.Submit, engine: EngineView[Any]) -> int:
    """Most tokens that a seq of the request may have. Raises InvalidRequestError."""
    mode, num_prompt = submit.attention.mode or "full", len(submit.prompt_token_ids)
    if mode not in ATTENTION_MODES:
        raise InvalidRequestError(f"attention.mode must be one of {', '.join(ATTENTION_MODES)}, got {mode!r}")
    on_device, in_host = engine.longest_seq, engine.longest_in_host
    if mode == "full":
        if on_device <= num_prompt < in_host:
            raise InvalidRequestError(
                f"prompt_token_ids has {num_prompt} tokens, and the devices have room for {on_device}: shorten the "
                "prompt, or set attention.mode to budgeted"
            )
        return on_device
    if not engine.is_budgeted:
        raise InvalidRequestError(
            "attention.mode must be full here: budgeted needs `attention: budgeted` and kv_cache.cpu_bytes in the "
            "deployment file"
        )
    if in_host <= num_prompt < engine.info.max_model_len:
        raise InvalidRequestError(
            f"prompt_token_ids has {num_prompt} tokens, and host memory has room for {in_host}: shorten the prompt, or "
            "raise kv_cache.cpu_bytes in the deployment file"
        )
    return in_host


def no_longer_fits(request: Request, engine: EngineView[Any]) -> str:
    """Why a request that was accepted cannot go on."""
    return f"the target was started again and has room for {engine.longest(request)} tokens: lower max_tokens"

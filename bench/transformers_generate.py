"""The same prompts on `transformers`: plain greedy generation, and assisted generation with the draft."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM


class TransformersPair:
    """Target and draft in this process, one prompt at a time, as assisted generation requires."""

    def __init__(self, target: Path, draft: Path, *, dtype: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._target = _load(target, dtype)
        self._draft = _load(draft, dtype)

    def tokens_per_s(self, prompts: Sequence[Sequence[int]], *, num_tokens: int, num_drafts: int | None) -> float:
        """Over all prompts, prefill included. `num_drafts`: drafts per round; None: without the draft."""
        options: dict[str, Any] = {}
        if num_drafts is not None:
            settings = self._draft.generation_config
            settings.num_assistant_tokens = num_drafts
            settings.num_assistant_tokens_schedule = "constant"
            settings.assistant_confidence_threshold = 0.0
            options["assistant_model"] = self._draft
        num_written, seconds = 0, 0.0
        for prompt in prompts:
            input_ids = torch.tensor([prompt])
            started = time.perf_counter()
            with torch.inference_mode():
                output = self._target.generate(
                    input_ids,
                    attention_mask=torch.ones_like(input_ids),
                    **options,
                    max_new_tokens=num_tokens,
                    min_new_tokens=num_tokens,
                    do_sample=False,
                    pad_token_id=0,
                )
            seconds += time.perf_counter() - started
            num_written += output.shape[1] - input_ids.shape[1]
        return num_written / seconds


def _load(folder: Path, dtype: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))

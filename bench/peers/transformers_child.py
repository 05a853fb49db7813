"""`transformers` as a child of `bench.peers`: static batches, and assisted generation of one request at a time."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from bench.peers.child import serve
from bench.peers.runs import Models, OpenStream, Run, Stream, Task

PAD = 0


class TransformersEngine:
    def __init__(self, models: Models) -> None:
        torch.set_num_threads(models.threads)
        self._target = _load(models.target, models.dtype)
        self._assistant: dict[str, Any] = {}
        if models.draft is not None:
            draft = _load(models.draft, models.dtype)
            settings = draft.generation_config
            settings.num_assistant_tokens = models.num_drafts
            settings.num_assistant_tokens_schedule = "constant"
            settings.assistant_confidence_threshold = 0.0
            self._assistant["assistant_model"] = draft
        self.about = f"transformers {transformers.__version__}, torch {torch.__version__}"

    def run(self, task: Task) -> Run:
        started = time.perf_counter()
        streams: list[Stream] = []
        for start in range(0, len(task.prompts), task.concurrency):
            batch = task.prompts[start : start + task.concurrency]
            streams += self._generate(batch, task.num_tokens)
        return Run(streams=streams, seconds=time.perf_counter() - started)

    def _generate(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[Stream]:
        longest = max(map(len, prompts))
        padded = [[PAD] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        recorder = Recorder(len(prompts))
        with torch.inference_mode():
            self._target.generate(
                torch.tensor(padded),
                attention_mask=torch.tensor(mask),
                max_new_tokens=num_tokens,
                do_sample=False,
                pad_token_id=PAD,
                streamer=recorder,
                **self._assistant,
            )
        return recorder.streams()


class Recorder(BaseStreamer):
    """Receives the tokens of each round. The first call brings the prompt."""

    def __init__(self, num_rows: int) -> None:
        self._rows = [OpenStream() for _ in range(num_rows)]
        self._saw_prompt = False

    def put(self, value: torch.Tensor) -> None:  # [num_rows] for a step, [1, num_tokens] for an assisted round
        if self._saw_prompt:
            for row, token_ids in zip(self._rows, value.reshape(len(self._rows), -1).tolist(), strict=True):
                row.add(token_ids)
        self._saw_prompt = True

    def end(self) -> None:
        pass

    def streams(self) -> list[Stream]:
        return [row.close() for row in self._rows]


def _load(folder: str, dtype: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(Path(folder), dtype=getattr(torch, dtype))
    model.generation_config.eos_token_id = None  # every request writes all its tokens
    return model


if __name__ == "__main__":
    serve(TransformersEngine)

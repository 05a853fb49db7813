"""vLLM as a child of `bench.peers`. It runs under vLLM's own Python, so it imports nothing that needs our packages.

The engine runs in this process and is stepped here: without vLLM's server, no message passes between processes.
"""

import time
from collections import deque
from typing import Any

import vllm
from vllm.sampling_params import RequestOutputKind

from bench.peers.child import serve
from bench.peers.runs import Models, OpenStream, Run, Stream, Task

KV_CACHE_BYTES = 1 << 30  # as Echelon takes on CPUs where nothing is set


class VllmEngine:
    def __init__(self, models: Models) -> None:
        options: dict[str, Any] = {}
        if models.draft is not None:
            options["speculative_config"] = {
                "model": models.draft,
                "num_speculative_tokens": models.num_drafts,
                "method": "draft_model",
            }
        self._engine = vllm.LLM(
            models.target,
            dtype=models.dtype,
            max_num_seqs=models.max_num_seqs,
            kv_cache_memory_bytes=KV_CACHE_BYTES,
            enable_prefix_caching=False,
            **options,
        ).llm_engine
        self.about = f"vLLM {vllm.__version__}, compiled, prefix caching off, KV cache of {KV_CACHE_BYTES >> 20} MiB"

    def run(self, task: Task) -> Run:
        started = time.perf_counter()
        waiting = deque(enumerate(task.prompts))
        running: dict[str, OpenStream] = {}
        finished: dict[str, Stream] = {}
        params = vllm.SamplingParams(
            temperature=0.0, max_tokens=task.num_tokens, ignore_eos=True, output_kind=RequestOutputKind.DELTA
        )
        while waiting or running:
            while waiting and len(running) < task.concurrency:
                index, prompt = waiting.popleft()
                running[str(index)] = OpenStream()
                self._engine.add_request(str(index), {"prompt_token_ids": prompt}, params)
            for output in self._engine.step():
                running[output.request_id].add(output.outputs[0].token_ids)
                if output.finished:
                    finished[output.request_id] = running.pop(output.request_id).close()
        streams = [finished[str(index)] for index in range(len(task.prompts))]
        return Run(streams=streams, seconds=time.perf_counter() - started)


if __name__ == "__main__":
    serve(VllmEngine)

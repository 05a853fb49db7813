"""Sends prompts to a gateway and times them, for all benchmarks."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from echelon import AsyncClient
from echelon.requests import GenerateOptions, Prompt
from echelon.results import Completion


@dataclass(frozen=True, slots=True)
class Timed:
    """Requests that ran side by side."""

    completions: Sequence[Completion]
    seconds: float  # from the first request sent to the last token received, prefill included
    arrivals_s: Sequence[Sequence[float]]  # of each request's chunks, since that request was sent

    @property
    def num_tokens(self) -> int:
        return sum(completion.usage.completion_tokens for completion in self.completions)

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds


def run_side_by_side(
    address: str, prompts: Sequence[Prompt], options: GenerateOptions, *, concurrency: int | None = None
) -> Timed:
    """The prompts as requests of one client, `concurrency` at a time (default: all at once)."""
    slots = asyncio.Semaphore(concurrency or len(prompts))

    async def generate(client: AsyncClient, prompt: Prompt) -> tuple[Completion, list[float]]:
        async with slots:
            sent = time.perf_counter()
            async with client.stream(prompt, **options) as stream:
                arrivals_s = [time.perf_counter() - sent async for _ in stream]
                return await stream.result(), arrivals_s

    async def run() -> Timed:
        async with AsyncClient(address) as client:
            await client.server_info()  # connected before the clock starts
            started = time.perf_counter()
            results = await asyncio.gather(*(generate(client, prompt) for prompt in prompts))
            seconds = time.perf_counter() - started
            completions, arrivals_s = zip(*results, strict=True)
            return Timed(completions, seconds, arrivals_s)

    return asyncio.run(run())

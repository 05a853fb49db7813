"""Timing on CPU and on CUDA, and the limit to compare with: how fast this machine copies memory."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from bench.report import Spread, hardware

Step = Callable[[], object]
CPU_CACHE_BYTES = 32 << 20
CACHES_TO_EXCEED = 4  # what each call reads again must be this many times larger than the cache
SLEEP_CYCLES = 2_000_000  # 1 ms, in which the host gets ahead, so that a call's launch is not timed


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    device: torch.device
    runs: int
    min_run_s: float = 0.02  # on CPU: a run repeats a step for at least this long

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.on_gpu else hardware()

    @property
    def cache_bytes(self) -> int:
        """Size of the last-level cache."""
        return torch.cuda.get_device_properties(self.device).L2_cache_size if self.on_gpu else CPU_CACHE_BYTES

    def time_in_turn(self, steps: Sequence[Step]) -> list[Spread]:
        """Microseconds per call of each step. Every run times all steps one after the other, so that a drift of the
        machine's speed affects all alike."""
        return self._on_gpu(steps) if self.on_gpu else self._on_cpu(steps)

    def copy_bytes_per_us(self, num_bytes: int) -> float:
        """Bytes read and written per microsecond when copying num_bytes: the limit of operators that move data."""
        source = torch.empty(num_bytes, dtype=torch.uint8, device=self.device).fill_(1)
        target = torch.empty_like(source)
        return 2 * num_bytes / self.time_in_turn([partial(target.copy_, source)])[0].median

    def _on_cpu(self, steps: Sequence[Step]) -> list[Spread]:
        calls = []
        for step in steps:
            step()
            started_s = time.perf_counter()
            step()
            calls.append(max(1, round(self.min_run_s / (time.perf_counter() - started_s))))
        times_us: list[list[float]] = [[] for _ in steps]
        for _ in range(self.runs):
            for step, num_calls, step_times_us in zip(steps, calls, times_us, strict=True):
                started_s = time.perf_counter()
                for _ in range(num_calls):
                    step()
                step_times_us.append((time.perf_counter() - started_s) / num_calls * 1e6)
        return [Spread.of(times) for times in times_us]

    def _on_gpu(self, steps: Sequence[Step]) -> list[Spread]:
        """Times single calls with events after a warm-up, which also compiles. The cache is full of other data."""
        for step in steps:
            for _ in range(3):
                step()
        filler = torch.empty(CACHES_TO_EXCEED * self.cache_bytes, dtype=torch.uint8, device=self.device)
        events: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in steps]
        for _ in range(self.runs):
            for step, step_events in zip(steps, events, strict=True):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                filler.zero_()
                torch.cuda._sleep(SLEEP_CYCLES)
                begin.record()
                step()
                end.record()
                end.synchronize()
                step_events.append((begin, end))
        return [Spread.of([begin.elapsed_time(end) * 1e3 for begin, end in pairs]) for pairs in events]

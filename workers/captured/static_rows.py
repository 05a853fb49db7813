"""The rows for which captured steps choose tokens: their settings, and where the choices go."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.sampling.noise_keys import NoiseKeys
from workers.captured.static_tensor import StaticTensor, Uploads
from workers.sampling.rows import RowEntry, SamplingRows
from workers.sampling.sampler import SampledRows

MOST_CHOICES = 16  # of a chain in a round
NUM_ALTERNATIVES = 3  # as many as the scheduler asks for (scheduler/drafting/verdict_cache.py)


def is_plain(entries: Sequence[RowEntry]) -> bool:
    """Whether temperature and noise decide the tokens of all these rows, so that their number decides all shapes."""
    return not any(
        entry.state.truncates or entry.state.logprobs is not None or entry.state.edits_logits_at(entry.position)
        for entry in entries
    )


class StaticRows:
    """Settings of up to `num_rows` rows, which change from step to step only by their position, and choices."""

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self._temperature = StaticTensor.zeros(num_rows, dtype=torch.float32, device=device)
        self._keys = [StaticTensor.zeros(num_rows, dtype=torch.int64, device=device) for _ in range(3)]
        self._step = torch.ones(1, dtype=torch.int64, device=device)  # whose choices come next
        self._token_ids = torch.zeros(MOST_CHOICES, num_rows, dtype=torch.int64, device=device)
        self._non_finite = torch.zeros(MOST_CHOICES, num_rows, dtype=torch.bool, device=device)
        self._alternatives = torch.zeros(MOST_CHOICES, num_rows, NUM_ALTERNATIVES, dtype=torch.int64, device=device)
        self._confidences = torch.zeros(MOST_CHOICES, num_rows, dtype=torch.float32, device=device)
        self._uploads = Uploads(device)

    def rows(self, num_rows: int) -> SamplingRows:
        """What a step of so many rows reads."""
        seeds, sample_indices, positions = (key.there[:num_rows] for key in self._keys)
        return SamplingRows(
            temperature=self._temperature.there[:num_rows],
            keys=NoiseKeys(seeds=seeds, sample_indices=sample_indices, positions=positions),
            edits=None,
            truncated_rows=None,
            truncation=None,
            logprob_rows=(),
            num_logprobs=(),
        )

    def restart(self) -> None:
        """The choices of the next step are the second of their chains."""
        self._step.fill_(1)

    def fill(self, entries: Sequence[RowEntry], num_rows: int, first: SampledRows) -> None:
        """Let the next step of so many rows continue after these first choices. Does not wait."""
        columns: list[list[int]] = [
            [entry.state.seed for entry in entries],
            [entry.state.sample_index for entry in entries],
            [entry.position for entry in entries],
        ]
        self._uploads.begin()
        self._temperature.fill([entry.state.temperature for entry in entries], num_rows, padding=0)
        for key, column in zip(self._keys, columns, strict=True):
            key.fill(column, num_rows, padding=0)
        self._uploads.end()
        self.restart()
        self._token_ids[0, len(entries) : num_rows] = 0
        self._write(0, first)

    def _write(self, step: int, choices: SampledRows) -> None:
        count = choices.token_ids.shape[0]
        self._token_ids[step, :count] = choices.token_ids
        self._non_finite[step, :count] = choices.non_finite
        if choices.alternatives is not None:
            self._alternatives[step, :count, : choices.alternatives.shape[1]] = choices.alternatives
        if choices.confidences is not None:
            self._confidences[step, :count] = choices.confidences

    def advance(self, num_rows: int) -> Tensor:
        """The tokens chosen last, int64 [num_rows]. The rows move one position on. Part of a captured step."""
        self._keys[2].there[:num_rows].add_(1)
        return self._token_ids[:, :num_rows].index_select(0, self._step - 1).squeeze(0)

    def put(self, choices: SampledRows) -> None:
        """Keep the choices of a step. Part of it."""
        num_rows = choices.token_ids.shape[0]
        kept: list[tuple[Tensor, Tensor | None]] = [
            (self._token_ids, choices.token_ids),
            (self._non_finite, choices.non_finite),
            (self._alternatives, choices.alternatives),
            (self._confidences, choices.confidences),
        ]
        for tensor, values in kept:
            if values is not None:
                tensor[:, :num_rows].index_copy_(0, self._step, values.unsqueeze(0))
        self._step.add_(1)

    def choices(self, num_steps: int, num_rows: int, like: SampledRows) -> list[SampledRows]:
        """The choices of the first steps, on the host, with what `like` has. A step with logits that are not finite is
        the last. Waits for the device."""
        kept = slice(0, num_steps), slice(0, num_rows)
        token_ids, non_finite = self._token_ids[kept].cpu(), self._non_finite[kept].cpu()
        alternatives, confidences = None, None
        if like.alternatives is not None:
            alternatives = self._alternatives[kept][:, :, : like.alternatives.shape[1]].cpu()
        if like.confidences is not None:
            confidences = self._confidences[kept].cpu()
        num_good = num_steps - int(non_finite.any(dim=1).int().cummax(dim=0).values.sum())
        return [
            SampledRows(
                token_ids=token_ids[step],
                non_finite=non_finite[step],
                logprobs=None,
                alternatives=None if alternatives is None else alternatives[step],
                confidences=None if confidences is None else confidences[step],
            )
            for step in range(min(num_good + 1, num_steps))
        ]

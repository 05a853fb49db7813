"""How many replicas the load asks for. Pure: times are seconds of one clock."""

from collections import deque
from math import ceil, inf

from cluster.deployment.settings import ScalingSettings


class Scaling:
    """Follows the number of requests that wait or run, with hysteresis as in the horizontal autoscaler of Kubernetes.

    Replicas are added when more were needed throughout `upscale_delay_s`, and removed when fewer would have done
    throughout `downscale_delay_s`. So a peak adds none, and a pause between peaks removes none.
    """

    def __init__(self, settings: ScalingSettings, *, least: int, most: int) -> None:
        self._settings = settings
        self._least, self._most = least, most
        self._needed: deque[tuple[float, int]] = deque()  # when how many were needed, oldest first

    def wanted(self, num_replicas: int, num_requests: int, now: float) -> int:
        """How many there should be, where `num_replicas` run or are being started."""
        needed = ceil(num_requests / self._settings.target_ongoing_requests)
        self._needed.append((now, min(max(needed, self._least), self._most)))
        longest_s = max(self._settings.upscale_delay_s, self._settings.downscale_delay_s)
        while len(self._needed) > 1 and self._needed[1][0] <= now - longest_s:
            self._needed.popleft()
        at_least = min(self._within(self._settings.upscale_delay_s, now), default=-inf)
        at_most = max(self._within(self._settings.downscale_delay_s, now), default=inf)
        return int(min(max(num_replicas, at_least), at_most))

    def _within(self, delay_s: float, now: float) -> list[int]:
        """What was needed during the last `delay_s`; nothing if that is not known for all of it."""
        if self._needed[0][0] > now - delay_s:
            return []
        past = [number for at_s, number in self._needed if at_s <= now - delay_s]
        return [past[-1], *(number for at_s, number in self._needed if at_s > now - delay_s)]

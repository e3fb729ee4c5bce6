"""Token buckets: how often one caller may ask for one kind of thing. Generous by default; the caller sees 429."""

from __future__ import annotations

from pantala.errors import RateLimited
from pantala.kit.clock import Clock

BUCKETS_MAX = 10_000


class RateLimits:
    def __init__(self, clock: Clock, *, per_s: float, burst: int) -> None:
        self._clock = clock
        self._per_s = per_s
        self._burst = burst
        self._buckets: dict[str, tuple[float, float]] = {}

    def take(self, key: str) -> None:
        """Raises RateLimited when `key` has asked too often."""
        now = self._clock.monotonic()
        left, at = self._buckets.pop(key, (float(self._burst), now))
        left = min(float(self._burst), left + (now - at) * self._per_s)
        allowed = left >= 1
        self._buckets[key] = (left - 1 if allowed else left, now)  # newest last: the oldest is dropped first
        if len(self._buckets) > BUCKETS_MAX:
            self._buckets.pop(next(iter(self._buckets)))
        if not allowed:
            raise RateLimited("too many requests", retry_after_s=(1 - left) / self._per_s)

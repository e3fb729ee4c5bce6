"""Token buckets: how often one caller may do one thing to one machine or app. Generous by default; the caller sees 429.

As the original counts: each action for each machine (else app) by itself, reads of a machine more, deletions of apps
all together. Callers have buckets of their own, so that nobody can use up somebody else's.
"""

from __future__ import annotations

import msgspec

from pantala.errors import RateLimited
from pantala.kit.clock import Clock
from pantala.server.endpoint import Rate

BUCKETS_MAX = 10_000


class Bucket(msgspec.Struct, frozen=True):
    """How fast it fills and how much it holds."""

    per_s: float
    burst: int


class RateLimits:
    """`machine_read` and `app_deletion` are as `action` where they are not given."""

    def __init__(
        self,
        clock: Clock,
        *,
        per_s: float,
        burst: int,
        machine_read: Bucket | None = None,
        app_deletion: Bucket | None = None,
    ) -> None:
        self._clock = clock
        action = Bucket(per_s, burst)
        self._sizes: dict[Rate, Bucket] = {
            "action": action,
            "machine_read": machine_read or action,
            "app_deletion": app_deletion or action,
        }
        self._buckets: dict[str, tuple[float, float]] = {}

    def take(self, key: str, rate: Rate = "action") -> None:
        """Raises RateLimited when `key` has asked too often."""
        size = self._sizes[rate]
        now = self._clock.monotonic()
        left, at = self._buckets.pop(key, (float(size.burst), now))
        left = min(float(size.burst), left + (now - at) * size.per_s)
        allowed = left >= 1
        self._buckets[key] = (left - 1 if allowed else left, now)  # newest last: the oldest is dropped first
        if len(self._buckets) > BUCKETS_MAX:
            self._buckets.pop(next(iter(self._buckets)))
        if not allowed:
            raise RateLimited("too many requests", retry_after_s=(1 - left) / size.per_s)

"""How far an owner's clock is ahead of ours, as its beats tell."""

from __future__ import annotations

WHILE_S = 30.0


class Ahead:
    """Each beat says too little: by the way it took, and by how late it was read. A reader with more to do than it can
    may be seconds late, so what counts is the most that was said in the last half minute, and the one before it."""

    def __init__(self) -> None:
        self._newest: list[int] = []
        """The most of this half minute, and of the one before."""
        self._since_s = 0.0

    def hear(self, at_ms: int, now_s: float) -> None:
        said = at_ms - int(now_s * 1000)
        if not self._newest or now_s - self._since_s >= 2 * WHILE_S:
            self._newest, self._since_s = [said], now_s
        elif now_s - self._since_s >= WHILE_S:
            self._newest, self._since_s = [said, self._newest[0]], now_s
        else:
            self._newest[0] = max(said, self._newest[0])

    @property
    def ms(self) -> int:
        """Of its clock above our monotonic one."""
        return max(self._newest)

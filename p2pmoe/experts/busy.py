"""`BusyShare`: how much of its time a device computed lately, later moments counting more."""

from __future__ import annotations

import math

MEMORY = 10.0  # seconds after which a moment counts 1/e; a guess, a probe sees it as often


class BusyShare:
    """Told of each batch when it ends. Times in seconds, in the order in which they pass."""

    def __init__(self, now: float) -> None:
        self._share, self._at = 0.0, now

    def worked(self, begun: float, ended: float) -> None:
        """It computed from `begun` to `ended`."""
        rest = math.exp(-max(0.0, ended - begun) / MEMORY)
        self._share = self.share(begun) * rest + (1.0 - rest)
        self._at = ended

    def share(self, now: float) -> float:
        """From 0 to 1."""
        return self._share * math.exp(-max(0.0, now - self._at) / MEMORY)

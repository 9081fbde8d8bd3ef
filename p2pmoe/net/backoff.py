"""How long to leave a peer alone after a failed dial: twice as long each time, with jitter."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class BackoffParams:
    """Seconds. The jitter keeps many dialers of one restarted peer apart."""

    first: float = 0.5  # s after the first failure; a guess
    most: float = 30.0  # s; a guess, a peer that came back is found within this
    jitter: float = 0.5  # a wait is longer by up to this part of itself; a guess


class Backoff:
    """One peer's."""

    __slots__ = ("_base", "_params", "_until")

    def __init__(self, params: BackoffParams) -> None:
        self._params = params
        self.clear()

    def clear(self) -> None:
        """The peer was reached, or reached this side."""
        self._base, self._until = self._params.first, 0.0

    def failed(self, now: float, rng: random.Random) -> None:
        """Another dial has failed."""
        wait = self._base * (1 + self._params.jitter * rng.random())
        self._base = min(self._params.most, 2 * self._base)
        self._until = now + min(self._params.most, wait)

    def wait(self, now: float) -> float:
        """Seconds until the next dial may begin, 0 when it may."""
        return max(0.0, self._until - now)

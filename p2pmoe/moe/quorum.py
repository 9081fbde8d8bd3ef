"""`Quorum`: how long a batch waits for its experts; `Waits`: how long batches did.

A row is served when `k_min` of its parts are answered. When every row is served, or can no longer
be, the rest has `grace` to arrive; rows that are not served when `patience` is over stay so.
Rules: a part is answered or failed once; time is a number that the caller passes in.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

WAITS_KEPT = 64  # batches that the median is taken over; a guess
WAITS_NEEDED = 8  # batches before there is a median; a guess: the first ones also open connections


@dataclass(frozen=True, slots=True)
class QuorumParams:
    """When to stop waiting. Seconds, counted from the batch's start, but for `grace`."""

    k_min: int
    grace: float
    patience: float
    timeout: float


class Quorum:
    """Which parts of a batch have come, and until when it is worth waiting for the others."""

    def __init__(
        self, rows_of: Mapping[int, NDArray[np.int64]], rows: int, params: QuorumParams, now: float
    ) -> None:
        self._rows_of = dict(rows_of)
        self._params = params
        self._started = now
        self._answers = np.zeros(rows, dtype=np.int64)
        self._awaited = self._count(rows_of)
        self._settled_at = now if self._settled else math.inf
        self._last_answer = -math.inf

    @property
    def _settled(self) -> bool:
        return bool(np.all((self._answers >= self._params.k_min) | (self._awaited == 0)))

    @property
    def served(self) -> NDArray[np.bool_]:
        """Which rows have their `k_min` answers."""
        return self._answers >= self._params.k_min

    @property
    def rows_served(self) -> int:
        """How many they are."""
        return int(self.served.sum())

    def asked(self, rows_of: Mapping[int, NDArray[np.int64]]) -> None:
        """More parts are asked, for rows of this batch."""
        self._rows_of |= rows_of
        self._awaited += self._count(rows_of)

    def answered(self, parts: Iterable[int], now: float) -> None:
        """Answers came that can be used."""
        parts = list(parts)
        self._answers += self._count(parts)
        self._last_answer = now if self._settled_at == math.inf else self._last_answer
        self.failed(parts, now)

    def failed(self, parts: Iterable[int], now: float) -> None:
        """No answer will come for these parts."""
        self._awaited -= self._count(parts)
        if self._settled_at == math.inf and self._settled:
            self._settled_at = now

    def _count(self, parts: Iterable[int]) -> NDArray[np.int64]:
        """How many of these parts each row is in."""
        rows = [self._rows_of[part] for part in parts]
        size = len(self._answers)
        return np.bincount(np.concatenate(rows) if rows else np.empty(0, np.int64), minlength=size)

    def next_deadline(self) -> float:
        """When to stop waiting for what has not come."""
        latest = self._started + self._params.timeout
        if self._settled_at == math.inf:
            return min(latest, self._started + self._params.patience)
        return min(latest, self._settled_at + self._params.grace)

    def waited(self, now: float) -> float:
        """Seconds until the last answer that a row needed; until `now` if none came."""
        return (now if self._last_answer == -math.inf else self._last_answer) - self._started


class Waits:
    """The waits of the latest batches."""

    def __init__(self) -> None:
        self._kept: deque[float] = deque(maxlen=WAITS_KEPT)

    def add(self, seconds: float) -> None:
        """One more batch is done."""
        self._kept.append(seconds)

    @property
    def median(self) -> float:
        """The median wait in seconds; infinite before there are enough of them."""
        return statistics.median(self._kept) if len(self._kept) >= WAITS_NEEDED else math.inf

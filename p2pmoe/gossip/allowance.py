"""How often somebody may: token buckets by key, in a table with a bound."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from p2pmoe.identity import PeerId


@dataclass(slots=True)
class _Bucket:
    tokens: float
    at: float


class Allowance:
    """So many at once, refilled at a rate, never two within `spacing` seconds."""

    def __init__(self, burst: float, rate: float, *, spacing: float = 0.0, size: int) -> None:
        """`rate` a second; `size` keys are remembered, the least recently seen is forgotten."""
        self._burst, self._rate, self._spacing, self._size = burst, rate, spacing, size
        self._buckets: OrderedDict[PeerId, _Bucket] = OrderedDict()

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, key: PeerId, now: float) -> bool:
        """Whether this one may now; if so, it did."""
        bucket = self._buckets.get(key)
        if bucket is None:
            self._buckets[key] = _Bucket(self._burst - 1, now)
            if len(self._buckets) > self._size:
                self._buckets.popitem(last=False)
            return True
        self._buckets.move_to_end(key)
        passed = now - bucket.at
        tokens = min(self._burst, bucket.tokens + passed * self._rate)
        if tokens < 1 or passed < self._spacing:
            return False
        bucket.tokens, bucket.at = tokens - 1, now
        return True

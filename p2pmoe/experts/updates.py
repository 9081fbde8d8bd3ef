"""Which updates an expert has applied already, so that none is applied twice. A core.

An update that a caller repeats, because its connection broke before the answer came, is answered
again without a step. The memory forgets by age, and by number when callers are many.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

LIFETIME = 600.0  # seconds an update is remembered; callers give up long before
CAPACITY = 8192  # updates remembered; 13 a second for all of the lifetime


class AppliedUpdates:
    """The updates of one expert, by caller and id."""

    def __init__(self, capacity: int = CAPACITY, lifetime: float = LIFETIME) -> None:
        self._capacity, self._lifetime = capacity, lifetime
        self._applied: OrderedDict[Hashable, float] = OrderedDict()  # key -> when, the oldest first

    def __len__(self) -> int:
        return len(self._applied)

    def knows(self, key: Hashable, now: float) -> bool:
        """Whether this update was applied within the lifetime."""
        return key in self._applied and now - self._applied[key] < self._lifetime

    def add(self, key: Hashable, now: float) -> None:
        """Remember an update that was just applied."""
        self._applied[key] = now
        self._applied.move_to_end(key)
        while len(self._applied) > self._capacity or self._oldest_age(now) >= self._lifetime:
            self._applied.popitem(last=False)

    def _oldest_age(self, now: float) -> float:
        return now - next(iter(self._applied.values()))

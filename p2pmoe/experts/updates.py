"""Which updates an expert has applied already, so that none is applied twice. A core.

An update that a caller repeats, because its connection broke before the answer came, is answered
again without a step. An update's id is the caller and 16 bytes, which rise with each update of
that caller. The memory forgets by age, and by number when callers are many; of each caller it
keeps the highest id that it forgot, and takes nothing from there down for new. So an update that
was recorded and is sent again much later is not applied either.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

LIFETIME = 600.0  # seconds an update is remembered one by one; callers give up long before
CAPACITY = 8192  # updates remembered one by one; 13 a second for all of the lifetime
CALLERS = 1024  # of whom the highest forgotten id is kept, those who came last; a guess

Key = tuple[Hashable, bytes]


class AppliedUpdates:
    """The updates of one expert, by caller and id."""

    def __init__(self, capacity: int = CAPACITY, lifetime: float = LIFETIME) -> None:
        self._capacity, self._lifetime = capacity, lifetime
        self._applied: OrderedDict[Key, float] = OrderedDict()  # key -> when, the oldest first
        self._forgotten: OrderedDict[Hashable, bytes] = OrderedDict()  # the highest of each caller

    def __len__(self) -> int:
        return len(self._applied)

    def knows(self, key: Key, now: float) -> bool:
        """Whether this update was applied, or is older than one that was and is forgotten."""
        self._forget(now)
        caller, number = key
        forgotten = self._forgotten.get(caller)
        return key in self._applied or (forgotten is not None and number <= forgotten)

    def add(self, key: Key, now: float) -> None:
        """Remember an update that was just applied."""
        self._applied[key] = now
        self._applied.move_to_end(key)
        self._forget(now)

    def _forget(self, now: float) -> None:
        while self._applied:
            key, applied_at = next(iter(self._applied.items()))
            if len(self._applied) <= self._capacity and now - applied_at < self._lifetime:
                return
            del self._applied[key]
            caller, number = key
            self._forgotten[caller] = max(number, self._forgotten.get(caller, b""))
            self._forgotten.move_to_end(caller)
            if len(self._forgotten) > CALLERS:
                self._forgotten.popitem(last=False)

"""When a part of a batch is asked of another expert, too. A core: `now` comes in.

A part that has not come after a multiple of its expert's usual time is late, and one that has
failed is late at once; its rows are then asked of the next best expert, as long as that makes no
more than a small share of all rows asked. (Dean, Barroso, The Tail at Scale, CACM 56(2), 2013.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

MULTIPLE = 3.0  # of the usual time, after which an answer is late; a guess
SOONEST = 0.05  # seconds before which nothing is late; a guess, the network thread's p99 is half
MOST_SAVED = 4096  # rows that may be asked again at once after a good while; a guess


@dataclass(slots=True)
class HedgeBudget:
    """How many rows may be asked again: `share` of those asked, and a part more at most.

    Not all rows of a part need a second expert, so one part may overdraw it; then nothing is asked
    again until what was taken is earned.
    """

    share: float
    rows: float = 0.0

    def earn(self, rows: int) -> None:
        """So many rows are asked for the first time."""
        self.rows = min(MOST_SAVED, self.rows + self.share * rows)

    def take(self, rows: int) -> bool:
        """Whether so many may be asked again now; if so, they are."""
        if self.rows <= 0:
            return False
        self.rows -= rows
        return True


class Lateness:
    """Which parts of one batch are late: each is told once."""

    def __init__(self, usual: Mapping[int, float], now: float) -> None:
        self._due = {part: now + max(SOONEST, MULTIPLE * usual[part]) for part in usual}

    def answered(self, part: int) -> None:
        """Its answer came."""
        self._due.pop(part, None)

    def failed(self, part: int) -> None:
        """No answer will come: it is late now."""
        if part in self._due:
            self._due[part] = -math.inf

    def late(self, now: float) -> list[int]:
        """The parts that have become late since the last call."""
        late = [part for part, due in self._due.items() if due <= now]
        for part in late:
            del self._due[part]
        return late

    def next_deadline(self) -> float:
        """When the next part becomes late."""
        return min(self._due.values(), default=math.inf)

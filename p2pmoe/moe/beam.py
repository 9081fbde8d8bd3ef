"""`BeamSearch`: which prefixes and cells of a grid to look up for one row of scores.

The search of the paper's SelectExperts: dimension by dimension, each prefix of the beam is
extended by its active next coordinates and the best partial scores are kept. It knows a grid only
by what it is told: ask for `wanted()`, look each place up, answer with `told()` or `failed()`,
until `done`. On a full grid a beam as wide as the number of experts sought is exact; on a sparse
one it is a heuristic.

Rules: a place is a tuple of coordinates; shorter than the grid it is a prefix, else a cell.
`told(prefix, coordinates)` says which next coordinates are active, `told(cell)` that somebody
holds its lease, `failed(place)` that nobody answered for it or that it is vacant. What is wanted
is wanted once.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Place = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BeamParams:
    """How wide and how far to search. `width` is the number of experts sought."""

    width: int
    spare: int = 16  # lookups beyond `width` among first coordinates and among cells; a guess


def guesses(scores: Sequence[Sequence[float]], width: int) -> list[Place]:
    """What a search of a full grid would want after the empty prefix: `width` places a length.

    To look them up at once, before anything is known, takes one round instead of one a dimension.
    """
    found: list[Place] = []
    best: list[tuple[float, Place]] = [(0.0, ())]
    for part in scores:
        ones = heapq.nsmallest(width, ((-score, one) for one, score in enumerate(part)))
        longer = ((total + less, (*place, one)) for total, place in best for less, one in ones)
        best = heapq.nsmallest(width, longer)
        found += [place for _, place in best]
    return found


class BeamSearch:
    """Looks for the cells with the highest sum of scores, one score a dimension."""

    def __init__(self, scores: Sequence[Sequence[float]], params: BeamParams) -> None:
        self._scores = scores
        self._params = params
        self._candidates: list[Place] = [()]  # all of one length, best first
        self._asked = 0  # that many of them were wanted so far
        self._pending: set[Place] = set()
        self._active: dict[Place, list[int]] = {}  # candidates that are, with what follows them
        self.done = False

    def wanted(self) -> list[Place]:
        """The places to look up now."""
        room = self._params.width - len(self._active) - len(self._pending)
        chosen = self._candidates[self._asked : self._asked + max(0, room)]
        self._asked += len(chosen)
        self._pending.update(chosen)
        return chosen

    def told(self, place: Place, coordinates: Iterable[int] = ()) -> None:
        """What is known of a place that was wanted; a prefix without coordinates is empty."""
        if len(place) == len(self._scores):
            self._active[place] = []
        else:
            size = len(self._scores[len(place)])
            if following := [one for one in sorted(set(coordinates)) if 0 <= one < size]:
                self._active[place] = following
        self._settle(place)

    def failed(self, place: Place) -> None:
        """Nobody answered for a place that was wanted, or the cell is vacant."""
        self._settle(place)

    def result(self) -> list[Place]:
        """The cells that are held, best first: at most `width`, fewer where fewer were found."""
        return [place for place in self._candidates if self.done and place in self._active]

    def _settle(self, place: Place) -> None:
        """One lookup is over; when it was the last of its dimension, go on to the next one."""
        self._pending.discard(place)
        exhausted = self._asked == len(self._candidates)
        if self._pending or not (exhausted or len(self._active) == self._params.width):
            return
        if len(place) == len(self._scores) or not self._active:
            self.done = True
            return
        self._candidates = self._extended(len(place) + 1)
        self._asked, self._active = 0, {}

    def _extended(self, length: int) -> list[Place]:
        """The best extensions of the active prefixes, as many as may be looked up."""
        walked = length in {1, len(self._scores)}
        limit = self._params.width + (self._params.spare if walked else 0)
        found = [(*prefix, one) for prefix, ones in self._active.items() for one in ones]
        return sorted(found, key=lambda place: (-self._score(place), place))[:limit]

    def _score(self, place: Place) -> float:
        return sum(scores[one] for scores, one in zip(self._scores, place, strict=False))

"""A waiting room with a few places, for those who have yet to show who they are.

Rules: a newcomer always finds a place; when all are taken, who has been there longest goes. A host
who can leave others outside lets everybody `stay` for a while first, so that no crowd, however
fast, sends those away who were about to be done. One global address has a few places only; the
table is bounded by the places.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from p2pmoe.net.quota import address_group


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """One place in a lobby. `send_away` is called when it is needed for somebody else."""

    group: str
    since: float
    send_away: Callable[[], None]


class Lobby:
    """Who waits, in the order in which they came."""

    def __init__(self, places: int, places_an_address: int | None = None) -> None:
        self._places, self._places_an_address = places, places_an_address or places
        self._waiting: dict[Place, None] = {}
        self._groups: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._waiting)

    def wait(self, stay: float, now: float) -> float:
        """Seconds until there is room without sending away who has not had `stay` seconds."""
        if len(self._waiting) < self._places:
            return 0.0
        return max(0.0, next(iter(self._waiting)).since + stay - now)

    def enter(self, host: str, now: float, send_away: Callable[[], None]) -> Place | None:
        """A place for a connection from `host`, for `leave`; `None` if its address has enough."""
        place = Place(address_group(host), now, send_away)
        if place.group and self._groups[place.group] >= self._places_an_address:
            return None
        if len(self._waiting) >= self._places:
            oldest = next(iter(self._waiting))
            self.leave(oldest)
            oldest.send_away()
        self._waiting[place] = None
        self._groups[place.group] += 1
        return place

    def leave(self, place: Place) -> None:
        """The place is free; nothing if it was given to somebody else."""
        if place in self._waiting:
            del self._waiting[place]
            self._groups[place.group] -= 1
            if not self._groups[place.group]:
                del self._groups[place.group]

"""Beam searches carried out, for a grid that has too many cells to be watched whole.

The rows of a batch search together: what they want of the DHT in one round is looked up at once
and once. What was found is kept while it is fresh, so that batches alike look nothing up.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from functools import partial
from itertools import chain, islice

import trio

from p2pmoe.dht.jobs import together
from p2pmoe.dht.leases import LeaseView
from p2pmoe.dht.service import DhtService, PrefixView
from p2pmoe.errors import P2PMoEError
from p2pmoe.experts.uid import Prefix
from p2pmoe.moe.beam import BeamParams, BeamSearch, Place, guesses

FRESH = 10.0  # seconds for which a prefix is not read again; one renewal of a lease
MOST_PREFIXES = 65_536  # that are remembered; a guess
MOST_GUESSES = 64  # places that are looked up before anything is known; a guess
ROWS_AT_ONCE = 64  # rows between two looks at the network; about 5 ms, a guess


class GridSearch:
    """Finds the best cells of one grid for rows of scores, and keeps what it has found."""

    def __init__(self, dht: DhtService, name: str, grid: bytes, dimensions: int) -> None:
        self._dht, self._name, self._grid, self._dimensions = dht, name, grid, dimensions
        self._prefixes: dict[Place, PrefixView] = {}
        self._cells: dict[str, LeaseView] = {}

    def cells(self, now: float) -> dict[str, LeaseView]:
        """The leases that were found and have not ended."""
        self._cells = {uid: one for uid, one in self._cells.items() if one.expires_at > now}
        return self._cells

    def forget(self, uids: Iterable[str]) -> None:
        """These leases turned out to be wrong."""
        for uid in uids:
            self._cells.pop(uid, None)

    async def find(self, scores: Sequence[Sequence[Sequence[float]]], params: BeamParams) -> None:
        """Add to `cells` the best ones of each row. A row has scores for each dimension."""
        searches = [BeamSearch(row, params) for row in scores]
        wanted: dict[Place, list[BeamSearch]] = {}
        if () not in self._prefixes:  # nothing is known yet: take the grid for a full one
            rows = (guesses(row, params.width) for row in scores)
            wanted = {place: [] for place in islice(chain.from_iterable(rows), MOST_GUESSES)}
        while searches:
            for index, search in enumerate(searches):
                for place in search.wanted():
                    wanted.setdefault(place, []).append(search)
                if index % ROWS_AT_ONCE == 0:
                    await trio.lowlevel.checkpoint()
            await self._look_up(wanted)
            for place, asking in wanted.items():
                for search in asking:
                    self._tell(search, place)
            searches = [search for search in searches if not search.done]
            wanted = {}

    def _tell(self, search: BeamSearch, place: Place) -> None:
        """What is known of a place now."""
        if len(place) < self._dimensions:
            view = self._prefixes.get(place)
            search.told(place, view.coordinates if view else ())
        elif self._uid(place) in self._cells:
            search.told(place)
        else:
            search.failed(place)

    async def _look_up(self, places: Collection[Place]) -> None:
        """Read those of the places of which nothing fresh is known."""
        now = trio.current_time()
        cells = self.cells(now)
        uids = [self._uid(place) for place in places if len(place) == self._dimensions]
        prefixes = [
            place
            for place in places
            if len(place) < self._dimensions
            and (place not in self._prefixes or self._prefixes[place].expires_at <= now)
        ]
        views = await together([partial(self._read_prefix, place) for place in prefixes])
        for place, view in zip(prefixes, views, strict=True):
            if len(self._prefixes) >= MOST_PREFIXES:
                self._prefixes.pop(next(iter(self._prefixes)))
            self._prefixes[place] = view
        if missing := [uid for uid in uids if uid not in cells]:
            cells |= await self._read_leases(missing)

    async def _read_prefix(self, place: Place) -> PrefixView:
        try:
            view = await self._dht.get_prefix(self._grid, self._uid(place))
        except P2PMoEError:  # nobody answered: nothing is known of it now
            view = PrefixView({}, 0.0)
        return PrefixView(view.coordinates, min(view.expires_at, trio.current_time() + FRESH))

    async def _read_leases(self, uids: Sequence[str]) -> dict[str, LeaseView]:
        try:
            return await self._dht.get_leases(self._grid, uids)
        except P2PMoEError:
            return {}

    def _uid(self, place: Place) -> str:
        return str(Prefix(self._name, place))

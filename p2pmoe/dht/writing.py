"""Records put at the r peers closest to their keys.

Whoever knows most peers there are puts a record at the closest of them at once. Each of these
answers who is closer that was not named; so the record goes to all who should hold it, without a
search before. A peer that fails or is slow is replaced by the next. Everybody else, and who got too
few answers, looks for the closest first.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import trio

from p2pmoe.dht.asks import Asks
from p2pmoe.dht.direct import MOST_ASKED, Place, names
from p2pmoe.dht.leases import MOST_HOLDERS, Vote, holders
from p2pmoe.dht.messages import Transfer
from p2pmoe.dht.search import Searches
from p2pmoe.errors import P2PMoEError
from p2pmoe.identity import PeerId
from p2pmoe.wire.envelope import Kind, Signed

SLOW = 2.0  # seconds, then the next closest holds the record as well; a guess
SLOW_GRANT = 5.0  # seconds, the same for leases: a holder may ask others first, for up to 4 s

PutHere = Callable[[Signed[Any], Signed[Transfer] | None], Awaitable[Vote]]
Votes = dict[PeerId, Vote]


@dataclass(slots=True)
class _Writing:
    """A record on its way: whom it may go to, who was asked, and what those made of it."""

    record: Signed[Any]
    known: set[PeerId]  # without those who failed
    asked: set[PeerId] = field(default_factory=set)
    votes: Votes = field(default_factory=dict)


class Writer:
    """Puts records at their holders."""

    def __init__(self, place: Place, asks: Asks, searches: Searches, put_here: PutHere) -> None:
        self._place, self._asks, self._searches = place, asks, searches
        self._put_here = put_here

    async def put(self, record: Signed[Any]) -> tuple[list[PeerId], Votes]:
        """Put a record at whoever is closest now: these, and what each that answers makes of it."""
        if directly := await self.put_directly(record):
            return directly
        found = (await self._searches.nearest(record.body.key)).holders
        return found, await self.put_at(found, record)

    async def put_directly(self, record: Signed[Any]) -> tuple[list[PeerId], Votes] | None:
        """The same, where this peer knows who is closest; None if that takes a search."""
        key, careful = record.body.key, record.kind is Kind.LEASE
        writing = _Writing(record, set(self._searches.direct.closest_known(key, careful=careful)))
        if not writing.known:
            return None
        found = self._holders(writing)
        while not writing.asked.issuperset(found) and len(writing.asked) < MOST_ASKED:
            await self._put_at_once(writing, found)
            found = self._holders(writing)
        if len(writing.votes) < len(writing.asked) and len(found) < MOST_HOLDERS:
            return None
        return found, {peer: writing.votes[peer] for peer in found if peer in writing.votes}

    async def put_at(
        self,
        peers: Sequence[PeerId],
        record: Signed[Any],
        transfer: Signed[Transfer] | None = None,
    ) -> Votes:
        """What each of these makes of a record; who does not answer has no vote."""
        votes: Votes = {}
        async with trio.open_nursery() as tasks:
            for peer in peers:
                tasks.start_soon(self._put_one, peer, record, transfer, votes)
        return votes

    def _holders(self, writing: _Writing) -> list[PeerId]:
        return holders(writing.record.body.key, writing.known, self._place.holder)

    async def _put_at_once(self, writing: _Writing, closest: Sequence[PeerId]) -> None:
        """Put it at those of the closest who were not asked yet; learn who failed, who is closer.

        All of them share one deadline, and nobody waits for a task of its own.
        """
        record, named = writing.record, names(closest)
        fresh = [peer for peer in closest if peer not in writing.asked]
        others = [peer for peer in fresh if peer != self._place.own]
        coming = [(peer, self._asks.begin_put(peer, record, named)) for peer in others]
        writing.asked.update(fresh)
        with trio.move_on_after(SLOW_GRANT if record.kind is Kind.LEASE else SLOW):
            if len(others) < len(fresh):
                await self._put_one(self._place.own, record, None, writing.votes)
            for _, promise in coming:
                await promise.ended()
        for peer, promise in coming:
            if (vote := promise.value) is not None:
                writing.votes[peer] = vote
                writing.known.update(filter(self._searches.usable, vote.closer))
        writing.known -= writing.asked - writing.votes.keys()

    async def _put_one(
        self, peer: PeerId, record: Signed[Any], transfer: Signed[Transfer] | None, votes: Votes
    ) -> None:
        try:
            if peer == self._place.own:
                votes[peer] = await self._put_here(record, transfer)
            else:
                votes[peer] = await self._asks.put(peer, record, transfer)
        except P2PMoEError:  # marked and told about where it was asked; it has no vote
            return

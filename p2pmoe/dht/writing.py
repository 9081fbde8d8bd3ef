"""Records put at the r peers closest to their keys.

Whoever knows most peers there are puts a record at the closest of them at once. Each of these
answers who is closer that was not named; so the record goes to all who should hold it, without a
search before. A peer that fails or is slow is replaced by the next. Everybody else, and who got too
few answers, looks for the closest first.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import trio

from p2pmoe.dht.asks import Asks
from p2pmoe.dht.leases import MOST_HOLDERS, Vote, holders
from p2pmoe.dht.messages import Transfer
from p2pmoe.dht.search import Place, Searches
from p2pmoe.errors import P2PMoEError
from p2pmoe.identity import PeerId
from p2pmoe.wire.envelope import Signed

SLOW = 2.0  # seconds, then the next closest holds the record as well; a guess

PutHere = Callable[[Signed[Any], Signed[Transfer] | None], Awaitable[Vote]]
Votes = dict[PeerId, Vote]


@dataclass(slots=True)
class _Writing:
    """A record on its way: whom it goes to, who failed, and what the others made of it."""

    record: Signed[Any]
    known: set[PeerId]
    asked: set[PeerId] = field(default_factory=set)
    failed: set[PeerId] = field(default_factory=set)
    votes: Votes = field(default_factory=dict)


class Writer:
    """Puts records at their holders."""

    def __init__(self, place: Place, asks: Asks, searches: Searches, put_here: PutHere) -> None:
        self._place, self._asks, self._searches = place, asks, searches
        self._put_here = put_here

    async def put(self, record: Signed[Any]) -> tuple[list[PeerId], Votes]:
        """Put a record at whoever is closest now: these, and what each that answers makes of it."""
        key = record.body.key
        writing = _Writing(record, set(self._searches.closest_known(key)))
        if writing.known:
            async with trio.open_nursery() as tasks:
                self._put_at_closest(writing, tasks)
            found = self._holders(writing)
            if not writing.failed or len(found) == MOST_HOLDERS:
                return found, {peer: writing.votes[peer] for peer in found}
        found = (await self._searches.nearest(key)).holders
        return found, await self.put_at(found, record)

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
                tasks.start_soon(self._put_one, peer, partial(self._vote, record, transfer), votes)
        return votes

    def _holders(self, writing: _Writing) -> list[PeerId]:
        known = writing.known - writing.failed
        return holders(writing.record.body.key, known, self._place.holder)

    def _put_at_closest(self, writing: _Writing, tasks: trio.Nursery) -> None:
        """Put it where it should be now and was not put yet."""
        closest = self._holders(writing)
        for peer in closest:
            if peer not in writing.asked:
                writing.asked.add(peer)
                tasks.start_soon(self._put_and_look, peer, writing, closest, tasks)

    async def _put_and_look(
        self, peer: PeerId, writing: _Writing, named: Iterable[PeerId], tasks: trio.Nursery
    ) -> None:
        with trio.move_on_after(SLOW):
            put = partial(self._vote, writing.record, None, named=named)
            await self._put_one(peer, put, writing.votes)
        if (vote := writing.votes.get(peer)) is None:
            writing.failed.add(peer)
        else:
            writing.known.update(filter(self._searches.usable, vote.closer))
        self._put_at_closest(writing, tasks)

    async def _put_one(
        self, peer: PeerId, put: Callable[[PeerId], Awaitable[Vote]], votes: Votes
    ) -> None:
        try:
            votes[peer] = await put(peer)
        except P2PMoEError:  # marked and told about where it was asked; it has no vote
            return

    async def _vote(
        self,
        record: Signed[Any],
        transfer: Signed[Transfer] | None,
        peer: PeerId,
        named: Iterable[PeerId] = (),
    ) -> Vote:
        if peer == self._place.own:
            return await self._put_here(record, transfer)
        return await self._asks.put(peer, record, transfer, named)

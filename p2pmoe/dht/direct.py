"""Reads without a search: whoever knows most peers there are asks those closest to a key at once.

They cannot be hidden from it, as on a path, and whom it does not know they name. A read asks no
more of the r closest than its rule needs as long as these agree. Where somebody is slow, or too few
are left, it takes a search. Never in hostile mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import trio

from p2pmoe.dht.asks import NAME_BYTES, Asks
from p2pmoe.dht.contacts import Contacts
from p2pmoe.dht.leases import MOST_HOLDERS, holders
from p2pmoe.dht.reading import Answer, Enough, Question, Searched, needed
from p2pmoe.dht.region import NetworkSize
from p2pmoe.identity import PeerId
from p2pmoe.wire.envelope import Kind

KNOWS_ENOUGH = 0.5  # of all peers: those it misses are named by the others; a guess
MOST_SCANNED = 256  # peers that are known, of all that there may be; a guess
MOST_ASKED = 32  # peers that are asked or written to: who is named may name others; a guess
SLOW = 0.25  # seconds; a read then takes a search, which asks more; a guess
SLOW_MOST = 1.0  # seconds; the same where all are slow, as on an overloaded machine; a guess
SLOW_FACTOR = 4.0  # times as long as answers take of late; a guess
LATE_WEIGHT = 1 / 8  # of the latest, in how long they take; as TCP's smoothed round trip (RFC 6298)


@dataclass(frozen=True, slots=True)
class Place:
    """This peer in the key space. `holds` says whether it can be dialled, now."""

    own: PeerId
    holds: Callable[[], bool]
    usable: Callable[[PeerId], bool]

    @property
    def holder(self) -> PeerId | None:
        """Itself, if it may hold records."""
        return self.own if self.holds() else None


class Direct:
    """Asks the closest of those who are known. `k` of them; with 0 it never does."""

    def __init__(
        self, place: Place, contacts: Contacts, asks: Asks, size: NetworkSize, k: int
    ) -> None:
        self._place, self._contacts, self._asks = place, contacts, asks
        self._size, self._k = size, k
        self._usual = 0.0  # seconds, until all who were asked have answered

    def usable(self, peer: PeerId) -> bool:
        """Whether a question to this peer may be answered."""
        now = trio.current_time()
        return self._place.usable(peer) and not self._contacts.avoided(peer, now)

    def closest_known(self, key: bytes, *, careful: bool) -> list[PeerId]:
        """The k closest to a key, where this peer knows so many that no search is needed; or none.

        What is `careful`, as leases are, wants the number of all peers from several lookups.
        """
        now, met = trio.current_time(), self._contacts.met()
        peers = self._size.estimate(now) if careful else self._size.about(now)
        if peers is None or len(met) < KNOWS_ENOUGH * peers or len(met) > MOST_SCANNED:
            return []
        near = int.from_bytes(key, "big")
        met.sort(key=lambda peer: peer.number ^ near)
        closest = list(islice(filter(self.usable, met), self._k))
        return [] if self._size.is_crowded(key, closest, now) else closest

    async def read(
        self,
        kind: Kind,
        key: bytes,
        enough: Enough,
        own: Mapping[PeerId, Answer],
        *,
        careful: bool,
    ) -> Searched | None:
        """What the closest say, of whom no more are asked than `enough` needs while they agree.

        None where it takes a search: this peer knows too few, one is slow or has more than one
        answer, or ids crowd around the key.
        """
        began = self.closest_known(key, careful=careful)
        question = Question(kind, key, known=names(began))
        known, heard, failed = set(began), dict(own), set[PeerId]()
        while known and len(heard) + len(failed) < MOST_ASKED:
            closest = holders(key, known, self._place.holder)
            answers = [heard[peer] for peer in closest if peer in heard]
            fresh = [peer for peer in closest if peer not in heard]
            if enough(answers, len(closest)) or not fresh:
                few = failed and len(closest) < MOST_HOLDERS
                more = any(answer.more for answer in answers)
                odd = few or more or self._is_crowded(key, known)
                return None if odd else Searched(closest, heard)
            having = sum(bool(answer.records) for answer in answers)
            asked = fresh[: max(1, needed(enough, len(closest)) - having)]
            came = await self._ask(asked, question)
            if came is None:
                return None
            heard |= came
            failed |= set(asked) - came.keys()
            named = {peer for answer in came.values() for peer in answer.closer}
            known = (known | set(filter(self.usable, named))) - failed
        return None

    async def _ask(
        self, peers: Sequence[PeerId], question: Question
    ) -> dict[PeerId, Answer] | None:
        """What these answer who do not fail; None if one is slow. Nobody has a task of its own."""
        coming = [(peer, self._asks.begin_get(peer, question)) for peer in peers]
        began = trio.current_time()
        with trio.move_on_after(min(SLOW_MOST, max(SLOW, SLOW_FACTOR * self._usual))) as limit:
            for _, answer in coming:
                await answer.ended()
        self._usual += LATE_WEIGHT * (trio.current_time() - began - self._usual)
        if limit.cancelled_caught:
            return None
        return {peer: answer.value for peer, answer in coming if answer.value is not None}

    def _is_crowded(self, key: bytes, peers: Iterable[PeerId]) -> bool:
        closest = holders(key, peers, None, self._k)
        return self._size.is_crowded(key, closest, trio.current_time())


def names(peers: Iterable[PeerId]) -> tuple[bytes, ...]:
    """How their ids begin: enough to tell a few peers apart."""
    return tuple(peer.raw[:NAME_BYTES] for peer in peers)

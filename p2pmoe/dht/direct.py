"""Reads without a search: whoever knows most peers there are asks those closest to a key at once.

They cannot be hidden from it, as on a path, and whom it does not know they name. A read asks no
more of the r closest than its rule needs, then all others if these do not agree. Who may be dead
is left out: of a third that was killed, each would cost a dial. For one that fails or is slow, the
next is asked. Where all are slow, or too few are left, it takes a search. Never in hostile mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import trio

from p2pmoe.dht.asks import NAME_BYTES, Asks
from p2pmoe.dht.contacts import Contacts
from p2pmoe.dht.jobs import Jobs, Promise
from p2pmoe.dht.leases import MOST_HOLDERS, holders
from p2pmoe.dht.reading import Answer, Enough, Question, Searched, needed
from p2pmoe.dht.region import NetworkSize
from p2pmoe.errors import NodeClosed, P2PMoEError
from p2pmoe.identity import PeerId
from p2pmoe.wire.envelope import Kind

KNOWS_ENOUGH = 0.5  # of all peers: those it misses are named by the others; a guess
MOST_SCANNED = 256  # peers that are known, of all that there may be; a guess
MOST_ASKED = 32  # peers that are asked or written to: who is named may name others; a guess
SLOW = 0.25  # seconds; a read then asks others; a guess
SLOW_MOST = 1.0  # seconds; the same where all are slow, as on an overloaded machine; a guess
ALL_SLOW = 1.0  # seconds without any answer; a read then takes a search; a guess
SLOW_FACTOR = 4.0  # times as long as answers take of late; a guess
GONE_OF_LATE = 5.0  # seconds in which what a peer held may not have been put again yet; a guess
LATE_WEIGHT = 1 / 8  # of the latest, in how long they take; as TCP's smoothed round trip (RFC 6298)


@dataclass(frozen=True, slots=True)
class Place:
    """This peer in the key space. `holds` says whether it can be dialled, now."""

    own: PeerId
    holds: Callable[[], bool]
    usable: Callable[[PeerId], bool]
    connected: Callable[[PeerId], bool]

    @property
    def holder(self) -> PeerId | None:
        """Itself, if it may hold records."""
        return self.own if self.holds() else None


class Direct:
    """Asks the closest of those who are known. `k` of them; with 0 it never does."""

    def __init__(
        self,
        place: Place,
        contacts: Contacts,
        asks: Asks,
        jobs: Jobs,
        size: NetworkSize,
        k: int,
    ) -> None:
        self.place, self.asks, self.jobs = place, asks, jobs
        self._contacts, self._size, self._k = contacts, size, k
        self._usual = 0.0  # seconds, until all who were asked have answered

    def usable(self, peer: PeerId) -> bool:
        """Whether a question to this peer may be answered."""
        now = trio.current_time()
        return self.place.usable(peer) and not self._contacts.avoided(peer, now)

    def sure(self, peer: PeerId) -> bool:
        """The same, and nothing speaks against it: its connection broke, or it is suspected."""
        return self.usable(peer) and not self._contacts.doubtful(peer)

    def closest_known(self, key: bytes, *, careful: bool) -> list[PeerId]:
        """The k closest to a key, where this peer knows so many that no search is needed; or none.

        What is `careful`, as leases are, wants the number of all peers from several lookups.
        """
        now, met = trio.current_time(), self._contacts.met()
        self._size.least = len(met)
        peers = self._size.estimate(now) if careful else self._size.about(now)
        if peers is None or len(met) < KNOWS_ENOUGH * peers or len(met) > MOST_SCANNED:
            return []
        near = int.from_bytes(key, "big")
        met.sort(key=lambda peer: peer.number ^ near)
        closest = list(islice(filter(self.sure, met), self._k))
        if len(closest) < MOST_HOLDERS and any(map(self._contacts.doubtful, met)):
            return []
        return [] if self._size.is_crowded(key, closest, now) else closest

    def is_bereft(self, key: bytes) -> bool:
        """Whether most of those that held this key are gone of late.

        Its publisher may be about to put it again.
        """
        gone = self._contacts.gone_since(trio.current_time() - GONE_OF_LATE)
        closest = holders(key, {*self._contacts.met(), *gone}, self.place.holder)
        return sum(peer in gone for peer in closest) > MOST_HOLDERS / 2

    def read(
        self,
        kind: Kind,
        key: bytes,
        enough: Enough,
        own: Mapping[PeerId, Answer],
        *,
        careful: bool,
    ) -> Promise[Searched | None]:
        """What the closest say, of whom no more are asked than `enough` needs while they agree.

        None where it takes a search: this peer knows too few, all are slow, one has more than one
        answer, or ids crowd around the key.
        """
        began = self.closest_known(key, careful=careful)
        read = _Read(self, Question(kind, key, known=names(began)), enough, began, own)
        read.go_on()
        return read.promise

    def patience(self) -> float:
        """Seconds after which somebody is slow."""
        return min(SLOW_MOST, max(SLOW, SLOW_FACTOR * self._usual))

    def took(self, seconds: float) -> None:
        """All who were asked have answered by then, or were slow."""
        self._usual += LATE_WEIGHT * (seconds - self._usual)

    def is_crowded(self, key: bytes, peers: Iterable[PeerId]) -> bool:
        """Whether more of these lie around a key than would by chance."""
        closest = holders(key, peers, None, self._k)
        return self._size.is_crowded(key, closest, trio.current_time())


class _Read:
    """A read under way, without a task: each answer takes it on."""

    def __init__(
        self,
        direct: Direct,
        question: Question,
        enough: Enough,
        began: Iterable[PeerId],
        own: Mapping[PeerId, Answer],
    ) -> None:
        self.promise: Promise[Searched | None] = Promise()
        self._direct, self._question, self._enough = direct, question, enough
        self._known, self._heard, self._failed = set(began), dict(own), set[PeerId]()
        self._coming: set[PeerId] = set()  # whose answers it waits for
        self._asked, self._asked_at = 0, 0.0  # how many it waited for at first, and since when

    def go_on(self) -> None:
        """End, or ask as many as it may take."""
        direct, heard = self._direct, self._heard
        if not self._known or len(heard) + len(self._failed) >= MOST_ASKED:
            self.promise.keep(None)
            return
        closest, answers = self._have()
        fresh = [peer for peer in closest if peer not in heard]
        if self._enough(answers, len(closest)) or not fresh:
            self._end(closest, answers)
            return
        fresh.sort(key=direct.place.connected, reverse=True)  # they need no dial, and are there
        having = sum(bool(answer.records) for answer in answers)
        if not self._asked:
            fresh = fresh[: max(1, needed(self._enough, len(closest)) - having)]
        try:
            self._ask(fresh)
        except P2PMoEError as error:  # this peer has too much to do, or ends
            direct.jobs.forget(self)
            self.promise.fail(error)

    def _have(self) -> tuple[list[PeerId], list[Answer]]:
        """The r closest that are known and not slow, and what they have answered."""
        closest = holders(self._question.key, self._known, self._direct.place.holder)
        return closest, [self._heard[peer] for peer in closest if peer in self._heard]

    def _end(self, closest: list[PeerId], answers: Sequence[Answer]) -> None:
        few = self._failed and len(closest) < MOST_HOLDERS
        more = any(answer.more for answer in answers)
        odd = few or more or self._direct.is_crowded(self._question.key, self._known)
        self.promise.keep(None if odd else Searched(closest, self._heard))

    def _ask(self, peers: Sequence[PeerId]) -> None:
        direct, self._asked_at = self._direct, trio.current_time()
        direct.jobs.watch(self, self._asked_at + direct.patience())
        self._coming, self._asked = set(peers), len(peers)
        answers = [direct.asks.begin_get(peer, self._question) for peer in peers]
        for peer, answer in zip(peers, answers, strict=True):
            answer.then(partial(self._came, peer, answer))

    def _came(self, peer: PeerId, answer: Promise[Answer]) -> None:
        """One that was asked has answered, perhaps late, or failed."""
        if self.promise.over:
            return
        if answer.value is None:
            self._failed.add(peer)
        else:
            self._failed.discard(peer)
            self._heard[peer] = answer.value
            self._known.add(peer)
            self._known.update(filter(self._direct.sure, answer.value.closer))
        self._known -= self._failed
        if peer not in self._coming:
            self._came_late()
            return
        self._coming.remove(peer)
        if not self._coming:
            self._direct.jobs.forget(self)
            self._direct.took(trio.current_time() - self._asked_at)
            self.go_on()

    def _came_late(self) -> None:
        """Others were asked instead: they need not be waited for if this is enough."""
        closest, answers = self._have()
        if self._enough(answers, len(closest)):
            self._direct.jobs.forget(self)
            self._end(closest, answers)

    def late(self) -> None:
        """Somebody is slow: others are asked instead. Where all are, they are waited for."""
        direct, now = self._direct, trio.current_time()
        direct.took(now - self._asked_at)
        if len(self._coming) < self._asked:
            slow, self._coming = self._coming, set()
            self._failed |= slow
            self._known -= slow
            self.go_on()
        elif now >= self._asked_at + ALL_SLOW:
            self.promise.keep(None)
        else:
            direct.jobs.watch(self, min(now + direct.patience(), self._asked_at + ALL_SLOW))

    def abandon(self) -> None:
        """The node ends."""
        self.promise.fail(NodeClosed("the node was closed"))


def names(peers: Iterable[PeerId]) -> tuple[bytes, ...]:
    """How their ids begin: enough to tell a few peers apart."""
    return tuple(peer.raw[:NAME_BYTES] for peer in peers)

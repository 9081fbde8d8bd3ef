"""Searches in the DHT: lookups carried out, and what the holders of a key answered.

The cores decide whom to ask and who won; this file asks. A search ends when the closest peers have
answered, or earlier, when enough of the r closest that are known agree. Equal searches share one.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import trio

from p2pmoe import telemetry
from p2pmoe.dht.asks import Answer, Asks, Question
from p2pmoe.dht.contacts import Contacts
from p2pmoe.dht.jobs import Flights, Jobs
from p2pmoe.dht.leases import RecordCopy, holders, quorum
from p2pmoe.dht.lookup import Lookup, LookupParams
from p2pmoe.dht.records import RecordStore
from p2pmoe.errors import P2PMoEError
from p2pmoe.identity import PeerId
from p2pmoe.wire.envelope import Kind

SEARCH_LIMIT = 10.0  # seconds for a whole search; then what is known must do; a guess
MOST_PAGES = 8  # of one holder's dictionaries under one prefix; a guess

Enough = Callable[[list[Answer], int], bool]  # answers of the r closest known, and r


@dataclass(slots=True)
class Searched:
    """The r closest peers that answered, ourselves included, and what they said."""

    holders: list[PeerId]
    answers: dict[PeerId, Answer] = field(default_factory=dict)

    def copies(self) -> list[RecordCopy[Any]]:
        """Every record that the holders named, in the order of the holders."""
        return [
            copy
            for holder in self.holders
            if holder in self.answers
            for copy in self.answers[holder].records
        ]

    def number(self) -> int:
        """The highest lease number that anybody remembers."""
        return max((answer.number for answer in self.answers.values()), default=0)


def never(_answers: list[Answer], _asked: int) -> bool:
    """Wait for all of the closest."""
    return False


def majority_answered(answers: list[Answer], asked: int) -> bool:
    """A quorum stored each dictionary, so a quorum's answers have all of them."""
    return len(answers) >= quorum(asked)


def majority_agrees(answers: list[Answer], asked: int) -> bool:
    """A quorum names the same publisher of a lease, or the same manifest, first."""
    named: dict[object, int] = {}
    for answer in answers:
        if answer.records:
            first = answer.records[0].signed
            name: object = first.digest if first.kind is Kind.MANIFEST else first.signer
            named[name] = named.get(name, 0) + 1
    return max(named.values(), default=0) >= quorum(asked)


ENOUGH: dict[Kind, Enough] = {
    Kind.LEASE: majority_agrees,
    Kind.MANIFEST: majority_agrees,
    Kind.PREFIX: majority_answered,
}


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


class Searches:
    """Carries lookups out."""

    def __init__(
        self, place: Place, contacts: Contacts, asks: Asks, store: RecordStore, jobs: Jobs
    ) -> None:
        self._place, self._contacts, self._asks, self._store = place, contacts, asks, store
        self._flights: Flights[Searched] = Flights(jobs)
        self.params = LookupParams()

    async def find(self, target: bytes) -> Searched:
        """The peers closest to a place. Those that are found were all reached just now."""
        ask = partial(self._asks.find, target=target)
        return await self._flights.share(target, partial(self._search, target, ask, never, None))

    async def read(self, kind: Kind, key: bytes, enough: Enough | None = None) -> Searched:
        """What the holders of a key have, until `enough` of them (by kind) have answered."""
        enough = enough or ENOUGH[kind]
        question = Question(kind, key)
        ask = partial(self._get_pages, question=question)
        return await self._flights.share(
            (question, enough), partial(self._search, key, ask, enough, question)
        )

    def usable(self, peer: PeerId) -> bool:
        """Whether a question to this peer may be answered."""
        now = trio.current_time()
        return self._place.usable(peer) and not self._contacts.avoided(peer, now)

    # ------------------------------------------------------------------------------- carried out
    async def _search(
        self,
        target: bytes,
        ask: Callable[[PeerId], Awaitable[Answer]],
        enough: Enough,
        question: Question | None,
    ) -> Searched:
        began = trio.current_time()
        seeds = self._contacts.table.closest(target, self.params.k, self.usable)
        lookup = Lookup(target, self._place.own, seeds, self.params)
        answers = {} if question is None else self._own_answer(question, began)
        with trio.move_on_after(SEARCH_LIMIT):
            await self._run(lookup, ask, answers, partial(self._settled, lookup, target, enough))
        now = trio.current_time()
        self._contacts.table.looked_up(target, now)
        telemetry.emit("dht.lookup.finished", seconds=now - began, answered=len(lookup.result()))
        return Searched(holders(target, lookup.result(), self._place.holder), answers)

    async def _run(
        self,
        lookup: Lookup,
        ask: Callable[[PeerId], Awaitable[Answer]],
        answers: dict[PeerId, Answer],
        settled: Callable[[dict[PeerId, Answer]], bool],
    ) -> None:
        """Begin the next question as soon as an answer comes; state changes here alone."""
        came_send, came = trio.open_memory_channel[tuple[PeerId, Answer | None]](
            self.params.most_asked  # each peer is asked once, so this never fills
        )
        async with trio.open_nursery() as questions:
            while not lookup.done and not settled(answers):
                now = trio.current_time()
                for peer in lookup.wanted(now):
                    if self.usable(peer):
                        questions.start_soon(self._ask, ask, peer, came_send)
                    else:
                        came_send.send_nowait((peer, None))
                with trio.move_on_at(lookup.next_deadline(now)):
                    peer, answer = await came.receive()
                    if answer is None:
                        lookup.failed(peer)
                    else:
                        answers[peer] = answer
                        lookup.told(peer, answer.closer, trio.current_time())
            questions.cancel_scope.cancel()

    async def _ask(
        self,
        ask: Callable[[PeerId], Awaitable[Answer]],
        peer: PeerId,
        came: trio.MemorySendChannel[tuple[PeerId, Answer | None]],
    ) -> None:
        try:
            answer: Answer | None = await ask(peer)
        except P2PMoEError:  # marked and told about where it was asked
            answer = None
        came.send_nowait((peer, answer))

    async def _get_pages(self, peer: PeerId, question: Question) -> Answer:
        first = page = await self._asks.get(peer, question)
        records = list(page.records)
        for _ in range(MOST_PAGES):
            if not (page.more and page.records and question.kind is Kind.PREFIX):
                break
            after = page.records[-1].signed.signer.raw
            page = await self._asks.get(peer, Question(question.kind, question.key, after))
            records += page.records
        return Answer(first.closer, tuple(records), first.number)

    def _settled(
        self, lookup: Lookup, target: bytes, enough: Enough, answers: dict[PeerId, Answer]
    ) -> bool:
        closest = holders(target, lookup.closest(self.params.k), self._place.holder)
        return enough([answers[peer] for peer in closest if peer in answers], len(closest))

    def _own_answer(self, question: Question, now: float) -> dict[PeerId, Answer]:
        """A holder asks itself without a call."""
        if self._place.holder is None:
            return {}
        copies = tuple(
            RecordCopy(held.signed, held.expires_at) for held in self._store.get(question.key, now)
        )
        return {self._place.own: Answer((), copies, self._store.number(question.key))}

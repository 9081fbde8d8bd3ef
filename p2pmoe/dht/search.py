"""Searches in the DHT: lookups carried out, and what the holders of a key answered.

The cores decide whom to ask and who won; this file asks. A search ends when the closest peers have
answered, or earlier, when enough of the r closest that are known agree. Equal searches share one.
Puts and leases go by two disjoint paths where the swarm is large enough for two, everything by four
in hostile mode. Whoever knows most peers there are asks the closest directly (`direct`). A key with
more ids around it than there would be by chance is searched for in a whole region. Holders that
lack what others named are told so afterwards.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial

import trio

from p2pmoe import telemetry
from p2pmoe.dht.asks import Asks
from p2pmoe.dht.contacts import Contacts
from p2pmoe.dht.direct import Direct, Place, names
from p2pmoe.dht.jobs import Flights, Jobs, Promise
from p2pmoe.dht.leases import MOST_HOLDERS, RecordCopy, holders
from p2pmoe.dht.lookup import Lookup, LookupParams
from p2pmoe.dht.reading import (
    ENOUGH,
    Answer,
    Enough,
    Question,
    Searched,
    all_answered,
    all_reached,
    lacking,
    never,
    wanted_copies,
)
from p2pmoe.dht.records import RecordStore
from p2pmoe.dht.region import WIDE, NetworkSize
from p2pmoe.errors import NodeClosed, P2PMoEError, PeerBusy
from p2pmoe.identity import PeerId
from p2pmoe.wire.envelope import Kind

SEARCH_LIMIT = 10.0  # seconds for a whole search; then what is known must do; a guess
MOST_PAGES = 8  # of one holder's dictionaries under one prefix; a guess
ONE_PATH_BELOW = 32  # contacts; with fewer, two paths ask everybody and are no surer; a guess
HOSTILE_PATHS = 4  # in hostile mode; S/Kademlia
MEND_PAUSE = 5.0  # seconds in which one holder is told once that it lacks something; a guess
LOOK_AGAIN = 0.25  # seconds until a record is looked for again whose holders have died; a guess
LOOKS_AGAIN = 3  # times, before "there is nothing" is said; a guess
MOST_MENDED = 4096  # holders and keys that were told lately; a guess

_BY_ALL = {all_answered, all_reached}  # rules for which one path alone may be led astray

Ask = Callable[[PeerId, tuple[PeerId, ...]], Awaitable[Answer]]  # and whom it need not name


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchParams:
    """How searches are carried out. `hostile`: expect half of the peers to lie."""

    lookup: LookupParams = field(default_factory=LookupParams)
    hostile: bool = False


@dataclass(slots=True)
class _Search:
    """One search under way: what to ask for, when to stop, and what came.

    A `patient` one waits for all that may be alive, as a decision has to.
    """

    target: bytes
    ask: Ask
    enough: Enough
    answers: dict[PeerId, Answer]
    patient: bool = True
    known: tuple[PeerId, ...] = ()  # the closest, where it began at them


class Searches:
    """Carries lookups out."""

    def __init__(
        self,
        place: Place,
        contacts: Contacts,
        asks: Asks,
        store: RecordStore,
        jobs: Jobs,
        params: SearchParams,
    ) -> None:
        self._place, self._contacts, self._asks, self._store = place, contacts, asks, store
        self._jobs, self._params = jobs, params
        self._flights: Flights[Searched] = Flights(jobs)
        self._mended: dict[tuple[PeerId, bytes], float] = {}  # when
        self.size = NetworkSize(params.lookup.k)
        k = 0 if params.hostile else params.lookup.k
        self.direct = Direct(place, contacts, asks, jobs, self.size, k)

    @property
    def k(self) -> int:
        """How many peers an answer names."""
        return self._params.lookup.k

    async def find(self, target: bytes) -> Searched:
        """The peers closest to a place. Those that are found were all reached just now."""
        search = _Search(target, partial(self._find, target=target), never, {})
        return await self._flights.share(target, partial(self._search, search, careful=True))

    async def nearest(self, key: bytes) -> Searched:
        """The r peers closest to a key, who were all reached just now; sooner than by `find`."""
        if self._params.hostile:
            return await self.find(key)
        search = _Search(key, partial(self._find, target=key), all_reached, {}, patient=False)
        found = partial(self._search, search, careful=True)
        return await self._flights.share((key, all_reached), found)

    async def read(self, kind: Kind, key: bytes, enough: Enough | None = None) -> Searched:
        """What the holders of a key have, until `enough` of them (by kind) have answered."""
        rule = never if self._params.hostile else ENOUGH[kind]
        patient = enough is not None or rule is never
        enough = enough or rule
        ask = partial(self._get_pages, question=Question(kind, key))
        search = _Search(key, ask, enough, {}, patient)
        directly = None if patient else partial(self._read_directly, kind, search)
        read = partial(self._read, kind, search)
        return await self._flights.share((kind, key, enough), read, directly)

    async def look(self, kind: Kind, key: bytes) -> Searched:
        """The same, more than once where it finds nothing and those who held it have just died."""
        found = await self.read(kind, key)
        for _ in range(LOOKS_AGAIN):
            if found.copies() or not self.direct.is_bereft(key):
                break
            await trio.sleep(LOOK_AGAIN)
            found = await self.read(kind, key)
        return found

    async def inspect(self, key: bytes) -> Searched:
        """What all holders of a key have, whatever it is. It repairs nothing."""
        question = Question(None, key)
        ask = partial(self._get_pages, question=question)
        search = _Search(key, ask, never, self._own_answer(question))
        return await self._flights.share(question, partial(self._search, search, careful=True))

    def usable(self, peer: PeerId) -> bool:
        """Whether a question to this peer may be answered."""
        return self.direct.usable(peer)

    # ------------------------------------------------------------------------------- carried out
    def _read_directly(self, kind: Kind, search: _Search) -> Promise[Searched | None]:
        def mend() -> None:
            if read.value is not None:
                self._mend(kind, search.target, read.value)

        own = self._own_answer(Question(kind, search.target))
        careful = kind is Kind.LEASE
        read = self.direct.read(kind, search.target, search.enough, own, careful=careful)
        read.then(mend)
        return read

    async def _read(self, kind: Kind, search: _Search) -> Searched:
        search.answers.update(self._own_answer(Question(kind, search.target)))
        found = await self._search(search, careful=kind is Kind.LEASE)
        self._mend(kind, search.target, found)
        return found

    async def _search(self, search: _Search, *, careful: bool) -> Searched:
        table, target = self._contacts.table, search.target
        began = trio.current_time()
        seeds = self.direct.closest_known(target, careful=careful)
        params = self._width(careful=careful)
        search.known = tuple(seeds)
        if seeds:
            params = replace(params, paths=1, alpha=self.k)
        else:
            seeds = table.closest(target, self.k, self.usable)
        lookup = await self._look_up(search, seeds, params)
        closest, now = lookup.result(), trio.current_time()
        if crowded := self.size.is_crowded(target, closest, now):
            telemetry.emit("dht.key.crowded", key=target)
            telemetry.count("p2pmoe_dht_crowded_total")
            search.enough = never
            seeds = [*closest, *table.closest(target, WIDE.k, self.usable)]  # not ground ids alone
            lookup = await self._look_up(search, seeds, WIDE)
            everybody = {*lookup.result(), *filter(None, [self._place.holder])}
            found = self.size.region(target, everybody, now)
        else:
            if lookup.done:  # one that ended early knows too few, and they lie too far away
                self.size.found(target, closest, now)
                table.expected = self.size.estimate(now)
            # Who stopped early has not heard all of the closest, but knows which ones they are.
            early = not lookup.done and self._settled(lookup, search)
            known = lookup.closest(self.k, now) if early else closest
            most = self.k if self._params.hostile else MOST_HOLDERS  # of 5, all lie in one of 32
            found = holders(target, known, self._place.holder, most)
        now = trio.current_time()
        if lookup.done or not search.known:
            table.looked_up(target, now)
        summary = lookup.summary(now)
        telemetry.emit(
            "dht.lookup.finished",
            seconds=now - began,
            answered=summary.answered,
            failed=summary.failed,
            hops=summary.hops,
            crowded=crowded,
        )
        return Searched(found, search.answers, summary)

    def _width(self, *, careful: bool) -> LookupParams:
        params = self._params.lookup
        if self._params.hostile:
            return replace(params, paths=HOSTILE_PATHS)
        two = careful and len(self._contacts.table) >= ONE_PATH_BELOW
        return replace(params, paths=2) if two else params

    async def _look_up(
        self, search: _Search, seeds: Iterable[PeerId], params: LookupParams
    ) -> Lookup:
        lookup = Lookup(search.target, self._place.own, seeds, params, self._contacts.doubtful)
        with trio.move_on_after(SEARCH_LIMIT):
            await self._run(lookup, search, params)
        return lookup

    async def _run(self, lookup: Lookup, search: _Search, params: LookupParams) -> None:
        """Begin the next question as soon as an answer comes; state changes here alone."""
        came_send, came = trio.open_memory_channel[tuple[PeerId, Answer | None]](
            params.most_asked * params.paths  # each peer is asked once, so this never fills
        )
        async with trio.open_nursery() as questions:
            while not lookup.done and not self._settled(lookup, search):
                now = trio.current_time()
                front = 0 if search.patient else MOST_HOLDERS
                for peer in lookup.wanted(now, front):
                    if self.usable(peer):
                        questions.start_soon(self._ask, search, peer, came_send)
                    else:
                        came_send.send_nowait((peer, None))
                with trio.move_on_at(lookup.next_deadline(now)):
                    peer, answer = await came.receive()
                    if answer is None:
                        lookup.failed(peer)
                    else:
                        search.answers[peer] = answer
                        lookup.told(peer, answer.closer, trio.current_time())
            questions.cancel_scope.cancel()

    async def _ask(
        self,
        search: _Search,
        peer: PeerId,
        came: trio.MemorySendChannel[tuple[PeerId, Answer | None]],
    ) -> None:
        try:
            answer: Answer | None = await search.ask(peer, search.known)
        except P2PMoEError:  # marked and told about where it was asked
            answer = None
        came.send_nowait((peer, answer))

    async def _find(self, peer: PeerId, _known: tuple[PeerId, ...], target: bytes) -> Answer:
        return await self._asks.find(peer, target)

    async def _get_pages(
        self, peer: PeerId, known: tuple[PeerId, ...], question: Question
    ) -> Answer:
        question = replace(question, known=names(known))
        first = page = await self._asks.get(peer, question)
        records = list(page.records)
        for _ in range(MOST_PAGES):
            if not (page.more and page.records and question.kind is Kind.PREFIX):
                break
            after = page.records[-1].signed.signer.raw
            page = await self._asks.get(peer, replace(question, after=after))
            records += page.records
        return Answer(first.closer, tuple(records), first.number)

    def _settled(self, lookup: Lookup, search: _Search) -> bool:
        """Who is slow does not count, so that a dead peer near the key costs a read little."""
        now = trio.current_time()
        found = any(answer.records for answer in search.answers.values())
        if found and not search.patient and lookup.settled(now):  # the rest may be dead
            return True
        if search.enough is never:
            return False
        if search.enough in _BY_ALL and not lookup.has_converged(MOST_HOLDERS):
            return False
        known = lookup.closest(self.k, now)
        closest = holders(search.target, known, self._place.holder)
        answers = [search.answers[peer] for peer in closest if peer in search.answers]
        crowded = self.size.is_crowded(search.target, known, now)
        return search.enough(answers, len(closest)) and not crowded

    def _own_answer(self, question: Question) -> dict[PeerId, Answer]:
        """A holder asks itself without a call."""
        if self._place.holder is None:
            return {}
        now = trio.current_time()
        copies = tuple(
            RecordCopy(held.signed, held.expires_at)
            for held in self._store.get(question.key, now, kind=question.kind)
        )
        return {self._place.own: Answer((), copies, self._store.number(question.key))}

    # ------------------------------------------------------------------------------- read repair
    def _mend(self, kind: Kind, key: bytes, found: Searched) -> None:
        """Tell who lacks what others named, without waiting for it; ourselves too."""
        now = trio.current_time()
        for peer in lacking(kind, key, found, now):
            told = (peer, key)
            if peer == self._place.own:
                self.adopt(kind, found)
            elif self._mended.get(told, -MEND_PAUSE) + MEND_PAUSE <= now:
                self._mended.pop(told, None)
                self._mended[told] = now
                if len(self._mended) > MOST_MENDED:
                    del self._mended[next(iter(self._mended))]
                try:
                    self._jobs.start(partial(self._tell, peer, kind, key), lambda: None)
                except (NodeClosed, PeerBusy) as error:
                    telemetry.emit("dht.mend.dropped", error=error)

    async def _tell(self, peer: PeerId, kind: Kind, key: bytes) -> None:
        try:
            await self._asks.mend(peer, kind, key)
        except P2PMoEError as error:
            telemetry.emit("dht.mend.failed", peer=peer, error=error)

    def adopt(self, kind: Kind, found: Searched) -> None:
        """Keep what a read found and this holder lacks; of leases the one that most name (L4)."""
        now = trio.current_time()
        for copy in wanted_copies(kind, found, now):
            self._store.adopt(copy, now)

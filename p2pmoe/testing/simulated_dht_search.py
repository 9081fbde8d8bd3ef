"""Searches in a simulated swarm: a lookup, a read, a write, and what a holder makes of a record.

What `dht/search.py`, `dht/owner.py` and `dht/holder.py` do with tasks is done here with callbacks;
whom to ask, when enough is known, who won and what is granted is decided by the same cores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from p2pmoe.dht.holder import vote_of
from p2pmoe.dht.leases import MOST_HOLDERS, Vote, holders
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
from p2pmoe.dht.records import AskFirst, Others
from p2pmoe.dht.region import WIDE
from p2pmoe.dht.search import HOSTILE_PATHS, MEND_PAUSE, MOST_PAGES, ONE_PATH_BELOW, SEARCH_LIMIT
from p2pmoe.identity import PeerId
from p2pmoe.testing.simulated_dht import Mend, Put, Reply, SimulatedPeer, Then, World
from p2pmoe.wire.envelope import Kind, Signed

BY_ALL = {all_answered, all_reached}  # as `dht/search.py`
Done = Callable[[Searched], None]


class Search:
    """One search carried out; `then` gets what was found. A place is found, a key is read."""

    def __init__(
        self,
        world: World,
        peer: SimulatedPeer,
        wanted: bytes | Question,
        then: Done,
        enough: Enough = never,
    ) -> None:
        self._world, self._peer, self._wanted, self._then = world, peer, wanted, then
        if enough is all_reached and world.params.search.hostile:
            enough = never
        self._enough = enough
        self._patient = enough is never or enough not in {*ENOUGH.values(), all_reached}
        self._target = wanted if isinstance(wanted, bytes) else wanted.key
        self._answers: dict[PeerId, Answer] = {}
        contacts, k = world.contacts_of(peer), world.params.search.lookup.k
        if isinstance(wanted, Question) and peer.listed:
            answer = world.answer(peer, peer, wanted)
            self._answers[peer.id] = Answer((), answer.records, answer.number)
        seeds = contacts.table.closest(self._target, k, partial(world.usable, peer))
        self._wide = False
        self._begin(seeds, self._width(len(contacts.table)))

    def _width(self, known: int) -> LookupParams:
        params = self._world.params.search
        if params.hostile:
            return replace(params.lookup, paths=HOSTILE_PATHS)
        careful = isinstance(self._wanted, bytes) or self._wanted.kind is Kind.LEASE
        two = careful and known >= ONE_PATH_BELOW
        return replace(params.lookup, paths=2) if two else params.lookup

    def _begin(self, seeds: Iterable[PeerId], params: LookupParams) -> None:
        doubted = self._world.contacts_of(self._peer).suspected
        self._lookup = Lookup(self._target, self._peer.id, seeds, params, doubted)
        self._over = False
        self._world.simulation.after(SEARCH_LIMIT, self._end, self._lookup)
        self._step(self._lookup)

    # ---------------------------------------------------------------------------------- one step
    def _step(self, lookup: Lookup) -> None:
        """Ask whom the lookup wants asked. Another lookup's steps come to nothing."""
        while lookup is self._lookup and not self._over and self._peer.alive:
            if lookup.done or self._settled():
                self._end(lookup)
                return
            chosen = lookup.wanted(self._world.now, 0 if self._patient else MOST_HOLDERS)
            for peer in chosen:
                if self._world.usable(self._peer, peer):
                    heard = partial(self._heard, lookup, peer, None)
                    self._world.ask(self._peer, peer, self._wanted, heard)
                else:
                    lookup.failed(peer)
            if not chosen:
                deadline = lookup.next_deadline(self._world.now)
                if deadline < math.inf:
                    self._world.simulation.at(deadline, self._step, lookup)
                return

    def _heard(
        self, lookup: Lookup, peer: PeerId, first: Answer | None, reply: Reply | None
    ) -> None:
        if lookup is not self._lookup or self._over:
            return
        if isinstance(reply, Answer):
            records = reply.records if first is None else first.records + reply.records
            whole = Answer((first or reply).closer, records, reply.number)
            if self._has_pages(reply, len(records)):
                after = records[-1].signed.signer.raw
                assert isinstance(self._wanted, Question)
                question = Question(self._wanted.kind, self._wanted.key, after)
                then = partial(self._heard, lookup, peer, whole)
                self._world.ask(self._peer, peer, question, then)
                return
            self._answers[peer] = whole
            lookup.told(peer, whole.closer, self._world.now)
        else:
            lookup.failed(peer)
        self._step(lookup)

    def _has_pages(self, reply: Answer, known: int) -> bool:
        paged = isinstance(self._wanted, Question) and self._wanted.kind is Kind.PREFIX
        return paged and reply.more and known < MOST_PAGES * len(reply.records)

    def _settled(self) -> bool:
        found = any(answer.records for answer in self._answers.values())
        if found and not self._patient and self._lookup.settled(self._world.now):
            return True
        if self._enough is never:
            return False
        if self._enough in BY_ALL and not self._lookup.has_converged(MOST_HOLDERS):
            return False
        known = self._lookup.closest(self._world.params.search.lookup.k, self._world.now)
        closest = holders(self._target, known, self._own)
        answers = [self._answers[peer] for peer in closest if peer in self._answers]
        return self._enough(answers, len(closest)) and not self._peer.size.is_crowded(
            self._target, known, self._world.now
        )

    @property
    def _own(self) -> PeerId | None:
        return self._peer.id if self._peer.listed else None

    # ----------------------------------------------------------------------------------- the end
    def _end(self, lookup: Lookup) -> None:
        if self._over or lookup is not self._lookup or not self._peer.alive:
            return
        closest, now, size = lookup.result(), self._world.now, self._peer.size
        self._over = True
        if self._wide:
            everybody = {*closest, *([self._own] if self._own else ())}
            self._finish(size.region(self._target, everybody, now))
        elif size.is_crowded(self._target, closest, now):
            self._wide, self._enough = True, never
            table = self._world.contacts_of(self._peer).table
            usable = partial(self._world.usable, self._peer)
            self._begin([*closest, *table.closest(self._target, WIDE.k, usable)], WIDE)
        else:
            if lookup.done:
                size.found(self._target, closest, now)
                self._world.contacts_of(self._peer).table.expected = size.estimate(now)
            params = self._world.params.search
            known = closest if lookup.done else lookup.closest(params.lookup.k, now)
            most = params.lookup.k if params.hostile else MOST_HOLDERS
            self._finish(holders(self._target, known, self._own, most))

    def _finish(self, found: list[PeerId]) -> None:
        self._world.contacts_of(self._peer).table.looked_up(self._target, self._world.now)
        summary = self._lookup.summary(self._world.now)
        self._then(Searched(found, self._answers, summary))


def read(
    world: World,
    peer: SimulatedPeer,
    question: Question,
    then: Done,
    enough: Enough | None = None,
) -> None:
    """What the holders of a key have; those that lack what others have are told afterwards."""
    assert question.kind is not None
    enough = never if world.params.search.hostile else enough or ENOUGH[question.kind]

    def found(searched: Searched) -> None:
        then(searched)
        _mend(world, peer, question, searched)

    Search(world, peer, question, found, enough)


def _mend(world: World, peer: SimulatedPeer, question: Question, found: Searched) -> None:
    kind = question.kind
    assert kind is not None
    for other in lacking(kind, question.key, found, world.now):
        told = (other, question.key)
        if other == peer.id:
            adopt(world, peer, kind, found)
        elif peer.mended.get(told, -MEND_PAUSE) + MEND_PAUSE <= world.now:
            peer.mended[told] = world.now
            world.ask(peer, other, Mend(kind, question.key), lambda _: None)


def adopt(world: World, peer: SimulatedPeer, kind: Kind, found: Searched) -> None:
    """Keep what a read found and this holder lacks."""
    for copy in wanted_copies(kind, found, world.now):
        world.store_of(peer).adopt(copy, world.now)


# ------------------------------------------------------------------------------------- writing
class Write:
    """A record put at whoever is closest now; `then` gets the vote of each that answered."""

    def __init__(
        self,
        world: World,
        peer: SimulatedPeer,
        record: Signed[Any],
        then: Callable[[Mapping[PeerId, Vote], int], None] = lambda _votes, _asked: None,
        transfer: Signed[Any] | None = None,
    ) -> None:
        self._world, self._peer, self._then = world, peer, then
        self._put = Put(record, transfer)
        self._votes: dict[PeerId, Vote] = {}
        self._left = self._asked = 0

    def begin(self) -> None:
        """Look for the holders first."""
        key = self._put.record.body.key
        Search(self._world, self._peer, key, lambda found: self.at(found.holders), all_reached)

    def at(self, places: list[PeerId]) -> None:
        """Put it at these."""
        self._left = self._asked = len(places)
        for holder in places:
            told = partial(self._voted, holder)
            if holder == self._peer.id:
                self._world.take(self._peer, self._peer, self._put, told)
            else:
                self._world.ask(self._peer, holder, self._put, told)

    def _voted(self, holder: PeerId, vote: Reply | None) -> None:
        self._left -= 1
        if isinstance(vote, Vote):
            self._votes[holder] = vote
        if not self._left and self._peer.alive:
            self._then(self._votes, self._asked)


# ------------------------------------------------------------------------------------- holding
def take(
    world: World,
    holder: SimulatedPeer,
    sender: SimulatedPeer,
    asked: Put | Mend,
    then: Then,
) -> None:
    """What an honest holder makes of a record, or of the word that others have more."""
    if isinstance(asked, Mend):
        then(Vote("stored"))
        question = Question(asked.kind, asked.key)
        found = partial(adopt, world, holder, asked.kind)
        Search(world, holder, question, found)
        return
    if sender.id != asked.record.signer and asked.record.kind is not Kind.MANIFEST:
        then(Vote("refused", "not_publisher"))
        return
    outcome = world.store_of(holder).put(asked.record, world.now, transfer=asked.transfer)
    if isinstance(outcome, AskFirst):
        _grant(world, holder, outcome, then)
    else:
        then(vote_of(outcome))


def _grant(world: World, holder: SimulatedPeer, first: AskFirst, then: Then) -> None:
    """L1: the publisher is dialled back (`World` does so when it comes), the others are asked."""
    claimant, key = first.lease.signer, first.lease.body.key

    def owned(answers: Iterable[Answer], _asked: int) -> bool:
        return any(
            copy.signed.signer != claimant and world.now < copy.expires_at
            for answer in answers
            for copy in answer.records
        )

    def found(searched: Searched) -> None:
        answered = len(searched.answers.keys() - {holder.id})
        others = Others(searched.copies(), searched.number(), answered)
        store = world.store_of(holder)
        then(vote_of(store.decide(first.lease, others, world.now, transfer=first.transfer)))

    read(world, holder, Question(Kind.LEASE, key), found, owned)


def honest(world: World) -> World:
    """A world whose peers take records as they should."""
    world.take = partial(take, world)
    return world

"""The holding side: answers `dht.find`, `dht.get`, `dht.put` and `dht.mend` from its own store.

A lease or a dictionary is taken only over its publisher's own connection, so that its lifetime
runs from when the publisher said it; a manifest may come from anybody, because it says nothing
about who has it. Before a vacant uid is granted the publisher was dialled back and the other
closest peers were asked (L1). Whoever says that others have more is not believed: they are asked.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import trio

from p2pmoe import telemetry
from p2pmoe.dht.asks import NAME_BYTES, Asks
from p2pmoe.dht.contacts import Contacts
from p2pmoe.dht.direct import Place
from p2pmoe.dht.jobs import Jobs
from p2pmoe.dht.leases import MOST_HOLDERS, LeaseCopy, Vote
from p2pmoe.dht.messages import (
    FIND,
    GET,
    MEND,
    PUT,
    FindRequest,
    GetRequest,
    Lease,
    MendReply,
    MendRequest,
    PutReply,
    PutRequest,
    RecordPut,
    Transfer,
    Verdict,
)
from p2pmoe.dht.outcomes import Abstained, AskFirst, Full, Others, Put, Refused, Stale, Stored
from p2pmoe.dht.packing import Cards, Packer, copy_of
from p2pmoe.dht.reading import Answer
from p2pmoe.dht.records import RecordStore
from p2pmoe.dht.routing import Networks
from p2pmoe.dht.search import Searches
from p2pmoe.errors import NodeClosed, NotAllowed, P2PMoEError, PeerBusy
from p2pmoe.identity import ID_BYTES, PeerId, distance
from p2pmoe.net.incoming import Handler, IncomingCall
from p2pmoe.wire import schema
from p2pmoe.wire.envelope import Kind, Signed

OTHERS_LIMIT = 4.0  # seconds for L1; within what the publisher waits for a put
MOST_MENDING = 32  # keys for which others are asked at once because somebody said so; a guess


@dataclass(frozen=True, slots=True)
class HolderParts:
    """What a holder works with. `dial_back` says whether a peer answers at its own addresses.

    `offered` says what becomes of a transfer that somebody hands over.
    """

    place: Place
    store: RecordStore
    contacts: Contacts
    asks: Asks
    searches: Searches
    dial_back: Callable[[PeerId], Awaitable[bool]]
    offered: Callable[[Signed[Transfer]], Vote]
    jobs: Jobs


class Holder:
    """Serves this peer's store to others, and to itself by `put`."""

    def __init__(self, parts: HolderParts) -> None:
        self._parts = parts
        self._mending: set[bytes] = set()  # keys
        self.handlers: dict[str, Handler] = {
            FIND: self._find,
            GET: self._get,
            PUT: self._put,
            MEND: self._mend,
        }

    # ---------------------------------------------------------------------------------- answers
    async def _find(self, call: IncomingCall) -> None:
        request = schema.decode(call.body, FindRequest)
        packer = Packer(self._card, trio.current_time())
        for target in request.targets:
            if not packer.add(self._closer(target, call.peer), []):
                break
        await call.send(schema.encode(packer.reply()))

    async def _get(self, call: IncomingCall) -> None:
        request = schema.decode(call.body, GetRequest)
        now, store = trio.current_time(), self._parts.store
        packer = Packer(self._card, now)
        for query in request.keys:
            kind = None if query.kind is None else Kind(query.kind)
            records = store.get(query.key, now, query.after, kind)
            closer = self._closer(query.key, call.peer, query.known)
            if not packer.add(closer, records, store.number(query.key)):
                break
        await call.send(schema.encode(packer.reply()))

    async def _put(self, call: IncomingCall) -> None:
        if self._parts.place.holder is None:
            raise NotAllowed("this peer cannot be dialled and holds nothing for others")
        request = schema.decode(call.body, PutRequest)
        if call.record is not None:
            self._parts.contacts.learn(call.record)
        handed = [self._opened(each) for each in request.records]
        votes: dict[int, Vote] = {}
        if len(handed) == 1:  # without a task of its own, which is a tenth of the cost
            await self._put_one(call.peer, handed[0], 0, votes)
        else:
            async with trio.open_nursery() as decisions:
                for at, each in enumerate(handed):
                    decisions.start_soon(self._put_one, call.peer, each, at, votes)
        now = trio.current_time()
        cards = Cards(self._card)
        for at, put in enumerate(request.records):
            if put.holders:
                closer = self._closer(handed[at][0].body.key, call.peer, put.holders)
                votes[at] = replace(votes[at], closer=tuple(closer))
        verdicts = tuple(_verdict(votes[at], now, cards) for at in range(len(handed)))
        await call.send(schema.encode(PutReply(verdicts=verdicts, contacts=tuple(cards.raw))))

    async def _mend(self, call: IncomingCall) -> None:
        request = schema.decode(call.body, MendRequest)
        for each in request.keys if self._parts.place.holder is not None else ():
            if each.key not in self._mending and len(self._mending) < MOST_MENDING:
                ask = partial(self._ask_for_more, Kind(each.kind), each.key)
                try:
                    self._parts.jobs.start(ask, partial(self._mending.discard, each.key))
                except (NodeClosed, PeerBusy):
                    break
                self._mending.add(each.key)
        await call.send(schema.encode(MendReply()))

    async def _ask_for_more(self, kind: Kind, key: bytes) -> None:
        try:
            found = await self._parts.searches.read(kind, key)
            self._parts.searches.adopt(kind, found)
        except P2PMoEError as error:
            telemetry.emit("dht.mend.failed", error=error)
        finally:
            self._mending.discard(key)

    def _opened(self, handed: RecordPut) -> tuple[Signed[Any], Signed[Transfer] | None]:
        sealed, kind = self._parts.asks, Kind(handed.kind)
        transfer = sealed.open(handed.transfer, Kind.TRANSFER) if handed.transfer else None
        return sealed.open(handed.record, kind), transfer

    async def _put_one(
        self,
        sender: PeerId,
        handed: tuple[Signed[Any], Signed[Transfer] | None],
        at: int,
        votes: dict[int, Vote],
    ) -> None:
        record, transfer = handed
        if sender != record.signer and record.kind is not Kind.MANIFEST:
            votes[at] = Vote("refused", "not_publisher")
        elif record.kind is Kind.TRANSFER:
            votes[at] = self._parts.offered(record)
        else:
            votes[at] = await self.put(record, transfer)

    def _card(self, peer: PeerId) -> bytes | None:
        record = self._parts.contacts.record(peer)
        return None if record is None else record.raw

    def _closer(self, target: bytes, asker: PeerId, known: Sequence[bytes] = ()) -> list[PeerId]:
        """The closest; of those to whom r are `known` only what is missing between them."""
        searches, table = self._parts.searches, self._parts.contacts.table

        def named(peer: PeerId) -> bool:
            return peer != asker and searches.usable(peer)

        if len(known) < MOST_HOLDERS:
            return table.closest(target, searches.k, named)
        rest = bytes(ID_BYTES - NAME_BYTES)
        farthest = max(distance(name + rest, target) for name in known)
        near = table.within(target, farthest)
        return [peer for peer in near if peer.raw[:NAME_BYTES] not in known and named(peer)]

    # --------------------------------------------------------------------------------- decisions
    async def put(self, record: Signed[Any], transfer: Signed[Transfer] | None = None) -> Vote:
        """What this holder makes of a record that its publisher handed over."""
        networks, now = self._networks(record.signer), trio.current_time()
        outcome = self._parts.store.put(record, now, networks, transfer)
        if isinstance(outcome, AskFirst):
            outcome = await self._grant(outcome.lease, outcome.transfer)
        telemetry.count("p2pmoe_dht_puts_total", result=type(outcome).__name__.lower())
        vote = vote_of(outcome)
        return vote if self._comes_first(record, now) else replace(vote, why=vote.why or "later")

    def _comes_first(self, record: Signed[Any], now: float) -> bool:
        """Whether no other manifest of the name was here before this one."""
        if record.kind is not Kind.MANIFEST:
            return True
        first = self._parts.store.get(record.body.key, now, kind=Kind.MANIFEST)
        return not first or first[0].signed.digest == record.digest

    async def _grant(self, lease: Signed[Lease], transfer: Signed[Transfer] | None) -> Put:
        """L1: dial the publisher back, ask the others, then decide."""
        others: list[Others] = []
        reached = lease.signer == self._parts.place.own
        with trio.move_on_after(OTHERS_LIMIT):
            async with trio.open_nursery() as questions:
                questions.start_soon(self._ask_others, lease, others)
                reached = reached or await self._parts.dial_back(lease.signer)
        if not reached:
            return Refused("not_dialled")
        if not others:  # they did not all answer in time, so nothing is known
            return Abstained()
        networks = self._networks(lease.signer)
        now = trio.current_time()
        return self._parts.store.decide(lease, others[0], now, networks, transfer)

    def _networks(self, publisher: PeerId) -> Networks:
        return self._parts.contacts.networks(publisher)

    async def _ask_others(self, lease: Signed[Lease], others: list[Others]) -> None:
        owned = partial(_somebody_else_has_it, lease.signer)
        try:
            found = await self._parts.searches.read(Kind.LEASE, lease.body.key, owned)
        except (NodeClosed, PeerBusy):  # this peer has too much to do, or ends
            return
        answered = len(found.answers.keys() - {self._parts.place.own})
        others.append(Others(found.copies(), found.number(), answered))


def _somebody_else_has_it(claimant: PeerId, answers: Sequence[Answer], _asked: int) -> bool:
    now = trio.current_time()
    return any(
        copy.signed.signer != claimant and now < copy.expires_at
        for answer in answers
        for copy in answer.records
    )


def vote_of(outcome: Put) -> Vote:
    """The words for what the store has decided."""
    match outcome:
        case Stored():
            return Vote("stored")
        case Stale():
            return Vote("stale")
        case Abstained():
            return Vote("abstained", "restarted")
        case Full():
            return Vote("full", outcome.why)
        case _:
            held = outcome.owner
            owner = None if held is None else LeaseCopy(held.signed, held.expires_at)
            return Vote("refused", outcome.why, outcome.number, owner)


def _verdict(vote: Vote, now: float, cards: Cards) -> Verdict:
    owner = None if vote.owner is None else copy_of(vote.owner, now)
    closer = tuple(place for peer in vote.closer if (place := cards.place(peer)) is not None)
    return Verdict(
        outcome=vote.outcome, why=vote.why, number=vote.number, owner=owner, closer=closer
    )

"""The holding side: answers `dht.find`, `dht.get`, `dht.put` and `dht.mend` from its own store.

A lease or a dictionary is taken only over its publisher's own connection, so that its lifetime
runs from when the publisher said it; a manifest may come from anybody, because it says nothing
about who has it. Before a vacant uid is granted the publisher was dialled back and the other
closest peers were asked (L1). Whoever says that others have more is not believed: they are asked.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
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
from p2pmoe.net.incoming import Handler, IncomingCall, Prompt, Task
from p2pmoe.wire import schema
from p2pmoe.wire.envelope import Kind, Signed
from p2pmoe.wire.schema import Message

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


@dataclass(frozen=True, slots=True)
class _Puts:
    """Records that one call hands over, by their keys, and what becomes of each."""

    call: IncomingCall
    request: PutRequest
    keys: list[bytes]
    votes: list[Vote | AskFirst]


class Holder:
    """Serves this peer's store to others, and to itself by `put`."""

    def __init__(self, parts: HolderParts) -> None:
        self._parts = parts
        self._mending: set[bytes] = set()  # keys
        self.handlers: dict[str, Handler] = {
            FIND: Prompt(self._find),
            GET: Prompt(self._get),
            PUT: Prompt(self._put),
            MEND: Prompt(self._mend),
        }

    # ---------------------------------------------------------------------------------- answers
    def _find(self, call: IncomingCall) -> None:
        request = schema.decode(call.body, FindRequest)
        packer = Packer(self._card, trio.current_time())
        for target in request.targets:
            if not packer.add(self._closer(target, call.peer), []):
                break
        _answer(call, packer.reply())

    def _get(self, call: IncomingCall) -> None:
        request = schema.decode(call.body, GetRequest)
        now, store = trio.current_time(), self._parts.store
        packer = Packer(self._card, now)
        for query in request.keys:
            kind = None if query.kind is None else Kind(query.kind)
            records = store.get(query.key, now, query.after, kind)
            closer = self._closer(query.key, call.peer, query.known)
            if not packer.add(closer, records, store.number(query.key)):
                break
        _answer(call, packer.reply())

    def _put(self, call: IncomingCall) -> Task | None:
        if self._parts.place.holder is None:
            raise NotAllowed("this peer cannot be dialled and holds nothing for others")
        request = schema.decode(call.body, PutRequest)
        if call.record is not None:
            self._parts.contacts.learn(call.record)
        handed = [self._opened(each) for each in request.records]
        votes = [self._look(call.peer, *each) for each in handed]
        puts = _Puts(call, request, [record.body.key for record, _ in handed], votes)
        if any(isinstance(vote, AskFirst) for vote in votes):
            return partial(self._ask_first, puts)
        self._tell(puts)
        call.finish()
        return None

    async def _ask_first(self, puts: _Puts, _call: IncomingCall) -> None:
        """What has to wait for others, all at once."""

        async def settle(at: int, first: AskFirst) -> None:
            puts.votes[at] = await self._grant(first)

        async with trio.open_nursery() as decisions:
            for at, vote in enumerate(puts.votes):
                if isinstance(vote, AskFirst):
                    decisions.start_soon(settle, at, vote)
        self._tell(puts)

    def _tell(self, puts: _Puts) -> None:
        """Post what became of each record, and who is closer for those that want to know."""
        now = trio.current_time()
        cards, verdicts = Cards(self._card), []
        for put, key, vote in zip(puts.request.records, puts.keys, puts.votes, strict=True):
            assert isinstance(vote, Vote)
            closer = self._closer(key, puts.call.peer, put.holders) if put.holders else ()
            verdicts.append(_verdict(vote, closer, now, cards))
        reply = PutReply(verdicts=tuple(verdicts), contacts=tuple(cards.raw))
        puts.call.post(schema.encode(reply))

    def _mend(self, call: IncomingCall) -> None:
        request = schema.decode(call.body, MendRequest)
        for each in request.keys if self._parts.place.holder is not None else ():
            if each.key not in self._mending and len(self._mending) < MOST_MENDING:
                ask = partial(self._ask_for_more, Kind(each.kind), each.key)
                try:
                    self._parts.jobs.start(ask, partial(self._mending.discard, each.key))
                except (NodeClosed, PeerBusy):
                    break
                self._mending.add(each.key)
        _answer(call, MendReply())

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

    def _look(
        self, sender: PeerId, record: Signed[Any], transfer: Signed[Transfer] | None
    ) -> Vote | AskFirst:
        if sender != record.signer and record.kind is not Kind.MANIFEST:
            return Vote("refused", "not_publisher")
        if record.kind is Kind.TRANSFER:
            return self._parts.offered(record)
        return self._decide(record, transfer)

    def _card(self, peer: PeerId) -> bytes | None:
        record = self._parts.contacts.record(peer)
        return None if record is None else record.raw

    def _closer(self, target: bytes, asker: PeerId, known: Sequence[bytes] = ()) -> list[PeerId]:
        """The closest; of those to whom r are `known` only what is missing between them.

        Who may be dead is named only where too few others are: each would cost the asker a dial.
        """
        searches, table = self._parts.searches, self._parts.contacts.table

        def sure(peer: PeerId) -> bool:
            return peer != asker and searches.direct.sure(peer)

        def usable(peer: PeerId) -> bool:
            return peer != asker and searches.usable(peer)

        if len(known) < MOST_HOLDERS:
            near = table.closest(target, searches.k, sure)
            return near if len(near) == searches.k else table.closest(target, searches.k, usable)
        rest = bytes(ID_BYTES - NAME_BYTES)
        farthest = max(distance(name + rest, target) for name in known)
        near = table.within(target, farthest)
        return [peer for peer in near if peer.raw[:NAME_BYTES] not in known and sure(peer)]

    # --------------------------------------------------------------------------------- decisions
    async def put(self, record: Signed[Any], transfer: Signed[Transfer] | None = None) -> Vote:
        """What this holder makes of a record that its publisher handed over."""
        outcome = self._decide(record, transfer)
        return await self._grant(outcome) if isinstance(outcome, AskFirst) else outcome

    def _decide(self, record: Signed[Any], transfer: Signed[Transfer] | None) -> Vote | AskFirst:
        networks, now = self._networks(record.signer), trio.current_time()
        outcome = self._parts.store.put(record, now, networks, transfer)
        if isinstance(outcome, AskFirst):
            return outcome
        vote = _counted(outcome)
        return vote if self._comes_first(record, now) else replace(vote, why=vote.why or "later")

    def _comes_first(self, record: Signed[Any], now: float) -> bool:
        """Whether no other manifest of the name was here before this one."""
        if record.kind is not Kind.MANIFEST:
            return True
        first = self._parts.store.get(record.body.key, now, kind=Kind.MANIFEST)
        return not first or first[0].signed.digest == record.digest

    async def _grant(self, first: AskFirst) -> Vote:
        """L1: dial the publisher back, ask the others, then decide."""
        lease = first.lease
        others: list[Others] = []
        reached = lease.signer == self._parts.place.own
        with trio.move_on_after(OTHERS_LIMIT):
            async with trio.open_nursery() as questions:
                questions.start_soon(self._ask_others, lease, others)
                reached = reached or await self._parts.dial_back(lease.signer)
        if not reached:
            return _counted(Refused("not_dialled"))
        if not others:  # they did not all answer in time, so nothing is known
            return _counted(Abstained())
        networks = self._networks(lease.signer)
        now = trio.current_time()
        store = self._parts.store
        return _counted(store.decide(lease, others[0], now, networks, first.transfer))

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


def _answer(call: IncomingCall, reply: Message) -> None:
    """All that there is to say, at once."""
    call.post(schema.encode(reply))
    call.finish()


def _counted(outcome: Put) -> Vote:
    telemetry.count("p2pmoe_dht_puts_total", result=type(outcome).__name__.lower())
    return vote_of(outcome)


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


def _verdict(vote: Vote, closer: Iterable[PeerId], now: float, cards: Cards) -> Verdict:
    owner = None if vote.owner is None else copy_of(vote.owner, now)
    places = tuple(place for peer in closer if (place := cards.place(peer)) is not None)
    return Verdict(
        outcome=vote.outcome, why=vote.why, number=vote.number, owner=owner, closer=places
    )

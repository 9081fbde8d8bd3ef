"""The four questions to one peer, as messages, and their answers as typed values.

`find`, `get`, `put` and `mend` each take one question and return its answer, verified: every
signature in an answer is checked here, so that above only typed values exist. How questions travel
stands in `lines`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import trio

from p2pmoe.dht.contacts import Contacts
from p2pmoe.dht.jobs import Jobs, Promise
from p2pmoe.dht.leases import LeaseCopy, RecordCopy, Vote
from p2pmoe.dht.lines import Asked, Form, Line, Reading
from p2pmoe.dht.messages import (
    BODY_TYPES,
    FIND,
    GET,
    MEND,
    PUT,
    Copy,
    FindRequest,
    FoundReply,
    GetRequest,
    HandedKind,
    KeyQuery,
    MendKey,
    MendReply,
    MendRequest,
    PutReply,
    PutRequest,
    RecordPut,
    StoredKind,
    Transfer,
    Verdict,
)
from p2pmoe.dht.reading import Answer, Question
from p2pmoe.errors import MalformedMessage
from p2pmoe.identity import PeerId
from p2pmoe.net.pool import Pool
from p2pmoe.wire import cbor, schema
from p2pmoe.wire.envelope import Kind, Signed, open_envelope
from p2pmoe.wire.peer_record import PeerRecord, open_record

ASK_LIMIT = 3.0  # seconds for a find or a get, dialling included: 5 round trips of 600 ms
PUT_LIMIT = 8.0  # seconds for a put: its holder may ask others first
VERIFY_AT_ONCE = 16  # signatures checked before other tasks get their turn: about 3 ms
NAME_BYTES = 8  # of an id, where nothing but which of a few peers is meant
CARDS = 1024  # peer records that stay open, of 600 B at most and as much again; a guess
OPENED = 64  # other records that stay open, of 32 KiB at most and as much again; a guess


@dataclass(frozen=True, slots=True)
class _Handed:
    """A record to put, and what its publisher was signed by the owner before, of a lease."""

    record: Signed[Any]
    transfer: Signed[Transfer] | None = None
    holders: tuple[bytes, ...] = ()  # how their ids begin

    def size(self) -> int:
        """Bytes that it takes in a call."""
        return len(self.record.raw) + (len(self.transfer.raw) if self.transfer else 0)

    def message(self) -> RecordPut:
        """As it travels."""
        kind = cast("HandedKind", self.record.kind.value)
        transfer = self.transfer.raw if self.transfer else b""
        return RecordPut(kind=kind, record=self.record.raw, transfer=transfer, holders=self.holders)


class Asks:
    """The four questions, each for one peer at a time."""

    def __init__(self, pool: Pool, contacts: Contacts, network: bytes, jobs: Jobs) -> None:
        self._contacts, self._network = contacts, network
        self._verified = pool.verified
        self._cards: dict[bytes, Signed[PeerRecord]] = {}  # by their bytes, the latest
        self._opened: dict[bytes, Signed[Any]] = {}  # the same of other records
        find = Form(FIND, ASK_LIMIT, lambda _: 32, _finding, self._found)
        get = Form(GET, ASK_LIMIT, lambda _: 80, _getting, self._got)
        put = Form(PUT, PUT_LIMIT, _Handed.size, _putting, self._voted)
        mend = Form(MEND, ASK_LIMIT, lambda _: 80, _mending, _mended)
        self._finds = Line(pool, contacts, jobs, find)
        self._gets = Line(pool, contacts, jobs, get)
        self._puts = Line(pool, contacts, jobs, put)
        self._mends = Line(pool, contacts, jobs, mend)

    async def find(self, peer: PeerId, target: bytes) -> Answer:
        """Who is closer to this place; raises `P2PMoEError` when the peer does not say."""
        return await self._finds.ask(peer, target)

    async def get(self, peer: PeerId, question: Question) -> Answer:
        """What the peer holds under a key, and who is closer to it; raises as `find`."""
        return await self._gets.ask(peer, question)

    def begin_get(self, peer: PeerId, question: Question) -> Promise[Answer]:
        """As `get`, to wait for later."""
        return self._gets.begin(peer, question)

    async def put(
        self, peer: PeerId, record: Signed[Any], transfer: Signed[Transfer] | None = None
    ) -> Vote:
        """What the peer makes of a record; raises as `find`. `transfer` goes with a lease."""
        return await self._puts.ask(peer, _Handed(record, transfer))

    def begin_put(
        self, peer: PeerId, record: Signed[Any], holders: tuple[bytes, ...]
    ) -> Promise[Vote]:
        """As `put`, to wait for later. Who is told of the `holders` names those that are closer."""
        return self._puts.begin(peer, _Handed(record, None, holders))

    async def mend(self, peer: PeerId, kind: Kind, key: bytes) -> None:
        """Tell the peer that others hold more under a key; raises as `find`."""
        await self._mends.ask(peer, (kind, key))

    # --------------------------------------------------------------------------------- answers
    def _found(self, asked: Asked[bytes], body: bytes) -> Reading[list[Answer]]:
        reply = schema.decode(body, FoundReply)
        return self._open_found(asked.peer, reply, [None for _ in asked.questions], asked.at)

    def _got(self, asked: Asked[Question], body: bytes) -> Reading[list[Answer]]:
        reply = schema.decode(body, FoundReply)
        return self._open_found(asked.peer, reply, asked.questions, asked.at)

    def _voted(self, asked: Asked[_Handed], body: bytes) -> Reading[list[Vote]]:
        reply, handed = schema.decode(body, PutReply), asked.questions
        if len(reply.verdicts) != len(handed):
            raise MalformedMessage("dht.answers", "one verdict a record")
        peers = yield from self._open_cards(asked.peer, reply.contacts)
        pairs = zip(handed, reply.verdicts, strict=True)
        return [self._open_vote(verdict, each.record, asked.at, peers) for each, verdict in pairs]

    def _open_found(
        self, by: PeerId, reply: FoundReply, questions: Sequence[Question | None], asked_at: float
    ) -> Reading[list[Answer]]:
        """Lifetimes count from when the question was sent, so that none is read as longer."""
        if len(reply.answers) > len(questions):
            raise MalformedMessage("dht.answers", "more than questions")
        peers = yield from self._open_cards(by, reply.contacts)
        answers = []
        for question, found in zip(questions, reply.answers, strict=False):
            closer = _chosen(peers, found.closer)
            copies = yield from self._open_copies(found.records, question, asked_at)
            answers.append(Answer(closer, copies, found.number, found.more))
        return answers

    def _open_cards(self, by: PeerId, cards: Iterable[bytes]) -> Reading[list[PeerId]]:
        """Whom an answer names."""
        peers, checked = [], self._verified.checked
        for raw in cards:
            record = self._open_card(raw)
            self._contacts.named(by, record, trio.current_time())
            peers.append(record.signer)
            checked = yield from self._rested(checked)
        return peers

    def _rested(self, since: int) -> Reading[int]:
        """Let others have their turn after many checks; what was seen before costs little."""
        if self._verified.checked < since + VERIFY_AT_ONCE:
            return since
        yield
        return self._verified.checked

    def _open_card(self, raw: bytes) -> Signed[PeerRecord]:
        """A peer record; the same ones come with every answer, so they are opened once."""
        record = self._cards.get(raw)
        if record is None:
            record = self._cards[raw] = open_record(raw, self._network, self._verified)
            _drop_oldest(self._cards, CARDS)
        return record

    def _open_copies(
        self, copies: Iterable[Copy], question: Question | None, asked_at: float
    ) -> Reading[tuple[RecordCopy[Any], ...]]:
        opened, checked = [], self._verified.checked
        for copy in copies:
            if question is None:
                raise MalformedMessage("dht.answers", "records that nobody asked for")
            opened.append(self._open_copy(copy, question.kind, question.key, asked_at))
            checked = yield from self._rested(checked)
        return tuple(opened)

    def _open_copy(
        self, copy: Copy, kind: Kind | None, key: bytes, asked_at: float
    ) -> RecordCopy[Any]:
        signed = self.open(copy.record, kind or _kind_of(copy.record))
        if signed.body.key != key:
            raise MalformedMessage("dht.key", "a record of another key")
        return RecordCopy(signed, asked_at + copy.left_ms / 1000)

    def open(self, raw: bytes, kind: Kind) -> Signed[Any]:
        """Check a sealed record of this kind; `MalformedMessage` else.

        Several holders name the same one at the same time, so it is opened once.
        """
        record = self._opened.get(raw)
        if record is None or record.kind is not kind:
            record = self._opened[raw] = open_envelope(
                raw, BODY_TYPES[kind], kind=kind, network=self._network, cache=self._verified
            )
            _drop_oldest(self._opened, OPENED)
        return record

    def _open_vote(
        self, verdict: Verdict, record: Signed[Any], asked_at: float, peers: Sequence[PeerId]
    ) -> Vote:
        owner: LeaseCopy | None = None
        if verdict.owner is not None and record.kind is Kind.LEASE:
            owner = self._open_copy(verdict.owner, Kind.LEASE, record.body.key, asked_at)
        closer = _chosen(peers, verdict.closer)
        return Vote(verdict.outcome, verdict.why, verdict.number, owner, closer)


def _finding(targets: Sequence[bytes]) -> FindRequest:
    return FindRequest(targets=tuple(targets))


def _getting(questions: Sequence[Question]) -> GetRequest:
    keys = (
        KeyQuery(key=each.key, kind=_word(each.kind), after=each.after, known=each.known)
        for each in questions
    )
    return GetRequest(keys=tuple(keys))


def _putting(handed: Sequence[_Handed]) -> PutRequest:
    return PutRequest(records=tuple(each.message() for each in handed))


def _mending(places: Sequence[tuple[Kind, bytes]]) -> MendRequest:
    keys = (MendKey(kind=cast("StoredKind", kind.value), key=key) for kind, key in places)
    return MendRequest(keys=tuple(keys))


def _mended(asked: Asked[tuple[Kind, bytes]], body: bytes) -> Reading[list[None]]:
    schema.decode(body, MendReply)
    yield from ()
    return [None for _ in asked.questions]


def _chosen(peers: Sequence[PeerId], places: Iterable[int]) -> tuple[PeerId, ...]:
    """Those that stand in these places of an answer's contacts."""
    try:
        return tuple(peers[place] for place in places)
    except IndexError:
        raise MalformedMessage("dht.contact", "a contact that is not there") from None


def _drop_oldest(table: dict[Any, Any], most: int) -> None:
    if len(table) > most:
        del table[next(iter(table))]


def _word(kind: Kind | None) -> StoredKind | None:
    return None if kind is None else cast("StoredKind", kind.value)


def _kind_of(raw: bytes) -> Kind:
    """What an envelope says it is, before anything in it is believed."""
    fields = cbor.loads(raw)
    kind = fields[1] if isinstance(fields, list) and len(fields) > 1 else None
    found = next((known for known in BODY_TYPES if known.value == kind), None)
    if found is None:
        raise MalformedMessage("envelope.kind", "no kind that is stored")
    return found

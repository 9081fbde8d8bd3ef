"""Questions to one peer: those that come up together travel in one call.

`find`, `get`, `put` and `mend` each take one question and return its answer, verified. Rules: a
peer that cannot be reached, does not answer in time or breaks the protocol is marked in
`Contacts`; every signature in an answer is checked here, so that above only typed values exist.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar, cast

import trio

from p2pmoe import telemetry
from p2pmoe.dht.contacts import Contacts
from p2pmoe.dht.jobs import Jobs, Promise
from p2pmoe.dht.leases import LeaseCopy, RecordCopy, Vote
from p2pmoe.dht.messages import (
    BODY_TYPES,
    FIND,
    GET,
    MAX_BATCH,
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
from p2pmoe.errors import (
    CallTimeout,
    MalformedMessage,
    NodeClosed,
    P2PMoEError,
    PeerBusy,
    PeerUnreachable,
    RemoteProtocolError,
)
from p2pmoe.identity import PeerId
from p2pmoe.net.pool import Pool
from p2pmoe.wire import cbor, schema
from p2pmoe.wire.envelope import Kind, Signed, VerifiedCache, open_envelope
from p2pmoe.wire.peer_record import PeerRecord, open_record
from p2pmoe.wire.schema import Message

BATCH_BYTES = 40 * 1024  # of records in one put; leaves room in a control frame
ASK_LIMIT = 3.0  # seconds for a find or a get, dialling included: 5 round trips of 600 ms
PUT_LIMIT = 8.0  # seconds for a put: its holder may ask others first
STALLED = 0.25  # seconds that a deadline is late by when the fault is our own; a guess
VERIFY_AT_ONCE = 16  # signatures checked before other tasks get their turn: about 3 ms
NAME_BYTES = 8  # of an id, where nothing but which of a few peers is meant
CARDS = 1024  # peer records that stay open, of 600 B at most and as much again; a guess
OPENED = 64  # other records that stay open, of 32 KiB at most and as much again; a guess
VERIFIED = 4096  # digests of envelopes that were verified; four times a swarm of 1,000

Q = TypeVar("Q")
A = TypeVar("A")
R = TypeVar("R", bound=Message)


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
        self._pool, self._contacts, self._network = pool, contacts, network
        self.verified = VerifiedCache(VERIFIED)
        self._cards: dict[bytes, Signed[PeerRecord]] = {}  # by their bytes, the latest
        self._opened: dict[bytes, Signed[Any]] = {}  # the same of other records
        self._finds = _Line[bytes, Answer](jobs, self._send_find, lambda _: 32, self._failed)
        self._gets = _Line[Question, Answer](jobs, self._send_get, lambda _: 80, self._failed)
        self._puts = _Line[_Handed, Vote](jobs, self._send_put, _Handed.size, self._failed)

        self._mends = _Line[tuple[Kind, bytes], None](
            jobs, self._send_mend, lambda _: 80, self._failed
        )

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

    # ---------------------------------------------------------------------------------- sending
    async def _send_find(self, peer: PeerId, targets: Sequence[bytes]) -> list[Answer]:
        request = FindRequest(targets=tuple(targets))
        reply = await self._call(peer, FIND, request, FoundReply, ASK_LIMIT)
        return await self._open_found(peer, reply, [None for _ in targets], trio.current_time())

    async def _send_get(self, peer: PeerId, questions: Sequence[Question]) -> list[Answer]:
        keys = tuple(
            KeyQuery(key=each.key, kind=_word(each.kind), after=each.after, known=each.known)
            for each in questions
        )
        asked_at = trio.current_time()
        reply = await self._call(peer, GET, GetRequest(keys=keys), FoundReply, ASK_LIMIT)
        return await self._open_found(peer, reply, questions, asked_at)

    async def _send_put(self, peer: PeerId, handed: Sequence[_Handed]) -> list[Vote]:
        puts = tuple(each.message() for each in handed)
        asked_at = trio.current_time()
        reply = await self._call(peer, PUT, PutRequest(records=puts), PutReply, PUT_LIMIT)
        if len(reply.verdicts) != len(handed):
            raise MalformedMessage("dht.answers", "one verdict a record")
        peers = await self._open_cards(peer, reply.contacts)
        pairs = zip(handed, reply.verdicts, strict=True)
        return [self._open_vote(verdict, each.record, asked_at, peers) for each, verdict in pairs]

    async def _send_mend(self, peer: PeerId, places: Sequence[tuple[Kind, bytes]]) -> list[None]:
        keys = tuple(MendKey(kind=cast("StoredKind", kind.value), key=key) for kind, key in places)
        await self._call(peer, MEND, MendRequest(keys=keys), MendReply, ASK_LIMIT)
        return [None for _ in places]

    async def _call(
        self, peer: PeerId, method: str, request: Message, reply: type[R], limit: float
    ) -> R:
        contact = self._contacts.contact(peer)
        if contact is None:
            raise PeerUnreachable(f"no address of peer {peer} is known", peer=peer.hex)
        deadline = trio.current_time() + limit
        with trio.move_on_at(deadline):
            part = await self._pool.call(contact, method, schema.encode(request))
            telemetry.count("p2pmoe_dht_requests_total", op=method, result="ok")
            self._contacts.table.seen(peer, trio.current_time())
            return schema.decode(part.body, reply)
        late = trio.current_time() - deadline
        if late > STALLED:  # who knows whether the answer waits here
            raise PeerBusy(f"this peer was stalled for {late:.1f} s")
        raise CallTimeout(f"peer {peer} did not answer {method}", peer=peer.hex)

    def _failed(self, peer: PeerId, error: P2PMoEError) -> None:
        telemetry.count("p2pmoe_dht_requests_total", op="any", result=error.code)
        telemetry.emit("dht.call.failed", peer=peer, error=error)
        if isinstance(error, PeerUnreachable | CallTimeout | RemoteProtocolError):
            self._contacts.failed(peer, trio.current_time())

    # ---------------------------------------------------------------------------------- opening
    async def _open_found(
        self, by: PeerId, reply: FoundReply, questions: Sequence[Question | None], asked_at: float
    ) -> list[Answer]:
        """Lifetimes count from when the question was sent, so that none is read as longer."""
        if len(reply.answers) > len(questions):
            raise MalformedMessage("dht.answers", "more than questions")
        peers = await self._open_cards(by, reply.contacts)
        answers = []
        for question, found in zip(questions, reply.answers, strict=False):
            answers.append(
                Answer(
                    _chosen(peers, found.closer),
                    await self._open_copies(found.records, question, asked_at),
                    found.number,
                    found.more,
                )
            )
        return answers

    async def _open_cards(self, by: PeerId, cards: Iterable[bytes]) -> list[PeerId]:
        """Whom an answer names."""
        peers = []
        for at, raw in enumerate(cards, start=1):
            record = self._open_card(raw)
            self._contacts.named(by, record, trio.current_time())
            peers.append(record.signer)
            if at % VERIFY_AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
        return peers

    def _open_card(self, raw: bytes) -> Signed[PeerRecord]:
        """A peer record; the same ones come with every answer, so they are opened once."""
        record = self._cards.get(raw)
        if record is None:
            record = self._cards[raw] = open_record(raw, self._network, self.verified)
            _drop_oldest(self._cards, CARDS)
        return record

    async def _open_copies(
        self, copies: Iterable[Copy], question: Question | None, asked_at: float
    ) -> tuple[RecordCopy[Any], ...]:
        opened = []
        for at, copy in enumerate(copies, start=1):
            if question is None:
                raise MalformedMessage("dht.answers", "records that nobody asked for")
            opened.append(self._open_copy(copy, question.kind, question.key, asked_at))
            if at % VERIFY_AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
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
                raw, BODY_TYPES[kind], kind=kind, network=self._network, cache=self.verified
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


class _Line(Generic[Q, A]):
    """The questions of one method that wait to be sent, by peer."""

    def __init__(
        self,
        jobs: Jobs,
        send: Callable[[PeerId, Sequence[Q]], Awaitable[Sequence[A]]],
        cost: Callable[[Q], int],
        failed: Callable[[PeerId, P2PMoEError], None],
    ) -> None:
        self._jobs, self._send, self._cost, self._failed = jobs, send, cost, failed
        self._waiting: dict[PeerId, list[tuple[Q, Promise[A]]]] = {}  # until they are sent

    async def ask(self, peer: PeerId, question: Q) -> A:
        return await self.begin(peer, question).wait()

    def begin(self, peer: PeerId, question: Q) -> Promise[A]:
        promise: Promise[A] = Promise()
        waiting = self._waiting.get(peer)
        if waiting is not None:
            waiting.append((question, promise))
        else:
            self._jobs.start(partial(self._flush, peer), partial(self._abandon, peer))
            self._waiting[peer] = [(question, promise)]
        return promise

    async def _flush(self, peer: PeerId) -> None:
        waiting = rest = self._waiting.pop(peer)  # all that came up by the same news
        try:
            while rest:
                batch = rest[: self._fitting(rest)]
                answers = await self._send(peer, [question for question, _ in batch])
                for (_, promise), answer in zip(batch, answers, strict=False):
                    promise.keep(answer)
                rest = rest[len(answers) :]
        except P2PMoEError as error:
            self._failed(peer, error)
            _fail(waiting, error)
        finally:
            _fail(waiting, NodeClosed("the node was closed"))

    def _abandon(self, peer: PeerId) -> None:
        _fail(self._waiting.pop(peer), NodeClosed("the node was closed"))

    def _fitting(self, waiting: Sequence[tuple[Q, Promise[A]]]) -> int:
        """How many of these one call may carry: at least one."""
        total = 0
        for fitting, (question, _) in enumerate(waiting[:MAX_BATCH]):
            total += self._cost(question)
            if fitting and total > BATCH_BYTES:
                return fitting
        return min(len(waiting), MAX_BATCH)


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


def _fail(waiting: Sequence[tuple[Any, Promise[Any]]], error: P2PMoEError) -> None:
    for _, promise in waiting:
        promise.fail(error)

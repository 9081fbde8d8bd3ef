"""Questions of one kind on their way to peers: those that come up together travel in one call.

Where a connection is open, a call has no task: what came up for a peer is composed as the
connection's writer has its turn, and the answer is read in its reader's. A task does what has to
wait: a dial, a call that was not begun, and an answer of many signatures.

Rules: a peer that cannot be reached, does not answer in time or breaks the protocol is marked in
`Contacts`. Whoever asks may go away without harm to those who share the call.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

import trio

from p2pmoe import telemetry
from p2pmoe.dht.contacts import Contacts
from p2pmoe.dht.jobs import Jobs, Promise
from p2pmoe.dht.messages import MAX_BATCH
from p2pmoe.errors import (
    CallTimeout,
    NodeClosed,
    P2PMoEError,
    PeerBusy,
    PeerUnreachable,
    RemoteProtocolError,
)
from p2pmoe.identity import PeerId
from p2pmoe.net.asking import NotBegun, OutgoingCall
from p2pmoe.net.connection import Connection
from p2pmoe.net.pool import Pool
from p2pmoe.wire import schema
from p2pmoe.wire.schema import Message

BATCH_BYTES = 40 * 1024  # of records in one put; leaves room in a control frame
STALLED = 0.25  # seconds that a deadline is late by when the fault is our own; a guess

Q = TypeVar("Q")
A = TypeVar("A")
T = TypeVar("T")
Reading = Generator[None, None, T]  # yields where other tasks should have their turn


@dataclass(frozen=True, slots=True)
class Asked(Generic[Q]):
    """What was asked of a peer in one call, and when."""

    peer: PeerId
    questions: Sequence[Q]
    at: float


@dataclass(frozen=True, slots=True)
class Form(Generic[Q, A]):
    """How questions of one kind travel. `cost` is in bytes of a call, `limit` in seconds.

    `read` opens the answers, of which there may be fewer than questions: the rest is asked again.
    """

    method: str
    limit: float
    cost: Callable[[Q], int]
    request: Callable[[Sequence[Q]], Message]
    read: Callable[[Asked[Q], bytes], Reading[list[A]]]


class _Call(Generic[Q, A]):
    """Questions for one peer, and who waits for their answers; the first of them were asked."""

    __slots__ = ("_line", "asked", "deadline", "outgoing", "peer", "waiting")
    asked: Asked[Q]

    def __init__(self, line: Line[Q, A], peer: PeerId, waiting: list[tuple[Q, Promise[A]]]) -> None:
        self._line, self.peer, self.waiting = line, peer, waiting
        self.deadline = 0.0
        self.outgoing: OutgoingCall | None = None  # where it has no task

    def late(self) -> None:
        """Its deadline has come."""
        self._line.late(self)

    def abandon(self) -> None:
        """The node ends."""
        self._line.drop(self)
        self.fail(NodeClosed("the node was closed"))

    def fail(self, error: P2PMoEError) -> None:
        """Nobody who still waits is answered."""
        waiting, self.waiting = self.waiting, []
        for _, promise in waiting:
            promise.fail(error)


class Line(Generic[Q, A]):
    """The questions of one form, until they are answered."""

    def __init__(self, pool: Pool, contacts: Contacts, jobs: Jobs, form: Form[Q, A]) -> None:
        self._pool, self._contacts, self._jobs, self._form = pool, contacts, jobs, form
        self._gathering: dict[PeerId, _Call[Q, A]] = {}  # until they are sent
        self._said: tuple[list[Q], bytes] = [], b""  # the latest request

    async def ask(self, peer: PeerId, question: Q) -> A:
        """The answer; raises the `P2PMoEError` because of which there is none."""
        return await self.begin(peer, question).wait()

    def begin(self, peer: PeerId, question: Q) -> Promise[A]:
        """As `ask`, to wait for later."""
        promise: Promise[A] = Promise()
        self._gather(peer, [(question, promise)])
        return promise

    def late(self, call: _Call[Q, A]) -> None:
        """A call without a task was not answered by its deadline."""
        self.drop(call)
        self._fail(call, self._overdue(call))

    def drop(self, call: _Call[Q, A]) -> None:
        """Nobody waits for this call any more."""
        self._sent(call)
        if call.outgoing is not None:
            call.outgoing.close()

    # ---------------------------------------------------------------------------------- sending
    def _gather(self, peer: PeerId, waiting: list[tuple[Q, Promise[A]]]) -> None:
        if (call := self._gathering.get(peer)) is not None:
            call.waiting += waiting
            return
        call = _Call(self, peer, waiting)
        contact = self._contacts.contact(peer)
        connection = contact and self._pool.open_connection(contact, bulk=False)
        if connection:
            call.deadline = trio.current_time() + self._form.limit
            self._jobs.watch(call, call.deadline)
            connection.soon(partial(self._send, call, connection))
        else:
            self._jobs.start(partial(self._call, call), call.abandon)
        self._gathering[peer] = call

    def _send(self, call: _Call[Q, A], connection: Connection) -> None:
        """All that came up for a peer is together: ask, without a task."""
        if not call.waiting:  # it was late meanwhile
            return
        try:
            if not connection.open:
                raise NotBegun("the connection ended before it was asked")
            body = self._compose(call)
            left = call.deadline - call.asked.at
            call.outgoing = connection.ask(self._form.method, body, (), left)
        except P2PMoEError as error:
            self._ended(call, error)
        else:
            call.outgoing.news = partial(self._news, call, call.outgoing)

    def _compose(self, call: _Call[Q, A]) -> bytes:
        """The request for as many of the questions as one call may carry."""
        self._sent(call)
        questions = [question for question, _ in call.waiting[: self._fitting(call.waiting)]]
        call.asked = Asked(call.peer, questions, trio.current_time())
        if questions != self._said[0]:  # mostly several peers are asked the same
            self._said = questions, schema.encode(self._form.request(questions))
        return self._said[1]

    def _sent(self, call: _Call[Q, A]) -> None:
        """What comes up from now on is of another call."""
        if self._gathering.get(call.peer) is call:
            del self._gathering[call.peer]

    def _fitting(self, waiting: Sequence[tuple[Q, Promise[A]]]) -> int:
        """How many of these one call may carry: at least one."""
        total = 0
        for fitting, (question, _) in enumerate(waiting[:MAX_BATCH]):
            total += self._form.cost(question)
            if fitting and total > BATCH_BYTES:
                return fitting
        return min(len(waiting), MAX_BATCH)

    # ------------------------------------------------------------------------- without a task
    def _news(self, call: _Call[Q, A], outgoing: OutgoingCall) -> None:
        """Something has come of a call: the last of it ends the call, mostly at once."""
        if not outgoing.over:
            return
        self._jobs.forget(call)
        try:
            parts = list(iter(outgoing.take, None))
            outgoing.close()
            if len(parts) != 1:
                raise RemoteProtocolError(f"an answer of {len(parts)} parts, where one was due")
            reading = self._heard(call, parts[0].body)
            if (answers := _begun(reading)) is None:
                self._jobs.start(partial(self._go_on, call, reading), call.abandon)
            else:
                self._keep(call, answers)
        except P2PMoEError as error:
            self._ended(call, error)

    def _ended(self, call: _Call[Q, A], error: P2PMoEError) -> None:
        """A call without a task has failed; if it was not begun it is asked again."""
        self._jobs.forget(call)
        try:
            if not isinstance(error, NotBegun):
                raise error
            self._jobs.start(partial(self._call, call), call.abandon)
        except P2PMoEError as failure:
            self._sent(call)
            self._fail(call, failure)

    async def _go_on(self, call: _Call[Q, A], reading: Reading[list[A]]) -> None:
        """Read the rest of a long answer."""
        try:
            self._keep(call, await _at_leisure(reading))
        except P2PMoEError as error:
            self._fail(call, error)
        finally:
            call.abandon()

    # --------------------------------------------------------------------------- as a task
    async def _call(self, call: _Call[Q, A]) -> None:
        """Ask, after a dial if it takes one."""
        try:
            self._keep(call, await self._answers(call))
        except P2PMoEError as error:
            self._fail(call, error)
        finally:
            call.abandon()

    async def _answers(self, call: _Call[Q, A]) -> list[A]:
        body, peer = self._compose(call), call.peer
        contact = self._contacts.contact(peer)
        if contact is None:
            raise PeerUnreachable(f"no address of peer {peer} is known", peer=peer.hex)
        call.deadline = trio.current_time() + self._form.limit
        with trio.move_on_at(call.deadline) as limit:
            part = await self._pool.call(contact, self._form.method, body)
        if limit.cancelled_caught:
            raise self._overdue(call)
        return await _at_leisure(self._heard(call, part.body))

    # ---------------------------------------------------------------------------------- answers
    def _heard(self, call: _Call[Q, A], body: bytes) -> Reading[list[A]]:
        """A peer has answered: read what."""
        telemetry.count("p2pmoe_dht_requests_total", op=self._form.method, result="ok")
        self._contacts.table.seen(call.peer, trio.current_time())
        return self._form.read(call.asked, body)

    def _keep(self, call: _Call[Q, A], answers: Sequence[A]) -> None:
        """Hand the answers out, and ask again for those that are missing."""
        waiting, call.waiting = call.waiting, []
        for (_, promise), answer in zip(waiting, answers, strict=False):
            promise.keep(answer)
        if rest := waiting[len(answers) :]:
            try:
                self._gather(call.peer, rest)
            except P2PMoEError:
                call.waiting = rest
                raise

    def _overdue(self, call: _Call[Q, A]) -> P2PMoEError:
        late = trio.current_time() - call.deadline
        if late > STALLED:  # who knows whether the answer waits here
            return PeerBusy(f"this peer was stalled for {late:.1f} s")
        return CallTimeout(
            f"peer {call.peer} did not answer {self._form.method}", peer=call.peer.hex
        )

    def _fail(self, call: _Call[Q, A], error: P2PMoEError) -> None:
        telemetry.count("p2pmoe_dht_requests_total", op="any", result=error.code)
        telemetry.emit("dht.call.failed", peer=call.peer, error=error)
        if isinstance(error, PeerUnreachable | CallTimeout | RemoteProtocolError):
            self._contacts.failed(call.peer, trio.current_time())
        call.fail(error)


def _begun(reading: Reading[T]) -> T | None:
    """What a reading ends with, if it does not take long."""
    try:
        next(reading)
    except StopIteration as end:
        result: T = end.value
        return result
    return None


async def _at_leisure(reading: Reading[T]) -> T:
    """The same, however long it takes."""
    while (result := _begun(reading)) is None:
        await trio.lowlevel.checkpoint()
    return result

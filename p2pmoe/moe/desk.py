"""Parts that threads ask for alone: those that come up together travel in one call, without a task.

What comes up while a connection is open is sent from where it was taken, and each answer goes from
the connection's read loop to the thread that waits for it. What cannot go this way - there is no
connection, or it ended such that the part is to be asked again - is called in the ordinary way, as
a task of its own (`ask`).

Rules: everything here runs in Trio's thread. Each part has its own deadline, counts and error; a
call is cancelled when nobody waits for any of its parts. A backward part whose answer was lost with
its connection is asked once more under the same update id, so that it is applied once.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial

import trio

from p2pmoe import telemetry
from p2pmoe.bridge import CLOSED, Job
from p2pmoe.errors import (
    CallTimeout,
    NodeClosed,
    P2PMoEError,
    PeerUnreachable,
    RemoteError,
)
from p2pmoe.experts.messages import FORWARD, MAX_PARTS, Answer
from p2pmoe.moe.alone import Alone
from p2pmoe.moe.caller import LATE, Book, Caller
from p2pmoe.moe.calls import parts_of
from p2pmoe.net.asking import NotBegun, OutgoingCall
from p2pmoe.net.calls import Part
from p2pmoe.node import Node
from p2pmoe.wire import schema

CUT_SHORT = "the answer ended before this part"
JOINT_BYTES = 64 * 1024  # of tensors in a call of several parts; a guess: more is long by itself

Otherwise = Callable[[Job], None]


class _Call:
    """Parts that travel together: those that the peer has still to answer, and who waits."""

    __slots__ = ("otherwise", "outgoing", "parts", "unanswered", "waiting")
    otherwise: Otherwise
    outgoing: OutgoingCall

    def __init__(self, parts: Sequence[Alone]) -> None:
        self.parts = dict(enumerate(parts))
        self.unanswered = set(self.parts)
        self.waiting: dict[int, Job] = {}

    def next_deadline(self) -> float:
        """When the next part is late; where nobody waits any more, when all of them are."""
        if self.waiting:
            return min(self.parts[index].deadline for index in self.waiting)
        return max(part.deadline for part in self.parts.values())


class AloneDesk:
    """Where parts that threads ask for alone are begun, of one grid."""

    def __init__(self, node: Node, book: Book, caller: Caller) -> None:
        self._node, self._book, self._caller = node, book, caller
        self._calls: set[_Call] = set()
        self._alarm = trio.CancelScope()

    async def run(self) -> None:
        """Look after the deadlines, until cancelled."""
        while True:
            soonest = min((call.next_deadline() for call in self._calls), default=math.inf)
            with trio.CancelScope(deadline=soonest) as self._alarm:
                await trio.sleep_forever()
            for call in list(self._calls):
                if call.next_deadline() <= trio.current_time():
                    self._expire(call, trio.current_time())

    # -------------------------------------------------------------------------------- together
    def begin(self, jobs: Sequence[Job], otherwise: Otherwise) -> None:
        """Send the parts that these jobs ask for."""
        lines: dict[Hashable, list[Job]] = {}
        for job in jobs:
            if not job.scope.cancel_called:
                lines.setdefault(_part(job).kind, []).append(job)
        for line in lines.values():
            for batch in _batches(line):
                try:
                    begun = self._send(batch, otherwise)
                except P2PMoEError:
                    begun = False
                for job in () if begun else batch:
                    otherwise(job)

    def forget(self, job: Job) -> None:
        """Nobody waits for this one any more."""
        for call in list(self._calls):
            for index in [at for at, one in call.waiting.items() if one is job]:
                del call.waiting[index]
                self._drop_unwanted(call)

    def close(self) -> None:
        """Nobody is answered any more."""
        for call in list(self._calls):
            waiting, call.waiting = call.waiting, {}
            self._drop_unwanted(call)
            for job in waiting.values():
                job.end(None, NodeClosed(CLOSED))

    def _send(self, jobs: Sequence[Job], otherwise: Otherwise) -> bool:
        """Begin one call for all of these, if there is a connection."""
        parts = list(map(_part, jobs))
        for part in parts:
            self._begin(part)
        call, ask = _Call(parts), parts[0].ask
        soonest = min(part.deadline for part in parts)
        latest = max(part.deadline for part in parts)
        contact, now = self._book.contact(ask.peer), trio.current_time()
        connection = self._node.pool.open_connection(contact, bulk=True)
        if connection is None:
            return False
        outgoing = connection.ask(parts[0].method, *Alone.request(parts), latest - now)
        call.waiting, call.outgoing, call.otherwise = dict(enumerate(jobs)), outgoing, otherwise
        outgoing.news = partial(self._news, call)
        self._calls.add(call)
        if soonest < self._alarm.deadline:
            self._alarm.deadline = soonest
        return True

    def _news(self, call: _Call) -> None:
        """Something has come of a call, or its end."""
        error: P2PMoEError | None
        try:
            while (came := call.outgoing.take()) is not None:
                for index, failure in self._read(call, came):
                    if (job := call.waiting.pop(index, None)) is not None:
                        job.end(None, self._conclude(call.parts[index], failure))
            if not call.outgoing.over:
                return
            error = RemoteError(CUT_SHORT) if call.waiting else None
        except P2PMoEError as failure:
            error = failure
        self._calls.discard(call)
        call.outgoing.close()
        if error is not None and call.waiting:
            self._fail(call, error)

    def _fail(self, call: _Call, error: P2PMoEError) -> None:
        """A call has ended before these parts were answered."""
        again = isinstance(error, NotBegun)
        if not again:
            self._failed(call, error)
        for index, job in call.waiting.items():
            part = call.parts[index]
            if again or part.may_repeat(error):
                call.otherwise(job)
            else:
                job.end(None, self._conclude(part, copy.copy(error)))

    def _expire(self, call: _Call, now: float) -> None:
        """Some parts of a call are late, or nobody waits and the peer does not end it."""
        for index in [at for at in call.waiting if call.parts[at].deadline <= now]:
            job = call.waiting.pop(index)
            job.end(None, self._conclude(call.parts[index], CallTimeout(LATE)))
        self._drop_unwanted(call)

    def _drop_unwanted(self, call: _Call) -> None:
        if not call.waiting:
            self._calls.discard(call)
            call.outgoing.close()

    # -------------------------------------------------------------------------------- by itself
    async def ask(self, part: Alone) -> None:
        """The ordinary way: wait for a connection if there is none, and for the answer."""
        self._begin(part)
        error: P2PMoEError | None = None
        with trio.CancelScope(deadline=part.deadline) as scope:
            error = await self._call(part)
            if error is not None and part.may_repeat(error):
                error = await self._call(part)
        if scope.cancelled_caught:
            error = CallTimeout(LATE)
        if (failure := self._conclude(part, error)) is not None:
            raise failure

    async def _call(self, part: Alone) -> P2PMoEError | None:
        """One call; the error that it ends with."""
        call, to = _Call([part]), part.ask.peer
        body, payload = Alone.request([part])
        try:
            async with self._node.pool.open_call(
                self._book.contact(to), part.method, body, payload, bulk=True
            ) as answers:
                async for came in answers:
                    for _, error in self._read(call, came):
                        return error
            return RemoteError(CUT_SHORT)
        except P2PMoEError as failure:
            self._failed(call, failure)
            return failure

    async def regret(self, part: Alone, error: P2PMoEError) -> None:
        """The answer to a part, which was good as far as Trio's thread looked, is none."""
        self._caller.blame({part.ask: error})
        self._caller.tell()
        figures = {"rows_served": -1, "answered": -part.rows, f"missed.{error.code}": part.rows}
        self._caller.passes.add(part.method, figures)

    # -------------------------------------------------------------------------------- either way
    def _begin(self, part: Alone) -> None:
        """It is asked for the first time, or once more."""
        if part.deadline == math.inf:
            part.began = trio.current_time()
            part.deadline = part.began + part.seconds
            self._caller.standing.asked([part.key], part.began)

    def _read(self, call: _Call, came: Part) -> Iterator[tuple[int, P2PMoEError | None]]:
        """The parts that an answer is about, and what is wrong with each."""
        answer = schema.decode_again(came.body, Answer)
        good, errors = parts_of(call.unanswered, answer)
        rows, before = sum(call.parts[index].rows for index in good), 0
        for index in good:
            call.parts[index].take(answer, came.payload, before, rows)
            before += call.parts[index].rows
        for one in answer.parts:
            call.parts[one.index].step = one.step
        call.unanswered.difference_update(good, errors)
        return ((one.index, errors.get(one.index)) for one in answer.parts)

    def _failed(self, call: _Call, error: P2PMoEError) -> None:
        """A call has failed as a whole."""
        peer = call.parts[0].ask.peer
        telemetry.emit("moe.call.failed", peer=peer, error=error)
        if isinstance(error, PeerUnreachable | NodeClosed):
            self._book.lost(peer)

    def _conclude(self, part: Alone, error: P2PMoEError | None) -> P2PMoEError | None:
        """Count what became of a part; returns the error, which says whose it is."""
        caller, now = self._caller, trio.current_time()
        if error is None:
            seconds = now - part.began if part.method == FORWARD else None
            caller.standing.answered(part.key, seconds, now)
        else:
            caller.blame({part.ask: error})
        caller.tell()
        caller.count_alone(part, error, now)
        return error


def _part(job: Job) -> Alone:
    """What a job of this desk asks for: it is what `ask` is given."""
    part = job.args[0]
    assert isinstance(part, Alone)
    return part


def _batches(line: Sequence[Job]) -> Iterator[list[Job]]:
    """Jobs of one kind, as many together as a call may carry."""
    batch: list[Job] = []
    size = 0
    for job in line:
        size += _part(job).nbytes
        if batch and (len(batch) == MAX_PARTS or size > JOINT_BYTES):
            yield batch
            batch, size = [], _part(job).nbytes
        batch.append(job)
    yield batch

"""The calls of the other side of one connection while they are answered, and what answers them.

A handler is a coroutine function, and lives in a task of its own; or it is `Prompt`: it looks at
the call within the reader's turn and posts the answer when it has it. That saves a task and two
turns of the loop a call, and suits one whose work is done elsewhere. CANCEL, the call's deadline
and the connection's end cancel either; what is cancelled in the turn in which it came gets no task.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NoReturn

import trio

from p2pmoe import telemetry
from p2pmoe.errors import CallTimeout, P2PMoEError, RemoteError
from p2pmoe.identity import PeerId
from p2pmoe.net.calls import CallArrived
from p2pmoe.net.exchange import Exchange
from p2pmoe.net.outbox import Buffer
from p2pmoe.wire.envelope import Signed
from p2pmoe.wire.peer_record import PeerRecord


class IncomingCall:
    """A call that came in, to answer by `deadline`. `payload` is a writable buffer of its own."""

    __slots__ = (
        "_calls",
        "body",
        "deadline",
        "dropped",
        "id",
        "method",
        "payload",
        "peer",
        "record",
    )

    def __init__(self, calls: IncomingCalls, arrived: CallArrived) -> None:
        self._calls, self.id = calls, arrived.id
        self.peer, self.record = calls.caller.peer, calls.caller.record
        self.method = arrived.method
        self.body = arrived.body
        self.payload, self.deadline = arrived.payload, arrived.deadline
        self.dropped: Callable[[], None] = _nothing

    async def send(self, body: bytes, payload: Iterable[Buffer] = ()) -> None:
        """Send one part of the answer; waits until those before it are on their way.

        The buffers must not change before the call has ended. Raises `LocalProtocolError` for more
        than 63 KiB of body, 64 MiB of payload (64 KiB on a control connection) or 256 parts.
        """
        await self._calls.reply(self.id, body, payload)

    # -------------------------------------------------------------- for prompt handlers
    def post(self, body: bytes, payload: Iterable[Buffer] = ()) -> None:
        """As `send`, without waiting; the part goes out with `flush` or the end."""
        self._calls.core.reply(self.id, body, payload)

    def flush(self) -> None:
        """Send what was posted: more will come later."""
        self._calls.caller.changed()

    def finish(self, error: Exception | None = None) -> None:
        """The answer is complete, or has failed; nothing if it has ended already."""
        self._calls.finish(self, error)

    def cancel(self) -> None:
        """Nobody waits any more: tell whoever set `dropped`, and end the call."""
        self.dropped()
        self.finish(CallTimeout("no answer by the deadline"))


@dataclass(frozen=True, slots=True)
class Prompt:
    """A handler that does not wait: what it began, `finish` ends. If it raises, it has ended.

    It may set the call's `dropped`, which is called when nobody waits any more. A call that has to
    wait after all goes on in a task: `begin` returns what that does.
    """

    begin: Callable[[IncomingCall], Task | None]


Task = Callable[[IncomingCall], Awaitable[None]]
Handler = Task | Prompt


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls, and what the connection wants to know of its calls."""

    peer: PeerId
    record: Signed[PeerRecord] | None
    changed: Callable[[], None]  # there may be something to send
    ended: Callable[[], None]  # the same, and an answer is complete
    blamed: Callable[[P2PMoEError], None]  # a call has failed


class IncomingCalls:
    """Those that are being answered."""

    def __init__(self, core: Exchange, caller: Caller, handlers: Mapping[str, Handler]) -> None:
        self.core, self.caller, self._handlers = core, caller, handlers
        self._running: dict[int, trio.CancelScope | IncomingCall] = {}
        self._begun: list[tuple[IncomingCall, Task]] = []  # in this turn, without a task yet
        self._room = trio.lowlevel.ParkingLot()  # answers that wait for the parts before them
        self._due = math.inf  # no deadline of a call without a task is earlier

    def __len__(self) -> int:
        return len(self._running)

    def begin(self, arrived: CallArrived) -> None:
        """Let the call's handler answer it: at once if it is prompt, else when tasks `start`."""
        call = IncomingCall(self, arrived)
        self._running[call.id] = call
        handler = self._handlers.get(call.method, _UNKNOWN)
        task = self._begin_prompt(call, handler) if isinstance(handler, Prompt) else handler
        if task is not None:
            self._begun.append((call, task))

    def start(self, tasks: trio.Nursery) -> None:
        """Give each call that has begun, and is wanted still, its task."""
        begun, self._begun = self._begun, []
        for call, task in begun:
            if call.id in self._running:
                scope = self._running[call.id] = trio.CancelScope(deadline=call.deadline)
                tasks.start_soon(self._answer, call, task, scope)

    def _begin_prompt(self, call: IncomingCall, handler: Prompt) -> Task | None:
        """Let it answer now or later, or say what is to be done in a task."""
        try:
            task = handler.begin(call)
        except Exception as error:  # noqa: BLE001  as at the edge of a task
            call.finish(error)
            return None
        if task is None and call.id in self._running:
            self._due = min(self._due, call.deadline)
        return task

    def cancel(self, number: int) -> None:
        """Nobody waits for this answer; nothing if it has ended."""
        if (running := self._running.get(number)) is not None:
            running.cancel()

    def cancel_all(self) -> None:
        """The connection has ended."""
        for running in list(self._running.values()):
            running.cancel()

    def sent(self) -> None:
        """Something was sent: there may be room for more."""
        if self._room:
            self._room.unpark_all()

    def next_deadline(self) -> float:
        """When to `tick`."""
        return self._due

    def tick(self, now: float) -> None:
        """End what is late; a call with a task ends by itself."""
        if now < self._due:
            return
        prompt = [call for call in self._running.values() if isinstance(call, IncomingCall)]
        late = [call for call in prompt if call.deadline <= now]
        self._due = min((call.deadline for call in prompt if call.deadline > now), default=math.inf)
        for call in late:
            call.cancel()

    async def reply(self, call: int, body: bytes, payload: Iterable[Buffer]) -> None:
        """Send a part, once those before it are on their way."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while self.core.waiting(call):
            await self._room.park()
        self.core.reply(call, body, payload)
        self.caller.changed()

    def finish(self, call: IncomingCall, error: Exception | None) -> None:
        """The answer is complete, or has failed."""
        call.dropped = _nothing  # and what it holds is free
        if self._running.pop(call.id, None) is None or self.core.closed:
            return
        code, detail, retry_after = "", "", None
        if isinstance(error, P2PMoEError):
            code, detail = error.code, str(error)
            retry_after = getattr(error, "retry_after", None)
            self.caller.blamed(error)
        elif error is not None:
            code, detail = RemoteError.code, "the call failed over there: see its log"
            telemetry.complain(
                self.caller.peer.hex,
                "net.call.crashed",
                level="error",
                op=call.method,
                error=repr(error),
                exc_info=True,
            )
        self.core.end(call.id, code, detail, retry_after)
        self.caller.ended()
        op = call.method if call.method in self._handlers else "unknown"
        telemetry.count("p2pmoe_calls_total", side="server", op=op, result=code or "ok")

    async def _answer(self, call: IncomingCall, handler: Task, scope: trio.CancelScope) -> None:
        try:
            wanted = not scope.cancel_called  # else it is not even begun
            with scope:
                if wanted:
                    await handler(call)
        except Exception as error:  # noqa: BLE001  the edge of a task: the caller learns that it failed, the log why
            call.finish(error)
            return
        if scope.cancelled_caught or not wanted:
            call.cancel()
        else:
            call.finish()


class _UnknownMethod(P2PMoEError):
    """Nobody answers this method here."""

    code = "method"


def _refuse(call: IncomingCall) -> NoReturn:
    raise _UnknownMethod(f"there is no method {call.method} here")


def _nothing() -> None: ...


_UNKNOWN = Prompt(_refuse)

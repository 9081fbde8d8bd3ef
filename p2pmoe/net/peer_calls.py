"""The calls of the other side of one connection, which this side answers. See `calls`."""

from __future__ import annotations

from collections.abc import Iterable

from p2pmoe.errors import LocalProtocolError, MalformedMessage, PeerBusy
from p2pmoe.net.calls import MAX_MS, Assembly, CallArrived, CallCancelled, Desk, Effect, own_copy
from p2pmoe.net.credit import Window
from p2pmoe.net.messages import MAX_DETAIL, MAX_PARTS, End, Reply, Request
from p2pmoe.net.outbox import Buffer
from p2pmoe.net.quota import FOREVER

CANCELLED = "cancelled"  # the code of an END that answers a CANCEL


class _Call:
    """A call of the other side, until the end of its answer is sent."""

    __slots__ = ("assembly", "cancelled", "deadline", "ended", "method", "parts", "size", "window")

    def __init__(self, method: str, size: int, deadline: float) -> None:
        self.method, self.size, self.deadline = method, size, deadline
        self.window = Window()
        self.assembly: Assembly | None = None
        self.parts = 0
        self.cancelled = self.ended = False


class PeerCalls:
    """The calls that this side answers."""

    def __init__(self, desk: Desk, first_id: int) -> None:
        self._desk = desk
        self._calls: dict[int, _Call] = {}
        self._assembling: dict[int, _Call] = {}
        self._due = FOREVER  # no deadline of these is earlier
        self._next_id = first_id
        self.closed = False  # whether later calls are not begun any more

    def __len__(self) -> int:
        return len(self._calls)

    @property
    def receiving(self) -> bool:
        """Whether a payload is on its way in."""
        return bool(self._assembling)

    @property
    def last_id(self) -> int:
        """The last call that was begun or refused, 0 if there was none."""
        return max(0, self._next_id - 2)

    def reply(self, call: int, body: bytes, payload: Iterable[Buffer]) -> None:
        """Send a part of the answer, behind those before it; nothing if nobody waits for it.

        The buffers must not change before the call has ended.
        """
        theirs = self._calls.get(call)
        if theirs is None or theirs.ended:
            raise LocalProtocolError("the call has been answered")
        views, size = self._desk.outgoing(body, payload)
        theirs.parts += 1
        if theirs.parts > MAX_PARTS:
            raise LocalProtocolError(f"an answer has at most {MAX_PARTS} parts")
        if not theirs.cancelled:
            self._desk.outbox.add(call, Reply(id=call, body=body, size=size), views)

    def end(
        self, call: int, code: str = "", detail: str = "", retry_after: float | None = None
    ) -> None:
        """The answer is complete, or has failed with this code; `retry_after` is in seconds."""
        theirs = self._calls.get(call)
        if theirs is None:  # the connection is gone
            return
        theirs.ended = True
        self._desk.quota.release(theirs.size)
        if theirs.cancelled:
            code, detail = CANCELLED, ""
        self._desk.outbox.end(call, _end(call, code, detail, retry_after))

    def end_sent(self, call: int) -> None:
        """The writer took the last frame of the call's answer: its place is free."""
        del self._calls[call]
        self._desk.quota.end_call()

    def on_request(self, request: Request, payload: memoryview, now: float) -> list[Effect]:
        """The other side calls, with a whole `payload` or one that follows."""
        call, size = request.id, request.size or len(payload)
        if call < self._next_id or call % 2 != self._next_id % 2:
            raise MalformedMessage("exchange.id", f"call {call} where {self._next_id} is next")
        self._next_id = call + 2
        self._desk.check_size(size)
        if self.closed:
            return []
        quota = self._desk.quota
        if wait := quota.begin_call(request.method, size, now):
            self._desk.outbox.put(_end(call, PeerBusy.code, "over this peer's quota", wait))
            return []
        deadline = now + min(request.budget_ms / 1000, quota.params.call_seconds)
        theirs = self._calls[call] = _Call(request.method, size, deadline)
        self._desk.outbox.open(call)
        if not request.size:
            return [CallArrived(call, request.method, request.body, own_copy(payload), deadline)]
        theirs.assembly = Assembly(request.body, size, self._desk.allocate)
        self._assembling[call] = theirs
        self._due = min(self._due, deadline)
        return []

    def on_chunk(self, call: int, chunk: memoryview) -> list[Effect]:
        """The next bytes of a request; dropped when the call has ended or was not begun."""
        theirs = self._calls.get(call)
        if theirs is None or theirs.ended or theirs.cancelled:
            self._check_known(call)
            return []
        assembly = theirs.assembly
        if assembly is None:
            raise MalformedMessage("exchange.too_many_bytes", f"call {call} expects none")
        theirs.window.take(len(chunk))
        if not assembly.fill(chunk):
            self._desk.outbox.announce(call, theirs.window.free(len(chunk)))
            return []
        self._stop_assembling(call, theirs)
        return [CallArrived(call, theirs.method, assembly.body, assembly.buffer, theirs.deadline)]

    def on_cancel(self, call: int, now: float) -> list[Effect]:
        """The other side wants no answer any more."""
        self._desk.quota.count_cancel(now)
        theirs = self._calls.get(call)
        if theirs is None:
            self._check_known(call)
            return []
        if theirs.cancelled:
            raise MalformedMessage("exchange.cancelled_twice", f"call {call}")
        theirs.cancelled = True
        self._desk.outbox.clear(call)
        if theirs.assembly is not None:
            self._stop_assembling(call, theirs)
            self.end(call)
        elif theirs.ended:  # its END waited behind parts, and those for credit
            self._desk.outbox.add(call, _end(call, CANCELLED), last=True)
        else:
            return [CallCancelled(call)]
        return []

    def tick(self, now: float) -> None:
        """End the calls whose payload is not whole by their deadline."""
        if now < self._due:
            return
        for call, theirs in list(self._assembling.items()):
            if theirs.deadline <= now:
                self._stop_assembling(call, theirs)
                self.end(call, "timeout", "the payload did not come in time")
        left = (theirs.deadline for theirs in self._assembling.values())
        self._due = min(left, default=FOREVER)

    def next_deadline(self) -> float:
        """When `tick` has something to do, unless that payload is whole by then."""
        return self._due

    def close(self) -> None:
        """The connection is gone: give back what its calls hold."""
        for call, theirs in list(self._calls.items()):
            if not theirs.ended:
                self._desk.quota.release(theirs.size)
            self._desk.outbox.close(call)
            self.end_sent(call)
        self._assembling.clear()

    def _check_known(self, call: int) -> None:
        if call >= self._next_id:
            raise MalformedMessage("exchange.id", f"call {call} was not begun")

    def _stop_assembling(self, call: int, theirs: _Call) -> None:
        theirs.assembly = None
        del self._assembling[call]
        if not self._assembling:
            self._due = FOREVER


def _end(call: int, code: str, detail: str = "", retry_after: float | None = None) -> End:
    hint = min(MAX_MS, max(1, round(retry_after * 1000))) if retry_after is not None else 0
    return End(id=call, code=code, detail=detail[:MAX_DETAIL], retry_after_ms=hint)

"""The calls that this side makes on one connection. See `calls` for the rules."""

from __future__ import annotations

from collections.abc import Iterable

from p2pmoe.errors import MalformedMessage, PeerBusy
from p2pmoe.net.calls import (
    MAX_MS,
    Assembly,
    CallEnded,
    CallLost,
    Desk,
    Effect,
    Part,
    PartArrived,
    own_copy,
)
from p2pmoe.net.credit import FIRST_WINDOW_BYTES, Window
from p2pmoe.net.messages import MAX_PARTS, Cancel, End, Reply, Request
from p2pmoe.net.outbox import Buffer

HELD_BYTES = FIRST_WINDOW_BYTES  # of whole parts that nobody took, before credit stops


class _Call:
    """A call of ours, until its answer has ended."""

    __slots__ = ("assembly", "cancelled", "left", "parts", "untaken", "window", "withheld")

    def __init__(self) -> None:
        self.window = Window()
        self.assembly: Assembly | None = None
        self.left = 0  # bytes of the last part's payload that have not come
        self.parts = 0
        self.untaken = 0  # bytes of whole parts that the caller has not taken
        self.withheld = 0  # bytes whose credit waits for that
        self.cancelled = False


class OwnCalls:
    """The calls that this side makes."""

    def __init__(self, desk: Desk, first_id: int) -> None:
        self._desk = desk
        self._calls: dict[int, _Call] = {}
        self._receiving: set[int] = set()  # calls with a payload on its way in, credit for it given
        self.next_id = first_id

    def __len__(self) -> int:
        return len(self._calls)

    @property
    def receiving(self) -> bool:
        """Whether a payload is on its way in that the other side has credit for."""
        return bool(self._receiving)

    def ask(self, method: str, body: bytes, payload: Iterable[Buffer], budget: float) -> int:
        """Begin a call that may take `budget` seconds; returns its id.

        The buffers must not change before the call has ended. Raises `PeerBusy` when as many calls
        as the other side allows are in flight, and `LocalProtocolError`.
        """
        desk = self._desk
        if len(self._calls) >= desk.quota.params.calls_a_peer:
            error = PeerBusy(f"{len(self._calls)} calls to this peer are in flight")
            error.retry_after = desk.quota.params.come_again
            raise error
        views, size = desk.outgoing(body, payload)
        call, self.next_id = self.next_id, self.next_id + 2
        budget_ms = int(min(max(0, budget * 1000), MAX_MS))
        request = Request(id=call, method=method, budget_ms=budget_ms, body=body, size=size)
        self._calls[call] = _Call()
        desk.outbox.open(call)
        desk.outbox.add(call, request, views)
        return call

    def cancel(self, call: int) -> None:
        """Nobody waits for the answer any more. Says nothing if the call is over."""
        own = self._calls.get(call)
        if own is None or own.cancelled:
            return
        self._drop_assembly(call, own)
        if not self._desk.outbox.begun(call):
            self._close(call)
            return
        own.cancelled = True
        self._desk.outbox.clear(call)
        self._desk.outbox.add(call, Cancel(id=call))

    def taken(self, call: int, size: int) -> None:
        """The caller has taken a part with `size` bytes of payload."""
        own = self._calls.get(call)
        if own is not None:
            own.untaken -= size
            if own.withheld and own.untaken <= HELD_BYTES:
                freed, own.withheld = own.withheld, 0
                if own.assembly:
                    self._receiving.add(call)
                self._desk.outbox.announce(call, own.window.free(freed))

    def on_reply(self, reply: Reply, payload: memoryview) -> list[Effect]:
        """The other side begins a part, or sends a whole one with its `payload`."""
        own = self._expected(reply.id)
        if own.assembly or own.left:
            raise MalformedMessage("exchange.part_in_part", f"call {reply.id}")
        own.left = reply.size if reply.last else 0
        last = reply.last and not reply.size
        if own.cancelled:
            if last:
                self._close(reply.id)
            return []
        self._desk.check_size(reply.size)
        own.parts += 1
        if own.parts > MAX_PARTS:
            raise MalformedMessage("exchange.too_many_parts", f"call {reply.id}")
        if not reply.size:
            return self._came(reply.id, own, Part(reply.body, own_copy(payload)), last=last)
        if not self._desk.quota.reserve(reply.size):
            self.cancel(reply.id)
            detail = f"this node has no room for an answer of {reply.size} bytes"
            wait = self._desk.quota.params.come_again
            return [CallEnded(reply.id, PeerBusy.code, detail, wait)]
        own.assembly = Assembly(reply.body, reply.size, self._desk.allocate)
        if not own.withheld:
            self._receiving.add(reply.id)
        return []

    def on_chunk(self, call: int, chunk: memoryview) -> list[Effect]:
        """The next bytes of a part."""
        own = self._expected(call)
        last = 0 < own.left <= len(chunk)
        own.left = max(0, own.left - len(chunk))
        if own.cancelled:
            if last:
                self._close(call)
            return []
        assembly = own.assembly
        if assembly is None:
            raise MalformedMessage("exchange.too_many_bytes", f"call {call} expects none")
        own.window.take(len(chunk))
        whole = assembly.fill(chunk)
        if own.untaken > HELD_BYTES:
            own.withheld += len(chunk)
            self._receiving.discard(call)
        else:
            self._desk.outbox.announce(call, own.window.free(len(chunk)))
        if not whole:
            return []
        self._drop_assembly(call, own)
        return self._came(call, own, Part(assembly.body, assembly.buffer), last=last)

    def on_end(self, end: End) -> list[Effect]:
        """The call is over."""
        own = self._expected(end.id)
        if own.assembly and not end.code:
            raise MalformedMessage("exchange.part_cut", f"call {end.id}")
        self._drop_assembly(end.id, own)
        self._close(end.id)
        if own.cancelled:
            return []
        retry_after = end.retry_after_ms / 1000 if end.retry_after_ms else None
        return [CallEnded(end.id, end.code, end.detail, retry_after)]

    def not_begun_after(self, last_id: int) -> list[Effect]:
        """The other side answers calls up to `last_id`, and has not begun later ones."""
        if last_id >= self.next_id or (last_id and last_id % 2 != self.next_id % 2):
            raise MalformedMessage("exchange.id", f"{last_id} is no call of this side")
        return self._end_all((call for call in self._calls if call > last_id), gone=False)

    def close(self) -> list[Effect]:
        """The connection is gone, and with it every call."""
        return self._end_all(self._calls, gone=True)

    def _came(self, call: int, own: _Call, part: Part, *, last: bool) -> list[Effect]:
        """A part is whole."""
        own.untaken += len(part.payload)
        if not last:
            return [PartArrived(call, part)]
        self._close(call)
        return [PartArrived(call, part), CallEnded(call)]

    def _end_all(self, calls: Iterable[int], *, gone: bool) -> list[Effect]:
        effects: list[Effect] = []
        for call in list(calls):
            own = self._calls[call]
            if not own.cancelled:
                effects.append(CallLost(call, begun=gone and self._desk.outbox.begun(call)))
            self._drop_assembly(call, own)
            self._close(call)
        return effects

    def _expected(self, call: int) -> _Call:
        own = self._calls.get(call)
        if own is None:
            raise MalformedMessage("exchange.id", f"call {call} is not in flight")
        return own

    def _drop_assembly(self, call: int, own: _Call) -> None:
        if own.assembly:
            self._desk.quota.release(own.assembly.size)
            own.assembly = None
            self._receiving.discard(call)

    def _close(self, call: int) -> None:
        del self._calls[call]
        self._desk.outbox.close(call)

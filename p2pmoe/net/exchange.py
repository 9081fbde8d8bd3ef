"""All calls in flight on one connection after its greeting: the rules, and nothing that waits.

Frames that came go in by `receive`, frames to send come out by `next_frame`, and what happened to
calls comes back as effects. `receive` and `tick` raise when the connection must be closed: a
`MalformedMessage` with why `exchange.*`, `quota.*`, `cbor.*` or `schema.*`, a `ConnectionLost` when
the other side gives no sign of life, or what a REFUSE names.

GOODBYE names the last call that will be answered. Who said it begins no further calls; when none is
left in flight, the connection is `finished`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from p2pmoe.errors import ConnectionLost, LocalProtocolError, MalformedMessage, from_code
from p2pmoe.net.calls import Desk, Effect
from p2pmoe.net.credit import Window
from p2pmoe.net.messages import (
    INLINE_BYTES,
    Cancel,
    Chunk,
    Credit,
    End,
    Goodbye,
    Hello,
    Ping,
    Pong,
    Refuse,
    Reply,
    Request,
    decode_header,
)
from p2pmoe.net.outbox import CONNECTION, Buffer, Outbox, OutFrame
from p2pmoe.net.own_calls import OwnCalls
from p2pmoe.net.peer_calls import PeerCalls
from p2pmoe.net.quota import PeerQuota, Progress
from p2pmoe.wire.framing import Frame


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeParams:
    """One connection's side and class. Bytes and seconds; the other limits are the quota's."""

    dialler: bool
    chunk_bytes: int  # the largest chunk, either way
    payload_bytes: int  # the largest payload of one request or part, either way
    inline_bytes: int = INLINE_BYTES  # the largest that stands in its message's own frame
    ping_after: float  # without a byte received


class Exchange:
    """One side of a connection. `allocate` gives a writable buffer of so many bytes."""

    def __init__(
        self,
        params: ExchangeParams,
        quota: PeerQuota,
        allocate: Callable[[int], memoryview],
        now: float,
    ) -> None:
        self._params, self._quota, self._limits = params, quota, quota.params
        self._outbox = Outbox(params.chunk_bytes, quota.params.small_frames)
        desk = Desk(self._outbox, quota, allocate, params.payload_bytes, params.inline_bytes)
        self._own = OwnCalls(desk, first_id=1 if params.dialler else 2)
        self._theirs = PeerCalls(desk, first_id=2 if params.dialler else 1)
        self._window = Window()
        self._progress = Progress(self._limits)
        self._payload = Progress(self._limits, piece=params.chunk_bytes)
        self._payload_bytes = 0  # in whole chunks, since the last `heard`
        self._pings = self._pongs = self._unanswered = 0
        self._silent_at = now + params.ping_after
        self.left = False  # whether the other side said GOODBYE
        self.closed = False

    # -------------------------------------------------------------- this side's commands
    def ask(self, method: str, body: bytes, payload: Iterable[Buffer], budget: float) -> int:
        """Begin a call of `budget` seconds; as `OwnCalls.ask`. The connection must be `open`."""
        if not self.open:
            raise LocalProtocolError("this connection begins no further calls")
        return self._own.ask(method, body, payload, budget)

    def cancel(self, call: int) -> None:
        """Nobody waits for the answer to a call of ours any more."""
        self._own.cancel(call)

    def taken(self, call: int, size: int) -> None:
        """The caller has taken a part with `size` bytes of payload."""
        self._own.taken(call, size)

    def reply(self, call: int, body: bytes, payload: Iterable[Buffer] = ()) -> None:
        """Send a part of the answer to a call of the other side; as `PeerCalls.reply`."""
        self._theirs.reply(call, body, payload)

    def end(
        self, call: int, code: str = "", detail: str = "", retry_after: float | None = None
    ) -> None:
        """The answer is complete, or has failed with this code; `retry_after` is in seconds."""
        self._theirs.end(call, code, detail, retry_after)

    def leave(self) -> None:
        """Begin no calls and let none begin; those in flight go on. May be said twice."""
        if not self.leaving:
            self._theirs.closed = True
            self._outbox.open(CONNECTION)  # behind the requests that wait to be sent
            self._outbox.add(CONNECTION, Goodbye(last_id=self.last_id), last=True)

    def close(self) -> list[Effect]:
        """The connection is gone: gives back all that it holds, and ends the calls of ours."""
        self.closed = True
        self._theirs.close()
        return self._own.close()

    # -------------------------------------------------------------- looking
    @property
    def leaving(self) -> bool:
        """Whether this side said GOODBYE."""
        return self._theirs.closed

    @property
    def open(self) -> bool:
        """Whether a call can begin here."""
        return not (self.leaving or self.left or self.closed)

    @property
    def parted(self) -> bool:
        """Whether a goodbye was said and no call is in flight."""
        return (self.leaving or self.left) and not any(self.calls)

    @property
    def finished(self) -> bool:
        """The same, and nothing is left to send."""
        return self.parted and self._outbox.empty

    @property
    def last_id(self) -> int:
        """The last call of the other side that was taken."""
        return self._theirs.last_id

    @property
    def calls(self) -> tuple[int, int]:
        """Calls in flight: of ours, and of the other side."""
        return len(self._own), len(self._theirs)

    @property
    def unsent_bytes(self) -> int:
        """Bytes of payloads that wait for their turn or for credit."""
        return self._outbox.unsent_bytes

    @property
    def sendable(self) -> bool:
        """Whether `next_frame` has one."""
        return self._outbox.sendable

    def waiting(self, call: int) -> bool:
        """Whether the call has something unsent."""
        return self._outbox.waiting(call)

    # -------------------------------------------------------------- the machine in time
    def receive(self, frame: Frame, now: float) -> list[Effect]:
        """Take a frame in."""
        self._quota.count_frame(now)
        message = decode_header(frame.header)
        if isinstance(message, Chunk):
            return self._on_chunk(message.id, frame.payload)
        if isinstance(message, Request | Reply):
            return self._on_message(message, frame.payload, now)
        if len(frame.payload):
            raise MalformedMessage("exchange.payload", "this frame has none")
        match message:
            case End():
                return self._own.on_end(message)
            case Cancel():
                return self._theirs.on_cancel(message.id, now)
            case Credit():
                self._outbox.granted(message.id, message.size)
                return []
            case Ping():
                self._quota.count_ping(now)
                self._outbox.put(Pong(n=message.n))
                return []
            case _:
                return self._on_connection(message)

    def heard(self, size: int, now: float, *, inside_frame: bool) -> None:
        """After the frames of one read of `size` bytes; `inside_frame` if it ended in one."""
        self._unanswered, self._silent_at = 0, now + self._params.ping_after
        receiving = self._own.receiving or self._theirs.receiving
        self._progress.watch(inside_frame or receiving, size, now)
        self._payload.watch(receiving, self._payload_bytes, now)  # other frames do not help it
        self._payload_bytes = 0

    def tick(self, now: float) -> None:
        """Do what is due: end what is late, ask for a sign of life."""
        self._theirs.tick(now)
        if self._progress.too_slow(now) or self._payload.too_slow(now):
            raise ConnectionLost(f"less than {self._limits.least_rate:g} bytes a second came in")
        if now >= self._silent_at:
            if self._unanswered == self._limits.pings:
                raise ConnectionLost("no sign of life")
            self._pings += 1
            self._unanswered += 1
            self._silent_at = now + self._params.ping_after
            self._outbox.put(Ping(n=self._pings))

    def next_deadline(self) -> float:
        """When to `tick`."""
        slow = min(self._progress.deadline, self._payload.deadline)
        return min(self._silent_at, slow, self._theirs.next_deadline())

    def next_frame(self) -> OutFrame | None:
        """The frame to send now, if there is one and the other side has room for it."""
        frame = self._outbox.next_frame()
        if frame is not None and frame.ends:
            self._theirs.end_sent(frame.ends)
        return frame

    # -------------------------------------------------------------- rules of the connection
    def _on_message(
        self, message: Request | Reply, payload: memoryview, now: float
    ) -> list[Effect]:
        most, size = self._params.inline_bytes, message.size
        if len(payload) > (0 if size else most) or 0 < size <= most:
            raise MalformedMessage("exchange.payload", f"{len(payload)} bytes, and {size} follow")
        if isinstance(message, Reply):
            return self._own.on_reply(message, payload)
        if self.left:
            raise MalformedMessage("exchange.after_goodbye")
        return self._theirs.on_request(message, payload, now)

    def _on_chunk(self, call: int, payload: memoryview) -> list[Effect]:
        size = len(payload)
        if not 0 < size <= self._params.chunk_bytes:
            raise MalformedMessage("exchange.chunk_size", f"{size} bytes")
        self._payload_bytes += size
        self._window.take(size)
        self._outbox.announce(CONNECTION, self._window.free(size))
        ours = call % 2 == self._own.next_id % 2
        return self._own.on_chunk(call, payload) if ours else self._theirs.on_chunk(call, payload)

    def _on_connection(self, message: Hello | Refuse | Goodbye | Pong) -> list[Effect]:
        match message:
            case Pong():
                self._on_pong(message.n)
            case Goodbye():
                return self._on_goodbye(message.last_id)
            case Refuse():
                raise from_code(message.code, message.detail)
            case _:
                raise MalformedMessage("exchange.second_hello")
        return []

    def _on_pong(self, n: int) -> None:
        if not self._pongs < n <= self._pings:
            raise MalformedMessage("exchange.pong", f"{n} was not asked")
        self._pongs = n

    def _on_goodbye(self, last_id: int) -> list[Effect]:
        if self.left:
            raise MalformedMessage("exchange.after_goodbye")
        self.left = True
        return self._own.not_begun_after(last_id)

"""What both halves of a connection share: what happens to calls, and payloads on their way in.

A call is a REQUEST and an answer of any number of parts, a REPLY each. A short payload stands in
their own frames, a longer one follows in chunks. The answer ends once: with the part that says it
is the last, or with an END. CANCEL asks for an early END; a call that ended on its own meanwhile
has answered it already. Until it ends, what still comes for a cancelled call is dropped.

Commands come from this side's program and raise `LocalProtocolError`; what the other side may not
do raises `MalformedMessage` with why `exchange.*`. Memory for a payload is reserved with the peer's
quota before it is allocated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from p2pmoe.errors import LocalProtocolError, MalformedMessage
from p2pmoe.net.messages import MAX_BODY_BYTES
from p2pmoe.net.outbox import Buffer, Outbox, views_of
from p2pmoe.net.quota import PeerQuota

MAX_MS = 2**32 - 1  # the largest budget or hint that fits its field
NOTHING = memoryview(bytearray())  # the payload of a message without one


@dataclass(frozen=True, slots=True)
class Part:
    """A part of an answer. The payload's buffer belongs to whoever takes the part."""

    body: bytes
    payload: memoryview


@dataclass(frozen=True, slots=True)
class CallArrived:
    """A call to answer by `deadline`."""

    id: int
    method: str
    body: bytes
    payload: memoryview
    deadline: float


@dataclass(frozen=True, slots=True)
class CallCancelled:
    """Nobody waits for this answer any more: stop, then `end` it."""

    id: int


@dataclass(frozen=True, slots=True)
class PartArrived:
    """A part of the answer to a call of ours; say `taken` once its caller has it."""

    id: int
    part: Part


@dataclass(frozen=True, slots=True)
class CallEnded:
    """A call of ours is over: answered, or failed with `code`. `retry_after` is in seconds."""

    id: int
    code: str = ""
    detail: str = ""
    retry_after: float | None = None


@dataclass(frozen=True, slots=True)
class CallLost:
    """A call of ours gets no answer here. If it was not `begun`, it is safe to ask again."""

    id: int
    begun: bool


Effect = CallArrived | CallCancelled | PartArrived | CallEnded | CallLost


@dataclass(frozen=True, slots=True)
class Desk:
    """What both halves work with. `allocate` gives a writable buffer of so many bytes."""

    outbox: Outbox
    quota: PeerQuota
    allocate: Callable[[int], memoryview]
    payload_bytes: int  # the largest payload of one request or part, either way
    inline_bytes: int  # the largest that stands in its message's own frame

    def check_size(self, size: int) -> None:
        """A payload that the other side announces."""
        if size > self.payload_bytes:
            raise MalformedMessage("exchange.payload_too_long", f"{size} bytes")

    def outgoing(self, body: bytes, payload: Iterable[Buffer]) -> tuple[list[memoryview], int]:
        """What this side is to send, as views, and how many bytes of it follow in chunks."""
        views = views_of(payload)
        size = sum(map(len, views))
        if size > self.payload_bytes:
            raise LocalProtocolError(
                f"a payload of {size} bytes on a connection for {self.payload_bytes}:"
                " split it, or make it a bulk call"
            )
        if len(body) > MAX_BODY_BYTES:
            raise LocalProtocolError(f"a body of {len(body)} bytes: at most {MAX_BODY_BYTES}")
        return views, size if size > self.inline_bytes else 0


def own_copy(payload: memoryview) -> memoryview:
    """A payload that came in one piece, in a writable buffer of its own."""
    return memoryview(bytearray(payload)) if payload else NOTHING


class Assembly:
    """A payload on its way in, and the body that came before it.

    One that comes in a single chunk is copied as it is; `allocate` makes room for a longer one.
    """

    __slots__ = ("_allocate", "body", "buffer", "missing", "size")

    def __init__(self, body: bytes, size: int, allocate: Callable[[int], memoryview]) -> None:
        self.body, self.size, self.missing = body, size, size
        self.buffer = NOTHING
        self._allocate = allocate

    def fill(self, chunk: memoryview) -> bool:
        """Add a chunk; whether the payload is whole now."""
        length, missing = len(chunk), self.missing
        if length > missing:
            raise MalformedMessage("exchange.too_many_bytes", f"{length} of {missing}")
        if length == self.size:
            self.buffer = own_copy(chunk)
        else:
            if missing == self.size:
                self.buffer = self._allocate(missing)
            at = self.size - missing
            self.buffer[at : at + length] = chunk
        self.missing -= length
        return not self.missing

"""What one side of a connection has still to send, and in which order.

First the connection's own small frames and credit, then the headers of calls in the order in which
they came up, each with its payload if that is short, then long payloads: one chunk a call in turn,
as far as credit goes. Nothing of a payload is copied; a frame has the list of the views of it.

Each queue is bounded by the calls in flight, but the one for small frames has a limit of its own:
a peer that asks and does not read is closed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from p2pmoe.errors import MalformedMessage
from p2pmoe.net.credit import Credit
from p2pmoe.net.messages import Cancel, Chunk, End, Goodbye, Reply, Request, encode_header
from p2pmoe.net.messages import Credit as Announcement
from p2pmoe.wire.schema import Message

Item = Request | Reply | End | Cancel | Goodbye  # what is said in turn
CONNECTION = 0  # the id of the connection itself, in CREDIT and for its GOODBYE

Buffer = bytes | bytearray | memoryview


def views_of(payload: Iterable[Buffer]) -> list[memoryview]:
    """The bytes of C-contiguous buffers, empty ones left out."""
    views = [memoryview(buffer) for buffer in payload]
    return [view.cast("B") for view in views if view.nbytes]


@dataclass(frozen=True, slots=True)
class OutFrame:
    """A frame to send: its header, the views that make up its payload, and their bytes.

    `ends` is the id of the call whose last frame this is, else 0.
    """

    header: bytes
    payload: tuple[memoryview, ...] = ()
    size: int = 0
    ends: int = 0


@dataclass(slots=True, eq=False)
class _Item:
    """A header, until it is sent, and what is left of its payload; whether it ends the call."""

    header: Item | None
    views: deque[memoryview]
    last: bool

    def cut(self, size: int) -> tuple[memoryview, ...]:
        """Take the next `size` bytes of payload, or all that is left."""
        pieces: list[memoryview] = []
        while size and self.views:
            view = self.views.popleft()
            if len(view) > size:
                self.views.appendleft(view[size:])
                view = view[:size]
            size -= len(view)
            pieces.append(view)
        return tuple(pieces)


class _Stream:
    """The unsent items of one call, in order."""

    __slots__ = ("begun", "call", "credit", "items", "queue")

    def __init__(self, call: int) -> None:
        self.call = call
        self.items: deque[_Item] = deque()
        self.credit = Credit()
        self.queue: deque[_Stream] | None = None  # where it waits for its turn
        self.begun = False  # whether a header of it was sent


class Outbox:
    """Says what to send next. `next_frame` is called by the connection's one writer."""

    def __init__(self, chunk_bytes: int, small_frames: int) -> None:
        self._chunk_bytes, self._small_frames = chunk_bytes, small_frames
        self._small: deque[Message] = deque()
        self._announced: dict[int, int] = {}
        self._streams: dict[int, _Stream] = {}
        self._headers: deque[_Stream] = deque()
        self._chunks: deque[_Stream] = deque()
        self._credit = Credit()
        self.unsent_bytes = 0  # of payloads

    # -------------------------------------------------------------- filling
    def put(self, message: Message) -> None:
        """Send a small frame of the connection's own, or an answer to a call never begun."""
        if len(self._small) >= self._small_frames:
            raise MalformedMessage("exchange.not_reading", "answers pile up")
        self._small.append(message)

    def announce(self, call: int, size: int) -> None:
        """Give the other side credit for a call, or for the connection; nothing if it is 0."""
        if size:
            self._announced[call] = self._announced.get(call, 0) + size

    def open(self, call: int) -> None:
        """Items of this call may follow."""
        self._streams[call] = _Stream(call)

    def add(
        self, call: int, header: Item, payload: Iterable[memoryview] = (), *, last: bool = False
    ) -> None:
        """Send a header and its payload behind what the call has to send already.

        The payload goes in the same frame if its header announces none in chunks.
        """
        stream = self._streams[call]
        item = _Item(header, deque(payload), last)
        self.unsent_bytes += sum(map(len, item.views))
        stream.items.append(item)
        if len(stream.items) == 1:
            self._queue(stream)

    def end(self, call: int, end: End) -> None:
        """Send a call's END; a part that waits here says by itself that it was the last."""
        items = self._streams[call].items
        reply = items[-1].header if items else None
        if isinstance(reply, Reply) and not end.code:
            items[-1].header = Reply(id=call, body=reply.body, size=reply.size, last=True)
            items[-1].last = True
        else:
            self.add(call, end, last=True)

    def clear(self, call: int) -> None:
        """Forget what the call has not sent; more may be added."""
        stream = self._streams[call]
        self.unsent_bytes -= sum(len(view) for item in stream.items for view in item.views)
        stream.items.clear()
        self._queue(stream)

    def close(self, call: int) -> None:
        """Forget the call."""
        self.clear(call)
        del self._streams[call]
        self._announced.pop(call, None)

    def granted(self, call: int, size: int) -> None:
        """The other side announced credit; for a call that is gone it means nothing."""
        if call == CONNECTION:
            self._credit.grant(size)
        elif (stream := self._streams.get(call)) is not None:
            stream.credit.grant(size)
            if stream.queue is None:
                self._queue(stream)

    # -------------------------------------------------------------- looking
    def begun(self, call: int) -> bool:
        """Whether the other side has heard of the call from here."""
        return self._streams[call].begun

    def waiting(self, call: int) -> bool:
        """Whether the call has something unsent."""
        return call in self._streams and bool(self._streams[call].items)

    @property
    def empty(self) -> bool:
        """Whether nothing is left to send, now or when credit comes."""
        return not (self._small or self._announced or any(map(self.waiting, self._streams)))

    @property
    def sendable(self) -> bool:
        """Whether there is a frame to send now."""
        return bool(
            self._small or self._announced or self._headers or (self._chunks and self._credit.left)
        )

    # -------------------------------------------------------------- sending
    def next_frame(self) -> OutFrame | None:
        """The frame to send now; None when there is none, or no credit for it."""
        if self._small:
            return OutFrame(encode_header(self._small.popleft()))
        if self._announced:
            call = next(iter(self._announced))
            credit = Announcement(id=call, size=self._announced.pop(call))
            return OutFrame(encode_header(credit))
        if self._headers:
            return self._next_header(self._headers[0])
        if self._chunks and self._credit.left:
            return self._next_chunk(self._chunks[0])
        return None

    def _next_header(self, stream: _Stream) -> OutFrame:
        item = stream.items[0]
        header, item.header, stream.begun = item.header, None, True
        assert header is not None
        pieces: tuple[memoryview, ...] = ()
        if isinstance(header, Request | Reply) and not header.size:
            pieces = tuple(item.views)
            item.views.clear()
        return self._frame(stream, header, pieces)

    def _next_chunk(self, stream: _Stream) -> OutFrame:
        pieces = stream.items[0].cut(min(self._chunk_bytes, stream.credit.left, self._credit.left))
        size = sum(map(len, pieces))
        stream.credit.spend(size)
        self._credit.spend(size)
        return self._frame(stream, Chunk(id=stream.call), pieces)

    def _frame(self, stream: _Stream, header: Message, pieces: tuple[memoryview, ...]) -> OutFrame:
        """A frame of these pieces, which were taken from the call's first item."""
        size, item = sum(map(len, pieces)), stream.items[0]
        self.unsent_bytes -= size
        ended = item.last and not item.views
        self._queue(stream)
        if ended:
            self.close(stream.call)
        return OutFrame(encode_header(header), pieces, size, stream.call if ended else 0)

    def _queue(self, stream: _Stream) -> None:
        """Put the call behind the others that wait for what it needs next."""
        if stream.queue is not None:
            stream.queue.remove(stream)
            stream.queue = None
        items = stream.items
        if items and items[0].header is None and not items[0].views:
            items.popleft()
        if items and items[0].header is not None:
            stream.queue = self._headers
        elif items and stream.credit.left:
            stream.queue = self._chunks
        if stream.queue is not None:
            stream.queue.append(stream)

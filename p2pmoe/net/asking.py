"""The asking side of calls: one on one connection, and its answer as a caller reads it."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable

import trio

from p2pmoe import telemetry
from p2pmoe.errors import P2PMoEError, PeerUnreachable
from p2pmoe.net.calls import Part

ATTEMPTS = 3  # connections for one call, when each ends before the call is taken; a guess


class NotBegun(PeerUnreachable):
    """The connection ended before the other side took the call: it is safe to ask again."""


class OutgoingCall:
    """A call on one connection: take its parts, then `close` it, which cancels what has not ended.

    `taken(bytes)` and `cancel()` tell the connection; it says `arrived` and `ended`. `news` is
    called after each of these, for who takes without waiting; it may close the call.
    """

    __slots__ = ("_cancel", "_error", "_method", "_parts", "_taken", "news", "over")

    def __init__(
        self, method: str, taken: Callable[[int], None], cancel: Callable[[], None]
    ) -> None:
        self._method, self._taken, self._cancel = method, taken, cancel
        self._parts: deque[Part] = deque()
        self._error: P2PMoEError | None = None
        self.over = False  # no more parts will come
        self.news: Callable[[], object] = _nothing

    async def next_part(self) -> Part | None:
        """Wait for the next part of the answer; `None` at its end. Raises as `take`."""
        if self._parts or self.over:
            await trio.lowlevel.checkpoint_if_cancelled()
        else:
            waiting = trio.lowlevel.ParkingLot()
            self.news = waiting.unpark_all
            while not self._parts and not self.over:
                await waiting.park()
        return self.take()

    def take(self) -> Part | None:
        """The next part of the answer that is there; `None` if there is none.

        Raises the error that the other side answered, `ConnectionLost` or `NotBegun`.
        """
        if self._parts:
            part = self._parts.popleft()
            if not self.over:
                self._taken(len(part.payload))
            return part
        if self._error is not None:
            raise self._error
        return None

    def close(self) -> None:
        """Nobody waits any more."""
        self.news = _nothing
        if not self.over:
            self._cancel()
            self.ended(None, "cancelled")

    def arrived(self, part: Part) -> None:
        """A part has come."""
        self._parts.append(part)
        self.news()

    def ended(self, error: P2PMoEError | None, result: str) -> None:
        """No more parts will come."""
        self.over, self._error = True, error
        telemetry.count("p2pmoe_calls_total", side="client", op=self._method, result=result)
        self.news()


def _nothing() -> None:
    """Nobody wants to know."""


class Replies:
    """The parts of an answer, as they come; asked for again where it was certainly not begun.

    `ask` begins the call on a connection. Used in an `async with` block, which cancels at its end
    what has not ended.
    """

    def __init__(self, ask: Callable[[], Awaitable[OutgoingCall]]) -> None:
        self._ask = ask
        self._attempts = 0
        self._call: OutgoingCall | None = None

    async def __aenter__(self) -> Replies:
        self._call = await self._begin()
        return self

    async def __aexit__(self, *error: object) -> None:
        if self._call is not None:
            self._call.close()

    def __aiter__(self) -> Replies:
        return self

    async def __anext__(self) -> Part:
        while True:
            self._call = self._call or await self._begin()
            try:
                part = await self._call.next_part()
            except NotBegun:
                self._call = None
                if self._attempts == ATTEMPTS:
                    raise
            else:
                if part is None:
                    raise StopAsyncIteration
                return part

    def _begin(self) -> Awaitable[OutgoingCall]:
        """Ask, for the first time or again."""
        self._attempts += 1
        return self._ask()

"""Credit: how many bytes of payload may be on their way, for one call or one connection.

The receiver owns the window: it announces credit as it makes room, in steps of half a window, and
doubles the window each time until it is 8 MiB, so that a long fat line fills and a small call needs
no credit at all. The sender counts down what it was given. Both begin at 1 MiB unannounced.
"""

from __future__ import annotations

from p2pmoe.errors import MalformedMessage
from p2pmoe.net.messages import MAX_WINDOW_BYTES

FIRST_WINDOW_BYTES = 1024 * 1024  # before any CREDIT; a guess, four chunks


class Credit:
    """The sender's side."""

    __slots__ = ("left",)

    def __init__(self) -> None:
        self.left = FIRST_WINDOW_BYTES

    def spend(self, size: int) -> None:
        """`size` bytes are sent; never more than `left`."""
        assert size <= self.left
        self.left -= size

    def grant(self, size: int) -> None:
        """The receiver announced `size` more; `MalformedMessage` beyond the largest window."""
        if self.left + size > MAX_WINDOW_BYTES:
            raise MalformedMessage("exchange.credit", f"{self.left + size} bytes are open")
        self.left += size


class Window:
    """The receiver's side. What the sender may still send and what is used make up the window."""

    __slots__ = ("_freed", "_left", "_size")

    def __init__(self) -> None:
        self._size = self._left = FIRST_WINDOW_BYTES
        self._freed = 0

    def take(self, size: int) -> None:
        """`size` bytes have come; `MalformedMessage` when the sender had no credit for them."""
        if size > self._left:
            raise MalformedMessage("exchange.no_credit", f"{size} bytes of {self._left}")
        self._left -= size

    def free(self, size: int) -> int:
        """There is room again for `size` bytes; returns the credit to announce now, or 0."""
        self._freed += size
        if self._freed < self._size // 2:
            return 0
        growth = min(self._size, MAX_WINDOW_BYTES - self._size)
        announced, self._freed = self._freed + growth, 0
        self._size += growth
        self._left += announced
        return announced

"""What a transport does: the seam between real sockets and the network in memory.

Rules: a channel is handed over only after its far side has proven that it holds the key of
`channel.peer`; nothing of ours was sent before that. Who dialled owns the channel's stream and
closes it; a stream that was accepted is closed when `accepted` returns.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import trio

from p2pmoe.errors import P2PMoEError
from p2pmoe.identity import PeerId
from p2pmoe.wire.address import Address


def _no_timeout(seconds: float) -> None:
    """What a transport without such a timeout does: nothing."""


@dataclass(frozen=True, slots=True)
class Channel:
    """A byte stream to a peer whose identity is proven.

    The channel may not be used after `expires_at`, in seconds since 1970 (infinity where nothing
    expires). `set_user_timeout(seconds)` bounds how long sent bytes may stay unacknowledged before
    the stream breaks (RFC 5482), where the transport can do that.
    """

    stream: trio.abc.Stream
    peer: PeerId
    public_key: bytes
    remote: Address
    expires_at: float
    set_user_timeout: Callable[[float], None] = _no_timeout
    host: str = ""  # the number of the machine at the other end, where there are numbers


Accepted = Callable[[Channel], Awaitable[P2PMoEError | None]]


class Transport(Protocol):
    """Dials and listens as one peer."""

    @property
    def peer_id(self) -> PeerId:
        """Who this transport proves to be."""
        ...

    async def dial(self, address: Address, expect: PeerId | None) -> Channel:
        """Open a channel to `address`, to `expect` and nobody else where it is given.

        Raises `PeerUnreachable` with its stage, `NotAllowed` when one side does not accept the
        other, or another peer answers than was dialled, and `VersionMismatch`.
        """
        ...

    async def serve(
        self,
        address: Address,
        accepted: Accepted,
        *,
        task_status: trio.TaskStatus[Address] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Run `accepted` in a child task for each channel that comes in, until cancelled.

        It returns why the channel ended, `None` if nobody is to blame. Starts with the address that
        is bound, port 0 resolved. Raises `AddressInUse`, or `ConfigurationError` when the address
        is none of this machine's.
        """
        ...


E = TypeVar("E", bound=P2PMoEError)


def failure(kind: type[E], stage: str, address: Address | None, reason: str) -> E:
    """The error of a connection that did not come to be: one line with address, stage, reason."""
    where = f"{address}: " if address else ""
    text = str(address) if address else None
    return kind(f"{where}{stage}: {reason}", stage=stage, address=text)

"""What a pool tells its observers: peers that were reached, were lost, or could not be reached."""

from __future__ import annotations

from dataclasses import dataclass

from p2pmoe.errors import P2PMoEError
from p2pmoe.identity import PeerId
from p2pmoe.wire.envelope import Signed
from p2pmoe.wire.peer_record import PeerRecord


@dataclass(frozen=True, slots=True)
class PeerConnected:
    """A connection to a peer was made; this side dialled if `outbound`."""

    peer: PeerId
    record: Signed[PeerRecord] | None
    outbound: bool
    host: str = ""  # as `Channel.host`


@dataclass(frozen=True, slots=True)
class PeerLost:
    """A peer's last connection ended: by a goodbye, or for the reason in `error`.

    With a dial under way it is not lost before that fails.
    """

    peer: PeerId
    error: P2PMoEError | None = None


@dataclass(frozen=True, slots=True)
class DialFailed:
    """A peer could not be reached."""

    peer: PeerId
    error: P2PMoEError


PoolEvent = PeerConnected | PeerLost | DialFailed

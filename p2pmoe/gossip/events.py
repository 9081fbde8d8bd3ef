"""What the membership tells those above it of other peers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from p2pmoe.gossip.members import State
from p2pmoe.identity import PeerId
from p2pmoe.wire.envelope import Signed
from p2pmoe.wire.peer_record import PeerRecord


@dataclass(frozen=True, slots=True)
class MemberJoined:
    """A member that was not known before."""

    peer: PeerId
    record: Signed[PeerRecord]


@dataclass(frozen=True, slots=True)
class MemberSuspected:
    """A member may have failed: others should be asked first."""

    peer: PeerId
    record: Signed[PeerRecord]


@dataclass(frozen=True, slots=True)
class MemberFailed:
    """A member is gone without a word: nobody should be made to wait for it."""

    peer: PeerId
    record: Signed[PeerRecord]


@dataclass(frozen=True, slots=True)
class MemberLeft:
    """A member said that it leaves; what it has begun, it may finish."""

    peer: PeerId
    record: Signed[PeerRecord]


@dataclass(frozen=True, slots=True)
class MemberReturned:
    """A member is alive that was suspected, or gone."""

    peer: PeerId
    record: Signed[PeerRecord]


MemberEvent = MemberJoined | MemberSuspected | MemberFailed | MemberLeft | MemberReturned

_BY_STATE: dict[State, Callable[[PeerId, Signed[PeerRecord]], MemberEvent]] = {
    State.ALIVE: MemberReturned,
    State.SUSPECT: MemberSuspected,
    State.DEAD: MemberFailed,
    State.LEFT: MemberLeft,
}


def event_of(was: State | None, state: State, record: Signed[PeerRecord]) -> MemberEvent:
    """The event of a member's change; `was` is None for one that was not known."""
    if was is None and state is State.ALIVE:
        return MemberJoined(record.signer, record)
    return _BY_STATE[state](record.signer, record)

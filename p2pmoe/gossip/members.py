"""What is held about each member, what a machine may ask for, and the numbers it goes by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from p2pmoe.gossip.messages import GossipMessage, Leave, Suspect
from p2pmoe.identity import PeerId
from p2pmoe.wire.envelope import Signed
from p2pmoe.wire.peer_record import PeerRecord

Sign = Callable[[PeerRecord | Suspect | Leave], Signed[Any]]


class State(Enum):
    """What a member is held for."""

    ALIVE = "alive"
    SUSPECT = "suspect"
    DEAD = "dead"
    LEFT = "left"


@dataclass(slots=True, eq=False)
class Member:
    """What is held about one other peer. Times are seconds on the shell's clock."""

    record: Signed[PeerRecord]
    state: State
    since: float  # when it came into this state
    load: int = 0  # thousandths, as its last answer had it
    free_slots: int = 0
    rtt: float = 0.0  # smoothed, seconds; 0: never measured
    last_heard: float | None = None
    refuted: float = 0.0  # for wrong suspicions of late: so much longer it is waited for
    twin: Signed[PeerRecord] | None = None  # another record of the same order: quarantined
    leave: Signed[Leave] | None = None  # of one that left

    @property
    def order(self) -> tuple[int, int]:
        """The version that newer ones are compared with: of the record, or of its leave."""
        order = self.record.body.order
        return order if self.leave is None else max(order, self.leave.body.order)

    @property
    def live(self) -> bool:
        """Whether it counts as being there: alive, or under suspicion."""
        return self.state is State.ALIVE or self.state is State.SUSPECT


# ------------------------------------------------------------------------------------ effects
@dataclass(frozen=True, slots=True)
class Send:
    """Send this over the control connection; drop it if there is none."""

    to: PeerId
    message: GossipMessage


@dataclass(frozen=True, slots=True)
class Neighbours:
    """Keep control connections to exactly these; others may be closed when idle."""

    peers: tuple[PeerId, ...]


@dataclass(frozen=True, slots=True)
class Dial:
    """Open a control connection now; answer with `connected` or `unreachable`, always."""

    peer: PeerId
    record: Signed[PeerRecord]


@dataclass(frozen=True, slots=True)
class Changed:
    """A member's state is another, or its record is, when `was` is `state`; None: it is new."""

    peer: PeerId
    was: State | None
    state: State
    record: Signed[PeerRecord]


@dataclass(frozen=True, slots=True)
class Equivocation:
    """A key signed two records of one order; of one's own: it is used elsewhere too."""

    peer: PeerId
    a: Signed[PeerRecord]
    b: Signed[PeerRecord]


@dataclass(frozen=True, slots=True)
class Refute:
    """One's own record was signed anew: say this one from now on."""

    record: Signed[PeerRecord]


Effect = Send | Neighbours | Dial | Changed | Equivocation | Refute

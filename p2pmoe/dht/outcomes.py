"""What a holder makes of a record that it is handed: the outcomes of `records.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from p2pmoe.dht.leases import LeaseCopy
from p2pmoe.dht.messages import Lease, Transfer
from p2pmoe.dht.shelves import Held
from p2pmoe.wire.envelope import Signed


@dataclass(frozen=True, slots=True)
class Stored:
    """The record is held."""

    expires_at: float


@dataclass(frozen=True, slots=True)
class Stale:
    """A record of the same publisher that is not older was held or withdrawn. Nothing changed."""


@dataclass(frozen=True, slots=True)
class Refused:
    """A rule forbids it. `number` is the highest lease number remembered, `owner` who has it."""

    why: str
    number: int = 0
    owner: Held | None = None


@dataclass(frozen=True, slots=True)
class Abstained:
    """L2: this holder may not grant a lease yet. It is no vote against a renewal."""


@dataclass(frozen=True, slots=True)
class Full:
    """There is no room for it. That is no error."""

    why: str


@dataclass(frozen=True, slots=True)
class Others:
    """L1: what the `answered` peers said. `number` is the highest lease number they remember."""

    named: Sequence[LeaseCopy] = ()
    number: int = 0
    answered: int = 0


@dataclass(frozen=True, slots=True)
class AskFirst:
    """L1: the uid is vacant here. Ask the other closest peers, then call `decide`."""

    lease: Signed[Lease]
    transfer: Signed[Transfer] | None = None


Put = Stored | Stale | Refused | Abstained | Full

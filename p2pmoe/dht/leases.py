"""The rules about leases that need no storage: who wins, how many votes, when to renew.

A lease says who serves an expert. It is granted by a quorum of the peers closest to its key, is
valid for 30 s on the owner's clock from the moment at which it was asked for, and is renewed every
10 s. Its number is a fencing token: highest seen + 1; every call names it. L4: leases of different
publishers are never compared by version; the publisher named by most of the closest holders wins.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from p2pmoe.dht.messages import Lease
from p2pmoe.errors import P2PMoEError
from p2pmoe.identity import PeerId
from p2pmoe.wire.envelope import Signed
from p2pmoe.wire.schema import SignedPayload

T = TypeVar("T", bound=SignedPayload)


class LeaseRefused(P2PMoEError):
    """Another peer serves this expert. Choose another cell, or wait until its lease ends."""

    code = "lease_refused"
    retryable = True

    def __init__(
        self, message: str = "", *, owner: PeerId | None = None, expert: str | None = None
    ) -> None:
        super().__init__(
            message or f"{expert} is served by peer {owner}",
            peer=None if owner is None else owner.hex,
            expert=expert,
        )
        self.owner = owner


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseParams:
    """Times of the owner's side. Seconds."""

    ttl: float = 30.0  # three renewals: two may be lost
    renew_every: float = 10.0
    retry_every: float = 2.0  # after a renewal without a quorum; a guess
    together: float = 1.0  # leases due within this are renewed in one go; a guess
    prefix_ttl: float = 60.0  # dictionaries decide nothing, so they may outlive a lease
    look_every: float = 1.0  # between looks whether this process stood still; a guess
    stood_still: float = 5.0  # others grant the leases of a failed member no sooner


@dataclass(frozen=True, slots=True)
class LeaseView:
    """Who serves an expert, under which number, until when on our clock (seconds)."""

    uid: str
    peer: PeerId
    number: int
    expires_at: float


@dataclass(frozen=True)  # slots would keep typing from naming the parameter on an instance
class RecordCopy(Generic[T]):
    """A record that some holder named, and when it ends there on our clock (seconds)."""

    signed: Signed[T]
    expires_at: float


LeaseCopy = RecordCopy[Lease]


@dataclass(frozen=True, slots=True)
class Vote:
    """What one holder made of a record; the words are those of `messages.Verdict`.

    `closer` are peers that it names because they should hold the record and were not asked.
    """

    outcome: Literal["stored", "stale", "refused", "full", "abstained"]
    why: str = ""
    number: int = 0
    owner: LeaseCopy | None = None
    closer: tuple[PeerId, ...] = ()


# ------------------------------------------------------------------------------------- quorums
MOST_HOLDERS = 5  # r; loses 1e-4 of records where a quarter of a half-life passes unrenewed


def holders(
    key: bytes, others: Iterable[PeerId], own: PeerId | None, most: int = MOST_HOLDERS
) -> list[PeerId]:
    """The r peers that hold a key, closest first, of those who answered and ourselves.

    `own` is None for a peer that cannot be dialled: it holds nothing. A swarm of one holds its
    own records, so it works at once.
    """
    peers = set(others) if own is None else {*others, own}
    number = int.from_bytes(key, "big")
    return sorted(peers, key=lambda peer: peer.number ^ number)[:most]


def quorum(count: int) -> int:
    """How many of `count` holders are a majority."""
    return count // 2 + 1


# ------------------------------------------------------------------------- who wins, when read
def claim_rank(uid: str, publisher: PeerId) -> bytes:
    """Who of two equal claimants of a uid comes first: the lower one (L4)."""
    return hashlib.sha256(uid.encode() + publisher.raw).digest()


def most_named(copies: Sequence[LeaseCopy]) -> LeaseCopy | None:
    """L4: the newest lease of the publisher that most of these copies name; None for none."""
    if not copies:
        return None
    named = Counter(copy.signed.signer for copy in copies)
    uid = copies[0].signed.body.uid
    winner = min(named, key=lambda peer: (-named[peer], claim_rank(uid, peer)))
    return max(
        (copy for copy in copies if copy.signed.signer == winner),
        key=lambda copy: (copy.signed.body.epoch, copy.signed.body.incarnation, copy.expires_at),
    )


# ------------------------------------------------------------------------ who wins, when claimed
@dataclass(frozen=True, slots=True)
class Granted:
    """A quorum holds the lease."""


@dataclass(frozen=True, slots=True)
class NotGranted:
    """No quorum holds it. `owner` is whom a quorum names instead.

    `rival` is one that is named and comes before the claimant (`claim_rank`): to that one it gives
    way. `number` is the highest lease number that a refusal named.
    """

    owner: PeerId | None = None
    rival: PeerId | None = None
    number: int = 0


def tally(
    lease: Signed[Lease], votes: Sequence[Vote], asked: int, *, renewal: bool
) -> Granted | NotGranted:
    """Count the votes of those of the `asked` holders that answered.

    An abstention (L2) is no vote on a renewal, because whoever abstains may have forgotten the
    very lease that is renewed; on a first claim it is one against.
    """
    abstained = sum(vote.outcome == "abstained" for vote in votes) if renewal else 0
    if sum(vote.outcome == "stored" for vote in votes) >= quorum(asked - abstained):
        return Granted()
    owners = Counter(
        vote.owner.signed.signer
        for vote in votes
        if vote.owner is not None and vote.owner.signed.signer != lease.signer
    )
    uid = lease.body.uid
    first = min((*owners, lease.signer), key=lambda peer: claim_rank(uid, peer))
    return NotGranted(
        next((owner for owner, count in owners.items() if count >= quorum(asked)), None),
        None if first == lease.signer else first,
        max((vote.number for vote in votes), default=0),
    )


# --------------------------------------------------------------------------- the owner's side
@dataclass(slots=True)
class _Own:
    number: int
    valid_until: float
    renew_at: float
    renew_as: int  # the number under which it is renewed
    doubted: bool = False  # until it is renewed


LeaseName = tuple[bytes, str]  # grid and uid


class LeaseBook:
    """Which leases this peer has, and when each is due. It never asks; `due` says what to do.

    Who was stopped for a while was perhaps held for dead, and its leases given to others, while by
    its own clock they are good. So after a pause each counts again only once it was renewed.
    """

    def __init__(self, params: LeaseParams) -> None:
        self._params = params
        self._own: dict[LeaseName, _Own] = {}
        self._looked_at = math.inf  # by whoever keeps this book, while it has leases

    def names(self) -> list[LeaseName]:
        """Every lease that is held."""
        return list(self._own)

    def granted(self, name: LeaseName, number: int, asked_at: float) -> None:
        """A quorum granted or renewed it; it counts from when they were asked."""
        valid_until, renew_at = asked_at + self._params.ttl, asked_at + self._params.renew_every
        self._own[name] = _Own(number, valid_until, renew_at, number)

    def missed(self, name: LeaseName, now: float) -> None:
        """A renewal found no quorum: try again soon. The lease stays valid until its end."""
        if name in self._own:
            self._own[name].renew_at = now + self._params.retry_every

    def hurry(self, name: LeaseName, now: float) -> None:
        """Its holders are gone: renew it now, and under the next number.

        Others may remember this one and not whose it was, and would refuse it.
        """
        if (own := self._own.get(name)) is not None:
            own.renew_at, own.renew_as = now, own.number + 1

    def end(self, name: LeaseName, now: float) -> int | None:
        """Serve it no longer; the number that it had, None when it was not held."""
        number = self.number(name, now)
        self.drop(name)
        return number

    def drop(self, name: LeaseName) -> None:
        """It was withdrawn, or another peer has it."""
        self._own.pop(name, None)

    def looked(self, now: float) -> None:
        """Whoever keeps this book is awake, and will be again within `look_every`."""
        if self._stood_still(now):
            for own in self._own.values():
                own.doubted, own.renew_at = True, now
        self._looked_at = now if self._own else math.inf

    def _stood_still(self, now: float) -> bool:
        return now - self._looked_at > self._params.stood_still

    def lapsed(self, now: float) -> list[LeaseName]:
        """Those that were not renewed in time. They are dropped: a new claim gets a new number."""
        names = [name for name, own in self._own.items() if own.valid_until <= now]
        for name in names:
            del self._own[name]
        return names

    def due(self, now: float) -> list[LeaseName]:
        """What to renew now, and with it what is due soon. Named again a period later at most."""
        if all(own.renew_at > now for own in self._own.values()):
            return []
        latest = now + self._params.together
        names = [name for name, own in self._own.items() if own.renew_at <= latest]
        for name in names:
            self._own[name].renew_at = now + self._params.renew_every
        return names

    def next_deadline(self) -> float:
        """When something is due or ends, or is to be looked at; infinity for never."""
        look_at = self._looked_at + self._params.look_every
        return min(
            (min(own.renew_at, own.valid_until, look_at) for own in self._own.values()),
            default=math.inf,
        )

    def number(self, name: LeaseName, now: float) -> int | None:
        """Its number while it is valid; None when it was not renewed in time."""
        own = self._own.get(name)
        return own.number if own is not None and now < own.valid_until else None

    def renewal(self, name: LeaseName, now: float) -> tuple[int, int] | None:
        """Its number, and the one under which it is to be renewed; None as `number`."""
        number = self.number(name, now)
        return None if number is None else (number, self._own[name].renew_as)

    def serving(self, name: LeaseName, now: float) -> int | None:
        """The number under which calls are answered; None also while others may have it."""
        own = self._own.get(name)
        doubted = own is not None and (own.doubted or self._stood_still(now))
        return None if doubted else self.number(name, now)

    def view(self, name: LeaseName, peer: PeerId) -> LeaseView:
        """What others may read of a lease that is held."""
        own = self._own[name]
        return LeaseView(name[1], peer, own.number, own.valid_until)

    def coordinates(self) -> dict[LeaseName, tuple[int, ...]]:
        """The dictionaries to announce: by grid and prefix the coordinates served next."""
        found: dict[LeaseName, set[int]] = {}
        for grid, uid in self._own:
            prefix = uid
            while "." in prefix:
                prefix, _, coordinate = prefix.rpartition(".")
                found.setdefault((grid, prefix), set()).add(int(coordinate))
        return {name: tuple(sorted(found[name])) for name in sorted(found)}

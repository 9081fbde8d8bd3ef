"""What one peer holds of the DHT, and by which rules it takes a record in.

Merging is commutative, associative and idempotent for records of one publisher and for prefix
dictionaries: the highest (epoch, incarnation) holds. Granting a lease is a decision instead:

L1  a vacant uid is granted only after the other closest peers were asked; if one of them names an
    unexpired lease of another publisher, that is kept and returned;
L2  a holder that ran before under the same key grants nothing for one longest lease after its
    start, unless at least three others answered, because it may have forgotten what it granted;
L3  only a higher (epoch, incarnation) of the same publisher renews, an equal record never does;
L4  leases of different publishers are never compared here (readers count holders, `leases.py`);
L5  a copy is kept only where there is nothing, or an older one of the same publisher.

Lifetimes run on this peer's clock from receipt; a copy has what was left of it. What ended is
remembered for a while, so that neither an old record nor an old lease number comes back. Room is
counted in bytes, a publisher and in all; who finds none is told `Full`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from p2pmoe.dht.leases import LeaseCopy, most_named
from p2pmoe.dht.messages import Lease, PrefixRecord
from p2pmoe.identity import PeerId
from p2pmoe.wire.envelope import Signed


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordParams:
    """Lifetimes in seconds, and room."""

    lease_ttl: float = 30.0  # at most; three renewals
    prefix_ttl: float = 60.0  # at most
    manifest_ttl: float = 3600.0  # since somebody last put it; a guess
    remember: float = 600.0  # after the end of a lease or dictionary; as updates are remembered
    publishers: int = 256  # dictionaries under one prefix
    manifests: int = 4  # of one name, the oldest ones; a guess
    leases_per_grid: int = 16  # vacant cells that one publisher gets within `lease_ttl`
    number_leap: int = 1024  # by which a lease number may be above the highest known; a guess
    withdrawals: int = 4096  # that are remembered, the latest; a guess
    bytes_per_publisher: int = 1 << 20  # about a thousand leases; a guess
    bytes_in_all: int = 16 << 20  # a guess
    answers_to_trust: int = 3  # L2: others that answered, so that a quorum of five is known


OVERHEAD_BYTES = 512  # that one entry takes besides its envelope; measured, rounded up


@dataclass(frozen=True, slots=True)
class Held:
    """A record as this peer has it. Seconds on its clock."""

    signed: Signed[Any]
    expires_at: float
    forget_at: float
    granted_at: float = -math.inf  # of a lease: when its uid was vacant, and granted here

    @property
    def charge(self) -> int:
        """Bytes that it takes."""
        return len(self.signed.raw) + OVERHEAD_BYTES


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


Put = Stored | Stale | Refused | Abstained | Full
_LEASE = b""  # the one place under a lease's key


class RecordStore:
    """Records by key and, below it, by publisher (dictionaries) or by digest (manifests)."""

    def __init__(self, params: RecordParams, *, started_at: float, amnesia: bool = False) -> None:
        self._params = params
        self._silent_until = started_at + params.lease_ttl if amnesia else started_at
        self._keys: dict[bytes, dict[bytes, Held]] = {}
        self._publishers: dict[PeerId, dict[tuple[bytes, bytes], Held]] = {}
        self._withdrawn: dict[tuple[bytes, PeerId], tuple[int, int]] = {}  # by key and publisher
        self._bytes = 0

    def __len__(self) -> int:
        return sum(len(entries) for entries in self._keys.values())

    @property
    def held_bytes(self) -> int:
        """What all entries take."""
        return self._bytes

    # ---------------------------------------------------------------------------------- reading
    def get(self, key: bytes, now: float, after: bytes = b"") -> list[Held]:
        """What is valid under a key: dictionaries by publisher, manifests oldest first.

        `after` leaves out the publishers up to that one (dictionaries only).
        """
        entries = self._keys.get(key, {})
        live = [(sub, held) for sub, held in entries.items() if now < held.expires_at]
        if live and isinstance(live[0][1].signed.body, PrefixRecord):
            live = sorted((sub, held) for sub, held in live if sub > after)
        return [held for _, held in live]

    def number(self, key: bytes) -> int:
        """The highest lease number that is remembered for a key, 0 for none."""
        held = self._keys.get(key, {}).get(_LEASE)
        return held.signed.body.number if held and isinstance(held.signed.body, Lease) else 0

    # ---------------------------------------------------------------------------------- writing
    def put(self, signed: Signed[Any], now: float) -> Put | AskFirst:
        """Take a record from its publisher's own connection, or a manifest from anybody's."""
        match signed.body:
            case Lease():
                return self._put_lease(signed, now)
            case PrefixRecord():
                return self._put_prefix(signed, signed.body, now)
            case _:
                return self._put_manifest(signed, now)

    def decide(self, lease: Signed[Lease], others: Others, now: float) -> Put:
        """Grant a vacant uid or not, after L1: `others` is what the other closest peers said."""
        again = self._put_lease(lease, now)
        if not isinstance(again, AskFirst):  # somebody was granted it while others were asked
            return again
        valid = [copy for copy in others.named if now < copy.expires_at]
        owner = most_named([copy for copy in valid if not self._was_withdrawn(copy.signed)])
        if owner is not None and owner.signed.signer != lease.signer:
            return Refused("owned", owner.signed.body.number, self._keep_copy(owner, now))
        highest = max(others.number, self.number(lease.body.key))
        renewed = owner is not None or (self._remembers(lease) and highest > others.number)
        lowest = highest if renewed else highest + 1
        if not lowest <= lease.body.number <= highest + self._params.number_leap:
            return Refused("number", highest)
        if now < self._silent_until and others.answered < self._params.answers_to_trust:
            return Abstained()
        if self._granted_lately(lease, now) >= self._params.leases_per_grid:
            return Refused("cells")
        return self._grant(lease, now, granted_at=now)

    def expire(self, now: float) -> None:
        """Forget what ended long enough ago."""
        for key, entries in list(self._keys.items()):
            for sub in [sub for sub, held in entries.items() if held.forget_at <= now]:
                self._remove(key, sub)

    # ----------------------------------------------------------------------------------- leases
    def _put_lease(self, signed: Signed[Lease], now: float) -> Put | AskFirst:
        body, held = signed.body, self._keys.get(signed.body.key, {}).get(_LEASE)
        if not body.ttl_ms:
            return self._withdraw(signed, held, now)
        if held is None:
            return Stale() if self._was_withdrawn(signed) else AskFirst(signed)
        old, live, its_own = held.signed.body, now < held.expires_at, held.signed.signer
        if live and its_own != signed.signer:
            return Refused("owned", old.number, held)
        if self._was_withdrawn(signed) or (its_own == signed.signer and not _newer(body, old)):
            return Stale()
        lowest = old.number if its_own == signed.signer else old.number + 1
        if not lowest <= body.number <= old.number + self._params.number_leap:
            return Refused("number", old.number)
        if not live:
            return AskFirst(signed)
        return self._grant(signed, now, granted_at=held.granted_at)

    def _withdraw(self, signed: Signed[Lease], held: Held | None, now: float) -> Put:
        """A withdrawal is remembered even where nothing is held: its lease may still come."""
        if held is not None and held.signed.signer == signed.signer:
            if not _newer(signed.body, held.signed.body):
                return Stale()
            ended = Held(held.signed, now, now + self._params.remember)
            self._store(signed.body.key, _LEASE, ended, now)
        place = (signed.body.key, signed.signer)
        self._withdrawn[place] = max(_version(signed.body), self._withdrawn.pop(place, (0, 0)))
        if len(self._withdrawn) > self._params.withdrawals:
            del self._withdrawn[next(iter(self._withdrawn))]
        return Stored(now)

    def _was_withdrawn(self, signed: Signed[Lease]) -> bool:
        version = self._withdrawn.get((signed.body.key, signed.signer))
        return version is not None and _version(signed.body) <= version

    def _grant(self, signed: Signed[Lease], now: float, *, granted_at: float) -> Put:
        ttl = min(signed.body.ttl_ms / 1000, self._params.lease_ttl)
        held = replace(self._held(signed, now, ttl), granted_at=granted_at)
        return self._store(signed.body.key, _LEASE, held, now)

    def _keep_copy(self, copy: LeaseCopy, now: float) -> Held:
        """L5, where nothing valid is held: the owner that another holder named."""
        left = min(copy.expires_at - now, self._params.lease_ttl)
        held = self._held(copy.signed, now, left)
        if copy.signed.body.number >= self.number(copy.signed.body.key):
            self._store(copy.signed.body.key, _LEASE, held, now)
        return held

    def _remembers(self, lease: Signed[Lease]) -> bool:
        """Whether the last lease of this uid here was the same publisher's."""
        held = self._keys.get(lease.body.key, {}).get(_LEASE)
        return held is not None and held.signed.signer == lease.signer

    def _granted_lately(self, lease: Signed[Lease], now: float) -> int:
        """How many other uids of its grid, vacant then, this publisher got here within a ttl."""
        own = self._publishers.get(lease.signer, {})
        return sum(
            isinstance(held.signed.body, Lease)
            and held.signed.body.grid == lease.body.grid
            and key != lease.body.key
            and now < held.granted_at + self._params.lease_ttl
            for (key, _), held in own.items()
        )

    # ------------------------------------------------------------------ dictionaries, manifests
    def _put_prefix(self, signed: Signed[Any], body: PrefixRecord, now: float) -> Put:
        key, sub = body.key, signed.signer.raw
        entries = self._keys.get(key, {})
        if sub in entries:
            old = entries[sub].signed
            assert isinstance(old.body, PrefixRecord)
            if (*_version(body), signed.digest) <= (*_version(old.body), old.digest):
                return Stale()
        elif len(entries) >= self._params.publishers:
            last = max(entries, key=lambda publisher: _rank(key, publisher))
            if _rank(key, sub) > _rank(key, last):
                return Full("publishers")
            self._remove(key, last)
        ttl = min(body.ttl_ms / 1000, self._params.prefix_ttl)
        return self._store(key, sub, self._held(signed, now, ttl), now)

    def _put_manifest(self, signed: Signed[Any], now: float) -> Put:
        key, entries = signed.body.key, self._keys.get(signed.body.key, {})
        for sub in [sub for sub, held in entries.items() if held.expires_at <= now]:
            self._remove(key, sub)
        if signed.digest not in entries and len(entries) >= self._params.manifests:
            return Full("manifests")
        expires_at = now + self._params.manifest_ttl
        return self._store(key, signed.digest, Held(signed, expires_at, expires_at), now)

    # ------------------------------------------------------------------------------------- room
    def _held(self, signed: Signed[Any], now: float, ttl: float) -> Held:
        return Held(signed, now + ttl, now + ttl + self._params.remember)

    def _store(self, key: bytes, sub: bytes, held: Held, now: float) -> Put:
        publisher = held.signed.signer
        old = self._keys.get(key, {}).get(sub)
        own = self._publishers.get(publisher, {})
        given_back = old.charge if old is not None else 0
        mine = given_back if old is not None and old.signed.signer == publisher else 0
        used = sum(other.charge for other in own.values())
        if used - mine + held.charge > self._params.bytes_per_publisher:
            return Full("publisher")
        if not self._make_room(held.charge - given_back, (key, sub), now):
            return Full("holder")
        if old is not None and old.signed.signer != publisher:
            self._remove(key, sub)
        self._bytes += held.charge - mine
        self._keys.setdefault(key, {})[sub] = held
        self._publishers.setdefault(publisher, {})[key, sub] = held
        return Stored(held.expires_at)

    def _make_room(self, needed: int, keep: tuple[bytes, bytes], now: float) -> bool:
        """Forget what ended, the earliest to be forgotten first, if that gives `needed` bytes."""
        missing = self._bytes + needed - self._params.bytes_in_all
        if missing <= 0:
            return True
        ended = sorted(
            (held.forget_at, key, sub, held.charge)
            for key, entries in self._keys.items()
            for sub, held in entries.items()
            if held.expires_at <= now and (key, sub) != keep
        )
        if sum(charge for *_, charge in ended) < missing:
            return False
        for _, key, sub, charge in ended:
            if missing > 0:
                self._remove(key, sub)
                missing -= charge
        return True

    def _remove(self, key: bytes, sub: bytes) -> None:
        held = self._keys[key].pop(sub)
        if not self._keys[key]:
            del self._keys[key]
        own = self._publishers[held.signed.signer]
        del own[key, sub]
        if not own:
            del self._publishers[held.signed.signer]
        self._bytes -= held.charge


def _rank(key: bytes, publisher: bytes) -> bytes:
    return hashlib.sha256(key + publisher).digest()


def _version(body: Lease | PrefixRecord) -> tuple[int, int]:
    return body.epoch, body.incarnation


def _newer(body: Lease, old: Lease) -> bool:
    return _version(body) > _version(old)

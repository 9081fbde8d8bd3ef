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

A lease that runs goes to another peer at once when its owner signed that (`Transfer`), under the
next number; so an old transfer never counts again. Of snapshots (`saved.py`) a holder takes what
the publisher of the lease says, while that is the last one known here, under its number.

Lifetimes run on this peer's clock from receipt; a copy has what was left of it. What ended is
remembered for a while, so that neither an old record nor an old lease number comes back. Room is
that of `shelves.py`; who finds none is told `Full`.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field, replace
from typing import Any

from p2pmoe.dht.leases import LeaseCopy, RecordCopy, most_named
from p2pmoe.dht.messages import Lease, PrefixRecord, SnapshotRecord, Transfer
from p2pmoe.dht.outcomes import Abstained as Abstained
from p2pmoe.dht.outcomes import AskFirst as AskFirst
from p2pmoe.dht.outcomes import Full as Full
from p2pmoe.dht.outcomes import Others as Others
from p2pmoe.dht.outcomes import Put as Put
from p2pmoe.dht.outcomes import Refused as Refused
from p2pmoe.dht.outcomes import Stale as Stale
from p2pmoe.dht.outcomes import Stored as Stored
from p2pmoe.dht.routing import Networks
from p2pmoe.dht.saved import SavedShelf, place_below
from p2pmoe.dht.shelves import Held as Held
from p2pmoe.dht.shelves import RoomParams, Shelves
from p2pmoe.identity import PeerId
from p2pmoe.wire.envelope import Kind, Signed


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordParams:
    """Lifetimes in seconds, and room."""

    lease_ttl: float = 30.0  # at most; three renewals
    prefix_ttl: float = 60.0  # at most
    manifest_ttl: float = 3600.0  # since somebody last put it; a guess
    snapshot_ttl: float = 86_400.0  # a swarm may be off for a night; a guess
    snapshots: int = 4  # of one uid, the newest ones; a guess
    remember: float = 600.0  # after the end of a lease or dictionary; as updates are remembered
    publishers: int = 256  # dictionaries under one prefix
    manifests: int = 4  # of one name, the oldest ones; a guess
    leases_per_grid: int = 16  # vacant cells that one publisher gets within `lease_ttl`
    number_leap: int = 1024  # by which a lease number may be above the highest known; a guess
    withdrawals: int = 4096  # that are remembered, the latest; a guess
    gone: int = 4096  # publishers that are remembered to have left or failed, the latest; a guess
    answers_to_trust: int = 3  # L2: others that answered, so that a quorum of five is known
    room: RoomParams = field(default_factory=RoomParams)


NOWHERE: Networks = frozenset()


_LEASE = b""  # the one place under a lease's key


class RecordStore:
    """Records by key and, below it, by publisher (dictionaries) or by digest (manifests)."""

    def __init__(self, params: RecordParams, *, started_at: float, amnesia: bool = False) -> None:
        self._params = params
        self._silent_until = started_at + params.lease_ttl if amnesia else started_at
        self.shelves = Shelves(params.room)
        self._saved = SavedShelf(self.shelves, params.snapshots, params.room.per_publisher)
        self._withdrawn: dict[tuple[bytes, PeerId], tuple[int, int]] = {}  # by key and publisher
        self._gone: dict[PeerId, float] = {}  # publishers, and from when their leases are vacant

    def __len__(self) -> int:
        return len(self.shelves)

    # ---------------------------------------------------------------------------------- reading
    def get(
        self, key: bytes, now: float, after: bytes = b"", kind: Kind | None = None
    ) -> list[Held]:
        """What is valid under a key, of one kind: dictionaries by publisher, else oldest first.

        `after` leaves out the publishers up to that one (dictionaries only).
        """
        live = [
            (sub, held)
            for sub, held in self.shelves.at(key).items()
            if self._is_live(held, now) and kind in (None, held.signed.kind)
        ]
        if live and isinstance(live[0][1].signed.body, PrefixRecord):
            live = sorted((sub, held) for sub, held in live if sub > after)
        return [held for _, held in live]

    def number(self, key: bytes) -> int:
        """The highest lease number that is remembered for a key, 0 for none."""
        held = self.shelves.get((key, _LEASE))
        return max(held.signed.body.number if held else 0, self._saved.number(key))

    # ---------------------------------------------------------------------------------- writing
    def put(
        self,
        signed: Signed[Any],
        now: float,
        networks: Networks = NOWHERE,
        transfer: Signed[Transfer] | None = None,
    ) -> Put | AskFirst:
        """Take a record from its publisher's own connection, or a manifest from anybody's.

        `networks` are those of the internet in which its publisher is. `transfer` is what the owner
        before signed, if it handed a lease over.
        """
        match signed.body:
            case Lease():
                self.is_back(signed.signer)  # it speaks, so it is there
                return self._put_lease(signed, now, networks, transfer)
            case SnapshotRecord():
                return self._put_snapshot(signed, now, networks)
            case PrefixRecord():
                ttl = signed.body.ttl_ms / 1000
                return self._put_prefix(signed, now + ttl, now, networks)
            case _:
                return self._put_manifest(signed, now + self._params.manifest_ttl, now, networks)

    def adopt(self, copy: RecordCopy[Any], now: float) -> Put:
        """L5: a copy from another holder, with what is left of it. It grants and renews nothing."""
        if copy.expires_at <= now:
            return Stale()
        match copy.signed.body:
            case Lease():
                return self._adopt_lease(copy, now)
            case SnapshotRecord():
                return self._adopt_snapshot(copy, now)
            case PrefixRecord():
                return self._put_prefix(copy.signed, copy.expires_at, now, NOWHERE)
            case _:
                if self.shelves.get((copy.signed.body.key, copy.signed.digest)) is not None:
                    return Stale()
                return self._put_manifest(copy.signed, copy.expires_at, now, NOWHERE)

    def gone(self, publisher: PeerId, vacant_at: float) -> None:
        """The membership says that a publisher left or failed: its leases are vacant from then."""
        vacant_at = min(vacant_at, self._gone.pop(publisher, math.inf))
        self._gone[publisher] = vacant_at
        if len(self._gone) > self._params.gone:
            del self._gone[next(iter(self._gone))]

    def is_back(self, publisher: PeerId) -> None:
        """The membership has seen a publisher again: leases that nobody else got are its own."""
        self._gone.pop(publisher, None)

    def decide(
        self,
        lease: Signed[Lease],
        others: Others,
        now: float,
        networks: Networks = NOWHERE,
        transfer: Signed[Transfer] | None = None,
    ) -> Put:
        """Grant a vacant uid or not, after L1: `others` is what the other closest peers said."""
        again = self._put_lease(lease, now, networks, transfer)
        if not isinstance(again, AskFirst):  # somebody was granted it while others were asked
            return again
        valid = [copy for copy in others.named if self._is_live(copy, now)]
        owner = most_named([copy for copy in valid if not self._was_withdrawn(copy.signed)])
        if owner is not None and _hands_over(transfer, owner.signed, lease):
            return self._grant(lease, now, granted_at=-math.inf, networks=networks)
        if owner is not None and owner.signed.signer != lease.signer:
            self._adopt_lease(owner, now)
            left = min(owner.expires_at, now + self._params.lease_ttl)
            named = Held(owner.signed, left, left + self._params.remember)
            return Refused("owned", owner.signed.body.number, named)
        highest = max(others.number, self.number(lease.body.key))
        renewed = owner is not None or (self._remembers(lease) and highest > others.number)
        lowest = highest if renewed else highest + 1
        if not lowest <= lease.body.number <= highest + self._params.number_leap:
            return Refused("number", highest)
        if now < self._silent_until and others.answered < self._params.answers_to_trust:
            return Abstained()
        if self._granted_lately(lease, now) >= self._params.leases_per_grid:
            return Refused("cells")
        return self._grant(lease, now, granted_at=now, networks=networks)

    def restore(self, signed: Signed[Any], left: float, forget_in: float, now: float) -> None:
        """What this holder had before it was started anew, with seconds that are left.

        Nothing lives longer than its kind may, and nothing that came since is replaced.
        """
        body = signed.body
        match body:
            case Lease():
                sub, longest = _LEASE, min(self._params.lease_ttl, body.ttl_ms / 1000)
            case SnapshotRecord():
                sub, longest = place_below(signed), self._params.snapshot_ttl
            case PrefixRecord():
                sub, longest = signed.signer.raw, min(self._params.prefix_ttl, body.ttl_ms / 1000)
            case _:
                sub, longest = signed.digest, self._params.manifest_ttl
        left = max(0.0, min(left, longest))
        forget_in = min(forget_in, longest + self._params.remember)
        if forget_in > 0 and self.shelves.get((body.key, sub)) is None:
            self.shelves.put((body.key, sub), Held(signed, now + left, now + forget_in), now)

    def expire(self, now: float) -> None:
        """Forget what ended long enough ago."""
        self.shelves.expire(now)

    # ----------------------------------------------------------------------------------- leases
    def _put_lease(
        self,
        signed: Signed[Lease],
        now: float,
        networks: Networks,
        transfer: Signed[Transfer] | None,
    ) -> Put | AskFirst:
        body, held = signed.body, self.shelves.get((signed.body.key, _LEASE))
        if not body.ttl_ms:
            return self._withdraw(signed, held, now)
        if held is None:
            return Stale() if self._was_withdrawn(signed) else AskFirst(signed, transfer)
        old, live, its_own = held.signed.body, self._is_live(held, now), held.signed.signer
        handed_over = _hands_over(transfer, held.signed, signed)
        if live and its_own != signed.signer and not handed_over:
            return Refused("owned", old.number, held)
        if self._was_withdrawn(signed) or (its_own == signed.signer and not _newer(body, old)):
            return Stale()
        lowest = old.number if its_own == signed.signer else old.number + 1
        if not lowest <= body.number <= old.number + self._params.number_leap:
            return Refused("number", old.number)
        if not live:
            return AskFirst(signed, transfer)
        granted_at = -math.inf if handed_over else held.granted_at
        return self._grant(signed, now, granted_at=granted_at, networks=networks)

    def _is_live(self, record: Held | LeaseCopy, now: float) -> bool:
        """Whether it has not ended, and is no lease of a publisher that is gone."""
        if now >= record.expires_at:
            return False
        vacant_at = self._gone.get(record.signed.signer, math.inf)
        return now < vacant_at or not isinstance(record.signed.body, Lease)

    def _withdraw(self, signed: Signed[Lease], held: Held | None, now: float) -> Put:
        """A withdrawal is remembered even where nothing is held: its lease may still come."""
        if held is not None and held.signed.signer == signed.signer:
            if not _newer(signed.body, held.signed.body):
                return Stale()
            ended = replace(held, expires_at=now, forget_at=now + self._params.remember)
            self.shelves.put((signed.body.key, _LEASE), ended, now)
        place = (signed.body.key, signed.signer)
        self._withdrawn[place] = max(_version(signed.body), self._withdrawn.pop(place, (0, 0)))
        if len(self._withdrawn) > self._params.withdrawals:
            del self._withdrawn[next(iter(self._withdrawn))]
        return Stored(now)

    def _was_withdrawn(self, signed: Signed[Lease]) -> bool:
        version = self._withdrawn.get((signed.body.key, signed.signer))
        return version is not None and _version(signed.body) <= version

    def _grant(
        self, signed: Signed[Lease], now: float, *, granted_at: float, networks: Networks
    ) -> Put:
        ttl = min(signed.body.ttl_ms / 1000, self._params.lease_ttl)
        held = replace(self._held(signed, now + ttl, networks), granted_at=granted_at)
        return self._store(_LEASE, held, now)

    def _adopt_lease(self, copy: LeaseCopy, now: float) -> Put:
        """L5: where nothing valid is held, or something older of the same publisher."""
        body, held = copy.signed.body, self.shelves.get((copy.signed.body.key, _LEASE))
        if self._was_withdrawn(copy.signed) or body.number < self.number(body.key):
            return Stale()
        if held is not None and held.signed.signer == copy.signed.signer:
            if not _newer(body, held.signed.body):  # L3
                return Stale()
        elif held is not None and self._is_live(held, now):
            return Refused("owned", held.signed.body.number, held)
        left = min(copy.expires_at, now + self._params.lease_ttl)
        return self._store(_LEASE, self._held(copy.signed, left, NOWHERE), now)

    def _remembers(self, lease: Signed[Lease]) -> bool:
        """Whether the last lease of this uid here was the same publisher's."""
        held = self.shelves.get((lease.body.key, _LEASE))
        return held is not None and held.signed.signer == lease.signer

    def _granted_lately(self, lease: Signed[Lease], now: float) -> int:
        """How many other uids of its grid, vacant then, this publisher got here within a ttl."""
        return sum(
            isinstance(held.signed.body, Lease)
            and held.signed.body.grid == lease.body.grid
            and key != lease.body.key
            and now < held.granted_at + self._params.lease_ttl
            for (key, _), held in self.shelves.of(lease.signer).items()
        )

    # -------------------------------------------------------------------------------- snapshots
    def _put_snapshot(self, signed: Signed[Any], now: float, networks: Networks) -> Put:
        """Only the owner of the last lease known says what was saved under it."""
        lease = self.shelves.get((signed.body.key, _LEASE))
        if lease is None:
            return Refused("no_lease", self.number(signed.body.key))
        owned = lease.signed.signer, lease.signed.body.number
        if owned != (signed.signer, signed.body.lease):
            live = self._is_live(lease, now)
            return Refused("not_owner", owned[1], lease if live else None)
        ends = now + self._params.snapshot_ttl
        return self._saved.keep(Held(signed, ends, ends, networks=networks), now)

    def _adopt_snapshot(self, copy: RecordCopy[Any], now: float) -> Put:
        """A copy is kept unless the last lease known here contradicts it."""
        lease = self.shelves.get((copy.signed.body.key, _LEASE))
        if lease is not None:
            number, body = lease.signed.body.number, copy.signed.body
            if body.lease > number or (
                body.lease == number and lease.signed.signer != copy.signed.signer
            ):
                return Refused("not_owner", number)
        ends = min(copy.expires_at, now + self._params.snapshot_ttl)
        return self._saved.keep(Held(copy.signed, ends, ends), now)

    # ------------------------------------------------------------------ dictionaries, manifests
    def _put_prefix(
        self, signed: Signed[Any], expires_at: float, now: float, networks: Networks
    ) -> Put:
        body, sub, last = signed.body, signed.signer.raw, None
        key = body.key  # a hash, made anew by each look
        entries = self.shelves.at(key)
        if sub in entries:
            old = entries[sub].signed
            if (*_version(body), signed.digest) <= (*_version(old.body), old.digest):
                return Stale()
        elif len(entries) >= self._params.publishers:
            last = max(entries, key=lambda publisher: _rank(key, publisher))
            if _rank(key, sub) > _rank(key, last):
                return Full("publishers")
        expires_at = min(expires_at, now + self._params.prefix_ttl)
        outcome = self._store(sub, self._held(signed, expires_at, networks), now)
        if last is not None and isinstance(outcome, Stored):
            self.shelves.remove((key, last))
        return outcome

    def _put_manifest(
        self, signed: Signed[Any], expires_at: float, now: float, networks: Networks
    ) -> Put:
        key = signed.body.key
        for sub in [sub for sub, held in self.shelves.at(key).items() if held.expires_at <= now]:
            self.shelves.remove((key, sub))
        entries = self.shelves.at(key)
        if signed.digest not in entries and len(entries) >= self._params.manifests:
            return Full("manifests")
        expires_at = min(expires_at, now + self._params.manifest_ttl)
        return self._store(
            signed.digest, Held(signed, expires_at, expires_at, networks=networks), now
        )

    def _held(self, signed: Signed[Any], expires_at: float, networks: Networks) -> Held:
        return Held(signed, expires_at, expires_at + self._params.remember, networks=networks)

    def _store(self, sub: bytes, held: Held, now: float) -> Put:
        why = self.shelves.put((held.signed.body.key, sub), held, now)
        return Full(why) if why else Stored(held.expires_at)


def _hands_over(
    transfer: Signed[Transfer] | None, held: Signed[Lease], claim: Signed[Lease]
) -> bool:
    """Whether the owner of a lease signed that it goes to this claim's publisher."""
    if transfer is None or transfer.signer != held.signer or transfer.body.key != held.body.key:
        return False
    said, number = transfer.body, held.body.number + 1
    return said.to == claim.signer.raw and said.number == claim.body.number == number


def _rank(key: bytes, publisher: bytes) -> bytes:
    return hashlib.sha256(key + publisher).digest()


def _version(body: Lease | PrefixRecord) -> tuple[int, int]:
    return body.epoch, body.incarnation


def _newer(body: Lease, old: Lease) -> bool:
    return _version(body) > _version(old)

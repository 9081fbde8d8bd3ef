"""Which statements about snapshots a holder keeps: a core, on the shelves beside the leases.

Rules: under a uid lie the newest few, by lease number, then by updates applied, then by signer. Of
two statements of one signer about the same update the later saved counts, of equally late ones the
one that names more keepers, then the one with the higher digest. So merging is commutative,
associative and idempotent. A publisher's snapshots take half of its room at most, so that its
leases have theirs; one that finds none takes the place of the oldest of its own publisher under
the same uid.
"""

from __future__ import annotations

from typing import Any

from p2pmoe.dht.messages import SnapshotRecord
from p2pmoe.dht.outcomes import Full, Put, Stale, Stored
from p2pmoe.dht.shelves import Held, Shelves
from p2pmoe.wire.envelope import Signed

SHARE = 2  # of a publisher's room its snapshots may take one part; a guess


def place_below(signed: Signed[SnapshotRecord]) -> bytes:
    """Where a statement lies under its key; these ascend from the oldest to the newest."""
    body = signed.body
    return body.lease.to_bytes(8, "big") + body.step.to_bytes(8, "big") + signed.signer.raw


def version(signed: Signed[SnapshotRecord]) -> tuple[int, int, bytes]:
    """Which of two statements in one place is newer."""
    return signed.body.saved_ms, len(signed.body.keepers), signed.digest


def is_snapshot(held: Held) -> bool:
    """Whether an entry says what was saved."""
    return isinstance(held.signed.body, SnapshotRecord)


class SavedShelf:
    """The statements about snapshots of one holder: at most `most` of a uid."""

    def __init__(self, shelves: Shelves, most: int, per_publisher: int) -> None:
        self._shelves, self._most = shelves, most
        self._share = per_publisher // SHARE

    def at(self, key: bytes) -> dict[bytes, Held]:
        """What lies under a key, by place."""
        return {sub: held for sub, held in self._shelves.at(key).items() if is_snapshot(held)}

    def number(self, key: bytes) -> int:
        """The highest lease number that one of them names, 0 for none."""
        return max((held.signed.body.lease for held in self.at(key).values()), default=0)

    def keep(self, held: Held, now: float) -> Put:
        """Merge a statement in. One that is held already lives longer if this one does."""
        self._shelves.expire(now)
        signed: Signed[Any] = held.signed
        sub, known = place_below(signed), self.at(signed.body.key)
        old = known.get(sub)
        if old is not None:
            same = old.signed.digest == signed.digest
            if version(signed) < version(old.signed) or (
                same and held.expires_at <= old.expires_at
            ):
                return Stale()
            return self._store(sub, held, sub, now)
        oldest = min(known) if len(known) >= self._most else sub
        if sub < oldest:
            return Stale()
        outcome = self._store(sub, held, oldest, now)
        own = [each for each, one in known.items() if one.signed.signer == signed.signer]
        if isinstance(outcome, Full) and own and min(own) < sub:
            outcome = self._store(sub, held, min(own), now)
        return outcome

    def _store(self, sub: bytes, held: Held, instead: bytes, now: float) -> Put:
        key, signer = held.signed.body.key, held.signed.signer
        used = sum(
            each.charge
            for place, each in self._shelves.of(signer).items()
            if is_snapshot(each) and place != (key, instead)
        )
        if used + held.charge > self._share:
            return Full("snapshots")
        why = self._shelves.put((key, sub), held, now, instead=(key, instead))
        return Full(why) if why else Stored(held.expires_at)

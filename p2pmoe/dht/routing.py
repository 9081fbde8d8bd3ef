"""The routing table: which peers this one knows, many near itself and few far away.

Kademlia, sections 2.2 and 2.4: buckets of k contacts, of which only the one that holds our own
id is split; a full bucket keeps its old contacts, and newcomers wait in a bounded replacement
cache. A bucket is the length of the prefix that its ids share with ours, so no id can lie on the
border of two. Rules: only peers that were dialled enter; a network of the internet (/24, /48)
has few places; whether an old contact lives is asked when it is due, not whenever a newcomer
wants its place; the table never asks, it says whom to ask.

Near our own id a table has room for everybody, so a crowd that connects to us could fill it. There
a stranger, one that came by itself and that no trusted contact has named yet, gets a place only
as long as there are no more contacts than a swarm of this size would have.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from p2pmoe.identity import PeerId, distance

ID_BITS = 256
Networks = frozenset[str]  # of the internet in which a peer's addresses lie; none for a home's


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingParams:
    """Sizes and times of a routing table."""

    k: int = 16  # contacts a bucket; simulated: at 10,000 a search takes 0.9 of the time with 8
    replacements: int = 8  # peers that wait for a place in one bucket; Kademlia, section 4.1
    refresh_after: float = 600.0  # seconds without a lookup in a bucket's range; go-libp2p
    check_after: float = 60.0  # seconds after which a silent contact is asked for a sign; a guess
    checks: int = 4  # contacts that are asked in one round, the most silent first; a guess
    network_in_bucket: int = 2  # contacts of one network in one bucket; geth
    network_in_table: int = 10  # contacts of one network in all buckets; geth
    trusted_after: float = 3600.0  # seconds after which a stranger that stays is none; a guess


@dataclass(frozen=True, slots=True)
class Inserted:
    """The peer has a place in the table."""


@dataclass(frozen=True, slots=True)
class Waits:
    """The bucket is full of contacts that were heard of lately; the newcomer waits."""


@dataclass(frozen=True, slots=True)
class PingOldest:
    """The bucket is full and its oldest contact silent: ask it, then call `seen` or `remove`."""

    oldest: PeerId


@dataclass(frozen=True, slots=True)
class Crowded:
    """Enough contacts lie in the peer's network, or around us: it has no place here."""


Insertion = Inserted | Waits | PingOldest | Crowded


@dataclass(slots=True)
class _Contact:
    seen: float
    networks: Networks
    trusted_at: float  # from when on whom it names is no stranger


@dataclass(slots=True)
class _Bucket:
    """Contacts and those who wait for a place, both in the order in which they were last seen."""

    looked_up: float
    contacts: dict[PeerId, _Contact] = field(default_factory=dict)
    waiting: dict[PeerId, _Contact] = field(default_factory=dict)


class RoutingTable:
    """Contacts by the length of the prefix that they share with `own`."""

    def __init__(self, own: PeerId, params: RoutingParams, now: float) -> None:
        self._own = own
        self._params = params
        self._buckets = [_Bucket(looked_up=now)]
        self._networks: Counter[str] = Counter()  # of the contacts; none is 0
        self.expected: float | None = None  # peers in the swarm, as far as lookups tell

    def __len__(self) -> int:
        return sum(len(bucket.contacts) for bucket in self._buckets)

    def __contains__(self, peer: PeerId) -> bool:
        return peer in self._bucket(peer.raw).contacts

    def peers(self) -> list[PeerId]:
        """Every contact."""
        return [peer for bucket in self._buckets for peer in bucket.contacts]

    def insert(
        self, peer: PeerId, now: float, networks: Networks = frozenset(), *, stranger: bool = False
    ) -> Insertion:
        """A peer that was dialled just now. Our own id has no place here."""
        if peer == self._own:
            raise ValueError("a peer is no contact of itself")
        old = self._take(self._bucket(peer.raw), peer)
        trusted_at = now + self._params.trusted_after if stranger else now
        contact = _Contact(now, networks, min(trusted_at, old.trusted_at) if old else trusted_at)
        while True:
            bucket = self._bucket(peer.raw)
            if len(bucket.contacts) < self._params.k:
                break
            if bucket is not self._buckets[-1]:
                return self._wait(bucket, peer, contact)
            self._split()
        crowd = stranger and old is None and networks and self._has_enough_around(peer)
        if crowd or self._is_crowded(bucket, networks):
            return Crowded()
        self._place(bucket, peer, contact)
        return Inserted()

    def trusts(self, peer: PeerId, now: float) -> bool:
        """Whether this is a contact, and no stranger or no longer one."""
        contact = self._bucket(peer.raw).contacts.get(peer)
        return contact is not None and contact.trusted_at <= now

    def seen(self, peer: PeerId, now: float) -> None:
        """A contact answered: it is the newest of its bucket. Others are not inserted by this."""
        contacts = self._bucket(peer.raw).contacts
        if peer in contacts:
            contacts[peer] = contact = contacts.pop(peer)
            contact.seen = now

    def remove(self, peer: PeerId) -> None:
        """A peer failed: it goes, and the one that waited and was seen last takes its place.

        Strangers come after those that are none.
        """
        bucket = self._bucket(peer.raw)
        was_there = peer in bucket.contacts
        self._take(bucket, peer)
        while was_there and bucket.waiting:
            last = reversed(bucket.waiting.items())
            known = (peer for peer, each in last if each.trusted_at <= each.seen)
            next_peer = next(known, next(reversed(bucket.waiting)))
            contact = bucket.waiting.pop(next_peer)
            if not self._is_crowded(bucket, contact.networks):
                self._place(bucket, next_peer, contact)
                break

    def closest(
        self, target: bytes, count: int, allowed: Callable[[PeerId], bool] | None = None
    ) -> list[PeerId]:
        """The contacts nearest to `target`, nearest first, of those that are `allowed`.

        Contacts of one group share as many bits with the target, those of the next group fewer; so
        groups need no sorting among each other.
        """
        number, nearest = int.from_bytes(target, "big"), list[PeerId]()
        for group in self._groups(target):
            near = sorted((peer.number ^ number, peer) for peer in group)
            nearest += (peer for _, peer in near if allowed is None or allowed(peer))
            if len(nearest) >= count:
                break
        return nearest[:count]

    def within(self, target: bytes, away: int) -> list[PeerId]:
        """The contacts that are nearer to `target` than `away`, nearest first."""
        number = int.from_bytes(target, "big")
        near = [
            peer
            for bucket in self._buckets
            for peer in bucket.contacts
            if peer.number ^ number < away
        ]
        return sorted(near, key=lambda peer: peer.number ^ number)

    def to_check(self, now: float) -> list[PeerId]:
        """Contacts to ask for a sign of life: the most silent ones, if they are silent for long."""
        due = now - self._params.check_after
        silent = [
            (contact.seen, peer)
            for bucket in self._buckets
            for peer, contact in bucket.contacts.items()
            if contact.seen <= due
        ]
        return [peer for _, peer in heapq.nsmallest(self._params.checks, silent)]

    def looked_up(self, target: bytes, now: float) -> None:
        """A lookup for this place has ended, which fills the bucket around it."""
        self._bucket(target).looked_up = now

    def to_refresh(self, now: float, rng: random.Random) -> list[bytes]:
        """A random place in the range of each bucket that no lookup has touched for long."""
        due = now - self._params.refresh_after
        return [
            self._random_place(index, rng)
            for index, bucket in enumerate(self._buckets)
            if bucket.looked_up <= due
        ]

    # ---------------------------------------------------------------------------------- buckets
    def _shared_bits(self, place: bytes) -> int:
        return ID_BITS - distance(self._own.raw, place).bit_length()

    def _bucket(self, place: bytes) -> _Bucket:
        return self._buckets[min(self._shared_bits(place), len(self._buckets) - 1)]

    def _groups(self, place: bytes) -> Iterator[Iterable[PeerId]]:
        """All contacts: the bucket of the place, all deeper ones as one, then each one outwards."""
        at = min(self._shared_bits(place), len(self._buckets) - 1)
        yield self._buckets[at].contacts
        yield [peer for bucket in self._buckets[at + 1 :] for peer in bucket.contacts]
        for bucket in reversed(self._buckets[:at]):
            yield bucket.contacts

    def _split(self) -> None:
        """The last bucket holds our own range: what shares a longer prefix moves one further.

        Nobody waits for a place in the last bucket, because it splits instead of being full.
        """
        last, depth = self._buckets[-1], len(self._buckets)
        inner = _Bucket(looked_up=last.looked_up)
        for peer in [peer for peer in last.contacts if self._shared_bits(peer.raw) >= depth]:
            inner.contacts[peer] = last.contacts.pop(peer)
        self._buckets.append(inner)

    def _place(self, bucket: _Bucket, peer: PeerId, contact: _Contact) -> None:
        bucket.contacts[peer] = contact
        self._networks.update(contact.networks)

    def _take(self, bucket: _Bucket, peer: PeerId) -> _Contact | None:
        """A peer goes from wherever it is; what is counted of its networks goes with it.

        Returns what it was as a contact.
        """
        bucket.waiting.pop(peer, None)
        contact = bucket.contacts.pop(peer, None)
        for network in () if contact is None else contact.networks:
            self._networks[network] -= 1
            if not self._networks[network]:
                del self._networks[network]
        return contact

    def _has_enough_around(self, peer: PeerId) -> bool:
        """Whether this peer lies where all have room, and as many are there as would be by chance.

        That is where at most 2k peers share so many bits with us: a Poisson number of them.
        """
        if self.expected is None:
            return False
        bits = max(0, math.floor(math.log2(max(self.expected, 1) / self._params.k)))
        if self._shared_bits(peer.raw) < bits:
            return False
        around = sum(
            self._shared_bits(each.raw) >= bits
            for bucket in self._buckets[min(bits, len(self._buckets) - 1) :]
            for each in bucket.contacts
        )
        chance = math.ldexp(self.expected, -bits)
        return around >= chance + math.sqrt(chance)

    def _is_crowded(self, bucket: _Bucket, networks: Iterable[str]) -> bool:
        return any(
            self._networks[network] >= self._params.network_in_table
            or sum(network in each.networks for each in bucket.contacts.values())
            >= self._params.network_in_bucket
            for network in networks
        )

    def _wait(self, bucket: _Bucket, peer: PeerId, contact: _Contact) -> PingOldest | Waits:
        bucket.waiting[peer] = contact
        now = contact.seen
        if len(bucket.waiting) > self._params.replacements:
            strangers = (each for each, what in bucket.waiting.items() if what.trusted_at > now)
            del bucket.waiting[next(strangers, next(iter(bucket.waiting)))]
        oldest, old = next(iter(bucket.contacts.items()))
        return (
            PingOldest(oldest) if old.seen + self._params.check_after <= contact.seen else Waits()
        )

    def _random_place(self, index: int, rng: random.Random) -> bytes:
        """A place that shares exactly `index` bits with us; for the last bucket at least those."""
        free = ID_BITS - index
        low = 0 if index == len(self._buckets) - 1 else 1 << (free - 1)
        number = self._own.number ^ rng.randrange(low, 1 << free)
        return number.to_bytes(ID_BITS // 8, "big")

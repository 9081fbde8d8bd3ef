"""The routing table: which peers this one knows, many near itself and few far away.

Kademlia, sections 2.2 and 2.4: buckets of k contacts, of which only the one that holds our own
id is split; a full bucket keeps its old contacts, and newcomers wait in a bounded replacement
cache. A bucket is the length of the prefix that its ids share with ours, so no id can lie on the
border of two. Rules: only peers that were dialled enter; the table never asks, "ping the oldest"
is a value that `insert` returns.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from p2pmoe.identity import PeerId, distance

ID_BITS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingParams:
    """Sizes and times of a routing table."""

    k: int = 8  # contacts a bucket; simulated: hops as with 20, answers to wait for 8 instead
    replacements: int = 8  # peers that wait for a place in one bucket; Kademlia, section 4.1
    refresh_after: float = 600.0  # seconds without a lookup in a bucket's range; go-libp2p


@dataclass(frozen=True, slots=True)
class Inserted:
    """The peer has a place in the table."""


@dataclass(frozen=True, slots=True)
class PingOldest:
    """The bucket is full: ask whether `oldest` lives; call `seen` or `remove` with the answer."""

    oldest: PeerId


@dataclass(slots=True)
class _Bucket:
    """Contacts and those who wait for a place, both in the order in which they were last seen."""

    looked_up: float
    contacts: dict[PeerId, None] = field(default_factory=dict)
    waiting: dict[PeerId, None] = field(default_factory=dict)


class RoutingTable:
    """Contacts by the length of the prefix that they share with `own`."""

    def __init__(self, own: PeerId, params: RoutingParams, now: float) -> None:
        self._own = own
        self._params = params
        self._buckets = [_Bucket(looked_up=now)]

    def __len__(self) -> int:
        return sum(len(bucket.contacts) for bucket in self._buckets)

    def __contains__(self, peer: PeerId) -> bool:
        return peer in self._bucket(peer.raw).contacts

    def peers(self) -> list[PeerId]:
        """Every contact."""
        return [peer for bucket in self._buckets for peer in bucket.contacts]

    def insert(self, peer: PeerId) -> Inserted | PingOldest:
        """A peer that was dialled just now. Our own id has no place here."""
        if peer == self._own:
            raise ValueError("a peer is no contact of itself")
        bucket = self._bucket(peer.raw)
        while peer not in bucket.contacts and len(bucket.contacts) >= self._params.k:
            if bucket is not self._buckets[-1]:
                return self._wait(bucket, peer)
            self._split()
            bucket = self._bucket(peer.raw)
        bucket.waiting.pop(peer, None)
        bucket.contacts.pop(peer, None)
        bucket.contacts[peer] = None
        return Inserted()

    def seen(self, peer: PeerId) -> None:
        """A contact answered: it is the newest of its bucket. Others are not inserted by this."""
        contacts = self._bucket(peer.raw).contacts
        if peer in contacts:
            del contacts[peer]
            contacts[peer] = None

    def remove(self, peer: PeerId) -> None:
        """A peer failed: it goes, and the one that waited and was seen last takes its place."""
        bucket = self._bucket(peer.raw)
        bucket.waiting.pop(peer, None)
        if peer in bucket.contacts:
            del bucket.contacts[peer]
            if bucket.waiting:
                bucket.contacts[bucket.waiting.popitem()[0]] = None

    def closest(
        self, target: bytes, count: int, allowed: Callable[[PeerId], bool] | None = None
    ) -> list[PeerId]:
        """The contacts nearest to `target`, nearest first, of those that are `allowed`."""
        peers = self.peers() if allowed is None else filter(allowed, self.peers())
        return heapq.nsmallest(count, peers, key=lambda peer: distance(peer.raw, target))

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

    def _split(self) -> None:
        """The last bucket holds our own range: what shares a longer prefix moves one further.

        Nobody waits for a place in the last bucket, because it splits instead of being full.
        """
        last, depth = self._buckets[-1], len(self._buckets)
        inner = _Bucket(looked_up=last.looked_up)
        for peer in [peer for peer in last.contacts if self._shared_bits(peer.raw) >= depth]:
            inner.contacts[peer] = last.contacts.pop(peer)
        self._buckets.append(inner)

    def _wait(self, bucket: _Bucket, peer: PeerId) -> PingOldest:
        bucket.waiting.pop(peer, None)
        bucket.waiting[peer] = None
        if len(bucket.waiting) > self._params.replacements:
            del bucket.waiting[next(iter(bucket.waiting))]
        return PingOldest(next(iter(bucket.contacts)))

    def _random_place(self, index: int, rng: random.Random) -> bytes:
        """A place that shares exactly `index` bits with us; for the last bucket at least those."""
        free = ID_BITS - index
        low = 0 if index == len(self._buckets) - 1 else 1 << (free - 1)
        number = self._own.number ^ rng.randrange(low, 1 << free)
        return number.to_bytes(ID_BITS // 8, "big")

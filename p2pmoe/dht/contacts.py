"""Whom this peer knows: sealed records by peer, bounded, around the routing table.

A record may come from anybody, since it is signed; knowing one proves nothing about the peer.
Only a peer that was dialled counts as there (`dialled`), and only such a peer enters the table.
One that did not answer is avoided for a while, which makes it no worse a peer later.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

from p2pmoe.dht.routing import Inserted, PingOldest, RoutingParams, RoutingTable
from p2pmoe.identity import PeerId
from p2pmoe.wire.envelope import Signed
from p2pmoe.wire.peer_record import Contact, PeerRecord, contact_of


@dataclass(frozen=True, slots=True, kw_only=True)
class ContactParams:
    """Sizes and times of what is known about peers."""

    most_known: int = 2048  # records, at most 600 B each; a guess
    avoid_for: float = 10.0  # seconds without questions after one was not answered; a guess
    routing: RoutingParams = field(default_factory=RoutingParams)


@dataclass(slots=True)
class _Known:
    record: Signed[PeerRecord]
    contact: Contact
    dialled: bool = False
    avoided_until: float = -math.inf


class Contacts:
    """Records of peers, least recently learned dropped first, but never one in the table."""

    def __init__(self, own: PeerId, params: ContactParams, now: float) -> None:
        self._own = own
        self._params = params
        self._known: dict[PeerId, _Known] = {}
        self.table = RoutingTable(own, params.routing, now)

    def __len__(self) -> int:
        return len(self._known)

    def learn(self, record: Signed[PeerRecord]) -> None:
        """A record came from somewhere. One without addresses, or of ourselves, says nothing."""
        peer = record.signer
        if peer == self._own or not record.body.addresses:
            return
        old = self._known.pop(peer, None)
        if old is None or record.body.order > old.record.body.order:
            known = _Known(record, contact_of(record))
            if old is not None and old.contact == known.contact:
                known.dialled, known.avoided_until = old.dialled, old.avoided_until
        else:
            known = old
        self._known[peer] = known
        self._drop_oldest()

    def record(self, peer: PeerId) -> Signed[PeerRecord] | None:
        """The newest record of this peer, if one is known."""
        known = self._known.get(peer)
        return None if known is None else known.record

    def grids(self) -> set[str]:
        """The names of the grids that known peers say they serve."""
        return {grid for known in self._known.values() for grid in known.record.body.grids}

    def contact(self, peer: PeerId) -> Contact | None:
        """Where to dial this peer, if that is known."""
        known = self._known.get(peer)
        return None if known is None else known.contact

    def dialled(self, peer: PeerId) -> Inserted | PingOldest | None:
        """A connection to this peer succeeded that we began. None: its record is not known."""
        known = self._known.get(peer)
        if known is None:
            return None
        known.dialled, known.avoided_until = True, -math.inf
        return self.table.insert(peer)

    def was_dialled(self, peer: PeerId) -> bool:
        """Whether it was reached at the addresses of its record."""
        known = self._known.get(peer)
        return known is not None and known.dialled

    def failed(self, peer: PeerId, now: float) -> None:
        """The peer refused or did not answer: out of the table, and avoided for a while."""
        self.table.remove(peer)
        known = self._known.get(peer)
        if known is not None:
            known.dialled, known.avoided_until = False, now + self._params.avoid_for

    def sample(self, count: int, rng: random.Random) -> list[PeerId]:
        """Some of those that are known, each as likely as the others."""
        return rng.sample(list(self._known), min(count, len(self._known)))

    def avoided(self, peer: PeerId, now: float) -> bool:
        """Whether it failed a short while ago."""
        known = self._known.get(peer)
        return known is not None and now < known.avoided_until

    def _drop_oldest(self) -> None:
        if len(self._known) > self._params.most_known:
            del self._known[next(peer for peer in self._known if peer not in self.table)]

"""Whom this peer knows: sealed records by peer, bounded, around the routing table.

A record may come from anybody, since it is signed; knowing one proves nothing about the peer.
Only a peer that was dialled counts as there (`dialled`), and only such a peer enters the table.
One that did not answer is avoided for a while, longer each time until it is reached again. One
that the membership suspects, or whose connection broke, is asked last.
"""

from __future__ import annotations

import functools
import ipaddress
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from p2pmoe.dht.routing import Insertion, Networks, RoutingParams, RoutingTable
from p2pmoe.identity import PeerId
from p2pmoe.wire.envelope import Signed
from p2pmoe.wire.peer_record import Contact, PeerRecord, contact_of

NETWORKS = 4096  # of hosts that are remembered, 300 B at most each; a guess


@dataclass(frozen=True, slots=True, kw_only=True)
class ContactParams:
    """Sizes and times of what is known about peers."""

    most_known: int = 2048  # records, at most 600 B each; a guess
    avoid_for: float = 10.0  # seconds without questions after one was not answered; a guess
    avoid_most: float = 300.0  # seconds; doubled at each failure in a row up to this; a guess
    routing: RoutingParams = field(default_factory=RoutingParams)


@dataclass(slots=True)
class _Known:
    record: Signed[PeerRecord]
    contact: Contact
    dialled: bool = False
    met: bool = False  # it was reached, or the membership has seen it, and it did not fail since
    host: str = ""  # the number at which it was reached, whatever its addresses say
    stranger: bool = True  # it came by itself, and nobody whom we trust has named it
    suspected: bool = False
    lost: bool = False  # its connection broke
    failures: int = 0  # in a row
    avoided_until: float = -math.inf
    gone_at: float = -math.inf  # when its connection broke or it failed, unless it is back

    def is_back(self) -> None:
        """It was reached, or is known to live."""
        self.suspected, self.lost, self.met = False, False, True
        self.failures, self.avoided_until, self.gone_at = 0, -math.inf, -math.inf


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
        old = self._known.pop(peer, None)  # mostly the very same record: every answer names some
        if old is None or (record is not old.record and record.body.order > old.record.body.order):
            known = _Known(record, contact_of(record))
            if old is not None and old.contact == known.contact:
                known.dialled, known.met, known.host = old.dialled, old.met, old.host
                known.stranger, known.suspected = old.stranger, old.suspected
                known.lost = old.lost
                known.failures, known.avoided_until = old.failures, old.avoided_until
                known.gone_at = old.gone_at
        else:
            known = old
        self._known[peer] = known
        self._drop_oldest()

    def named(self, by: PeerId, record: Signed[PeerRecord], now: float) -> None:
        """A peer that was asked named another, which is no stranger then if it is none itself."""
        self.learn(record)
        if self.table.trusts(by, now):
            self.vouch(record.signer, now)

    def vouch(self, peer: PeerId, now: float) -> None:
        """This peer is no stranger. If it was reached already, it may have a place."""
        known = self._known.get(peer)
        if known is not None and known.stranger:
            known.stranger = False
            if known.dialled and (peer not in self.table or not self.table.trusts(peer, now)):
                self.table.insert(peer, now, self.networks(peer))

    def alive(self, record: Signed[PeerRecord]) -> None:
        """The membership has seen this peer: it is worth a question again."""
        self.learn(record)
        known = self._known.get(record.signer)
        if known is not None:
            known.is_back()

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

    def dialled(self, peer: PeerId, now: float, host: str = "") -> Insertion | None:
        """A connection to this peer succeeded that we began. None: its record is not known.

        `host` is the number of the machine that it led to.
        """
        known = self._known.get(peer)
        if known is None:
            return None
        known.dialled, known.host = True, host
        known.is_back()
        return self.table.insert(peer, now, self.networks(peer), stranger=known.stranger)

    def networks(self, peer: PeerId) -> Networks:
        """The networks of the internet in which a known peer is; names count by what they mean."""
        known = self._known.get(peer)
        return frozenset() if known is None else networks_of(known.contact, known.host)

    def was_dialled(self, peer: PeerId) -> bool:
        """Whether it was reached at the addresses of its record."""
        known = self._known.get(peer)
        return known is not None and known.dialled

    def failed(self, peer: PeerId, now: float) -> None:
        """The peer refused or did not answer: out of the table, and avoided for a while."""
        self.table.remove(peer)
        known = self._known.get(peer)
        if known is not None and now >= known.avoided_until:  # of failures at once one counts
            pause = math.ldexp(self._params.avoid_for, min(known.failures, 16))
            known.failures += 1
            known.dialled = known.met = False
            known.gone_at = now
            known.avoided_until = now + min(pause, self._params.avoid_most)

    def met(self) -> list[PeerId]:
        """All that were reached, by this peer or by the membership, and did not fail since."""
        return [peer for peer, known in self._known.items() if known.met]

    def suspect(self, peer: PeerId) -> None:
        """The membership suspects this peer: it is asked after the others."""
        known = self._known.get(peer)
        if known is not None:
            known.suspected = True

    def suspected(self, peer: PeerId) -> bool:
        """Whether the membership suspects this peer."""
        known = self._known.get(peer)
        return known is not None and known.suspected

    def connection(self, peer: PeerId, now: float, *, broke: bool) -> None:
        """A connection to this peer broke, or is there."""
        known = self._known.get(peer)
        if known is not None:
            known.lost, known.gone_at = broke, now if broke else -math.inf

    def gone_since(self, moment: float) -> list[PeerId]:
        """Those whose connection broke, or who failed, no earlier, and who are not back."""
        return [peer for peer, known in self._known.items() if known.gone_at >= moment]

    def doubtful(self, peer: PeerId) -> bool:
        """Whether others should be asked first: it is suspected, or its connection broke."""
        known = self._known.get(peer)
        return known is not None and (known.suspected or known.lost)

    def strays(self, connected: Callable[[PeerId], bool], now: float) -> list[PeerId]:
        """Those that are connected and do not count as there, and may be: they were late once."""
        return [
            peer
            for peer, known in self._known.items()
            if not known.dialled and now >= known.avoided_until and connected(peer)
        ]

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


def networks_of(contact: Contact, reached: str = "") -> Networks:
    """The /24, /48 and names of the internet where a peer says it is; none for a home's network.

    All its addresses count, so that one among false ones does not hide it. Names cost nothing, so
    where a peer was `reached` (by number) they count as that.
    """
    hosts = (address.host for address in contact.addresses)
    return frozenset(filter(None, (_network(host, reached) for host in hosts)))


@functools.lru_cache(NETWORKS)
def _network(host: str, reached: str) -> str:
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:  # a name without a dot is of the home
        if "." not in host:
            return ""
        return _network(reached, "") if reached else host.lower()
    if not ip.is_global:
        return ""
    return str(ipaddress.ip_network((ip, 24 if ip.version == 4 else 48), strict=False))

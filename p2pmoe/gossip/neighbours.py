"""Who is next to whom: eight hash rings over the live members.

A member's neighbours are the next one and the one before on each ring, so that two members agree
about being neighbours, everybody has about sixteen of them, at most, and the graph is an expander:
a rumour needs three steps among 1,000. Who joins or leaves moves one place a ring, wherever it is.
"""

from __future__ import annotations

import functools
import hashlib
import heapq

from p2pmoe.identity import PeerId

RINGS = 8  # K: a rumour's way out and the number of monitors; network of 8 to 16 connections
CIRCLE = 2**64  # places of a ring: eight of 64 bits from one SHA-512
DOMAIN = b"p2pmoe/v1/rings\0"
REMEMBERED = 16_384  # places that are not computed twice; twice the most members


@functools.lru_cache(maxsize=REMEMBERED)
def places(peer: PeerId) -> tuple[int, ...]:
    """Where a peer stands on each ring."""
    digest = hashlib.sha512(DOMAIN + peer.raw).digest()
    return tuple(int.from_bytes(digest[at : at + 8], "big") for at in range(0, 8 * RINGS, 8))


class Rings:
    """The live members as one of them, who is not among them, sees them."""

    def __init__(self, own: PeerId) -> None:
        self._own = places(own)
        self._peers: dict[PeerId, None] = {}  # in the order in which they came
        # Nearest on each ring: eight clockwise, then eight the other way.
        self._nearest: list[tuple[int, PeerId] | None] = [None] * (2 * RINGS)
        self._found: tuple[PeerId, ...] | None = ()

    def __len__(self) -> int:
        return len(self._peers)

    def add(self, peer: PeerId) -> None:
        """A member is live."""
        self._peers[peer] = None
        self._found = None
        for side, gap in enumerate(self._gaps(peer)):
            nearest = self._nearest[side]
            if nearest is None or gap < nearest[0]:
                self._nearest[side] = (gap, peer)

    def discard(self, peer: PeerId) -> None:
        """A member is no longer live."""
        if peer not in self._peers:
            return
        del self._peers[peer]
        self._found = None
        lost = [side for side, found in enumerate(self._nearest) if found and found[1] == peer]
        for side in lost:
            self._nearest[side] = min(
                ((self._gaps(other)[side], other) for other in self._peers), default=None
            )

    def peers(self) -> list[PeerId]:
        """All live members."""
        return list(self._peers)

    def neighbours(self) -> tuple[PeerId, ...]:
        """Between min(8, all) and 16 peers, in an order that depends on the members only."""
        if self._found is None:
            found = dict.fromkeys(near[1] for near in self._nearest if near is not None)
            if len(found) < RINGS:  # few members: the same ones on many rings
                ring = heapq.nsmallest(2 * RINGS, ((self._gaps(p)[0], p) for p in self._peers))
                found |= dict.fromkeys(peer for _, peer in ring)
                found = dict.fromkeys(list(found)[:RINGS])
            self._found = tuple(found)
        return self._found

    def _gaps(self, peer: PeerId) -> list[int]:
        """How far it is to a peer on each ring, clockwise, then the other way."""
        ahead = [(place - own) % CIRCLE for place, own in zip(places(peer), self._own, strict=True)]
        return ahead + [CIRCLE - gap for gap in ahead]

"""The lookup: which peers to ask, in which order, to find those closest to a place.

Kademlia, section 2.3, as a search: `wanted()` says whom to ask now, `told()` and `failed()` say
what came of it, `done` when the k closest that live have all answered. It never asks itself, nor
a peer twice. A question that is slow no longer counts against alpha (it is still heard), so one
silent peer does not hold up the others.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

from p2pmoe.identity import PeerId, distance


@dataclass(frozen=True, slots=True, kw_only=True)
class LookupParams:
    """Width, bounds and patience of a lookup."""

    k: int = 8  # peers that must have answered; as a bucket of the routing table
    alpha: int = 5  # questions on their way; simulated: 2.3 round trips at 1,000 peers, 3: 3.3
    most_asked: int = 64  # peers in one lookup; honest ones need 13 at 10,000; a guess
    most_known: int = 256  # candidates that are remembered, the closest; a guess
    slow_factor: float = 2.5  # median round trips after which a question is slow; simulated
    slow_first: float = 0.5  # seconds, while no round trip is known; a guess
    slow_least: float = 0.02  # seconds; below this a median says nothing; a guess


class Lookup:
    """One search for the peers closest to `target`, begun at `seeds`."""

    def __init__(
        self, target: bytes, own: PeerId, seeds: Iterable[PeerId], params: LookupParams
    ) -> None:
        self._target = target
        self._own = own
        self._params = params
        self._known: set[PeerId] = set()
        self._asked: dict[PeerId, float] = {}  # when; whoever was asked once stays here
        self._flying: set[PeerId] = set()
        self._answered: set[PeerId] = set()
        self._failed: set[PeerId] = set()
        self._round_trips: list[float] = []  # seconds
        self._learn(seeds)

    def wanted(self, now: float) -> list[PeerId]:
        """Whom to ask now: none twice, and at most alpha that are on their way and not slow."""
        slow = self._slow_after()
        quick = sum(1 for peer in self._flying if now < self._asked[peer] + slow)
        chosen = self._fresh()[: max(0, self._params.alpha - quick)]
        for peer in chosen:
            self._asked[peer] = now
            self._flying.add(peer)
        return chosen

    def told(self, peer: PeerId, closer: Iterable[PeerId], now: float) -> None:
        """`peer` answered and named these; no more than k of them are heard."""
        if peer not in self._flying:
            return
        self._flying.remove(peer)
        self._answered.add(peer)
        self._round_trips.append(now - self._asked[peer])
        self._learn(islice(closer, self._params.k))

    def failed(self, peer: PeerId) -> None:
        """`peer` did not answer, or should not be asked. It has no part in this lookup."""
        self._flying.discard(peer)
        if peer not in self._answered:
            self._failed.add(peer)

    @property
    def done(self) -> bool:
        """Whether the k closest that did not fail have answered, or the bound is reached."""
        return not self._fresh() and self._flying.isdisjoint(self.closest(self._params.k))

    def result(self) -> list[PeerId]:
        """Who answered, closest first; at most k."""
        answered = sorted(self._answered, key=self._distance)
        return answered[: self._params.k]

    def closest(self, count: int) -> list[PeerId]:
        """The candidates that did not fail, asked or not, closest first."""
        return sorted(self._known - self._failed, key=self._distance)[:count]

    def next_deadline(self, now: float) -> float:
        """When the next question becomes slow, so that `wanted()` may say more; or infinity."""
        if not self._fresh():
            return math.inf
        slow = self._slow_after()
        due = (self._asked[peer] + slow for peer in self._flying)
        return min((when for when in due if when > now), default=math.inf)

    def _fresh(self) -> list[PeerId]:
        """Whom of the k closest nobody has asked, as far as the bound allows."""
        left = self._params.most_asked - len(self._asked)
        unasked = [peer for peer in self.closest(self._params.k) if peer not in self._asked]
        return unasked[:left]

    def _slow_after(self) -> float:
        if not self._round_trips:
            return self._params.slow_first
        median = statistics.median(self._round_trips)
        return max(self._params.slow_least, self._params.slow_factor * median)

    def _learn(self, peers: Iterable[PeerId]) -> None:
        self._known.update(peers)
        self._known.discard(self._own)
        if len(self._known) > self._params.most_known:
            spare = sorted(self._known - self._asked.keys(), key=self._distance)
            keep = max(0, self._params.most_known - len(self._asked))
            self._known.difference_update(spare[keep:])

    def _distance(self, peer: PeerId) -> int:
        return distance(peer.raw, self._target)

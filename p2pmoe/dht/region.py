"""How many peers there are, and whether somebody has crowded around a key.

Ids are hashes, so the peers closest to a place lie at distances that depend on their number alone:
among n peers the i-th closest is about i/n of the key space away. That gives the number of peers
from any lookup, and shows ids that were ground to lie next to a key: k of them nearer than k of n
honest peers would be in one of a thousand lookups. Such a key is written to and read from a whole
region, in which ten of the honest are expected, instead of the r closest peers.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from p2pmoe.dht.leases import MOST_HOLDERS
from p2pmoe.dht.lookup import LookupParams
from p2pmoe.identity import PeerId, distance

MOST_MEASURES = 32  # lookups, of which the median counts: one liar moves it little; a guess
LEAST_MEASURES = 5  # lookups before there is an estimate; go-libp2p
MEASURE_AGE = 7200.0  # seconds; go-libp2p
EXPECTED = 10  # honest peers in a region: none in one of 20,000 (Poisson)
MOST_IN_REGION = 32  # peers that are written to; 20 ids ground next to a key leave room for 12
GROUND_BELOW = 2.0  # k n-ths: 8 honest peers are nearer once in a thousand (gamma distribution)
WIDE = LookupParams(k=MOST_IN_REGION, alpha=10, paths=2, most_asked=96)  # of a region; a guess
_SPACE = 1 << 256


@dataclass(frozen=True, slots=True)
class _Measure:
    at: float
    peers: float


class NetworkSize:
    """The number of peers, from what lookups found. It keeps the latest measures only.

    A place measured again tells nothing new: a few leases that are renewed would outvote the rest.
    Whoever has met more peers than lookups tell of knows that there are so many at `least`.
    """

    def __init__(self, k: int) -> None:
        self._k = k
        self.least = 0
        self._measures: dict[bytes, _Measure] = {}  # by place, the latest last

    def found(self, target: bytes, closest: Sequence[PeerId], now: float) -> None:
        """A lookup ended: who answered, closest first. Fewer than k tell nothing."""
        if len(closest) >= self._k:
            away = distance(closest[self._k - 1].raw, target)
            self._measures.pop(target, None)
            self._measures[target] = _Measure(now, (self._k - 1 / 3) * _SPACE / max(1, away))
            if len(self._measures) > MOST_MEASURES:
                del self._measures[next(iter(self._measures))]

    def estimate(self, now: float) -> float | None:
        """About how many peers there are; None as long as too few lookups have told."""
        fresh = self._fresh(now)
        return max(statistics.median(fresh), self.least) if len(fresh) >= LEAST_MEASURES else None

    def wanted(self, now: float) -> int:
        """How many lookups, that find k peers, there must be more before there is an estimate."""
        return max(0, LEAST_MEASURES - len(self._fresh(now)))

    def about(self, now: float) -> float:
        """As `estimate`, from as few lookups as there were; 0 when none has found k."""
        fresh = self._fresh(now)
        return statistics.median(fresh) if fresh else 0.0

    def is_crowded(self, target: bytes, closest: Sequence[PeerId], now: float) -> bool:
        """Whether the k closest lie nearer to a place than honest ones would."""
        peers = self.estimate(now)
        if peers is None or len(closest) < self._k or peers < 2 * self._k:
            return False
        away = distance(closest[self._k - 1].raw, target)
        return away * peers < GROUND_BELOW * _SPACE

    def region(self, key: bytes, answered: Iterable[PeerId], now: float) -> list[PeerId]:
        """Who should hold a key that is crowded: all within the region, closest first, bounded."""
        nearest = sorted(answered, key=lambda peer: distance(peer.raw, key))
        peers = self.estimate(now) or 1.0
        within = sum(distance(peer.raw, key) * peers < EXPECTED * _SPACE for peer in nearest)
        return nearest[: min(max(within, MOST_HOLDERS), MOST_IN_REGION)]

    def _fresh(self, now: float) -> list[float]:
        return [each.peers for each in self._measures.values() if each.at + MEASURE_AGE > now]

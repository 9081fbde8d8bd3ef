"""The lookup: which peers to ask, in which order, to find those closest to a place.

Kademlia, section 2.3, as a search: `wanted()` says whom to ask now, `told()` and `failed()` say
what came of it, `done` when the k closest that live have all answered. It never asks itself, nor
a peer twice. A question that is slow no longer counts against alpha (it is still heard), so one
silent peer does not hold up the others.

With several paths (S/Kademlia) each has its own seeds and hears only the answers to its own
questions; a peer is asked by one path alone. So liars that lead one path astray do not lead the
others, and the result is what all of them found.
"""

from __future__ import annotations

import heapq
import math
from bisect import insort
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from p2pmoe.identity import PeerId, distance


@dataclass(frozen=True, slots=True, kw_only=True)
class LookupParams:
    """Width, bounds and patience of a lookup. All but `paths` and times are for each path."""

    k: int = 8  # peers that must have answered; as a bucket of the routing table
    alpha: int = 5  # questions on their way; simulated: 2.3 round trips at 1,000 peers, 3: 3.3
    paths: int = 1  # that share no peer; S/Kademlia: 2 against 30 % liars, 4 against 50 %
    most_asked: int = 64  # peers in one lookup; honest ones need 13 at 10,000; a guess
    most_known: int = 256  # candidates that are remembered, the closest; a guess
    slow_factor: float = 2.5  # median round trips after which a question is slow; simulated
    slow_first: float = 0.5  # seconds, while no round trip is known; a guess
    slow_least: float = 0.02  # seconds; below this a median says nothing; a guess

    def __post_init__(self) -> None:
        """An answer, of which k names are heard, fills a quarter of the candidates at most."""
        if not (self.paths >= 1 and self.alpha >= 1 and 1 <= self.k <= self.most_known // 4):
            raise ValueError("a lookup has a path, asks somebody, and k <= most_known / 4")


@dataclass(frozen=True, slots=True)
class LookupSummary:
    """What a lookup came to. `hops`: how many questions behind each other led to `closest`."""

    closest: tuple[PeerId, ...]  # who answered, closest first; at most k
    answered: int
    failed: int
    messages: int  # questions that were asked
    hops: int
    elapsed: float  # seconds since the first question


class _Path:
    """One path's candidates by distance, and how many hops away each one is."""

    __slots__ = ("asked", "hops", "order")

    def __init__(self) -> None:
        self.order: list[tuple[int, PeerId]] = []
        self.hops: dict[PeerId, int] = {}
        self.asked: set[PeerId] = set()

    def learn(self, peer: PeerId, away: int, hops: int, most: int) -> None:
        if peer in self.hops:
            return
        self.hops[peer] = hops
        insort(self.order, (away, peer))
        if len(self.order) > most:
            places = reversed(range(len(self.order)))
            last = next(at for at in places if self.order[at][1] not in self.asked)
            del self.hops[self.order.pop(last)[1]]


def _nobody(_peer: PeerId) -> bool:
    return False


class Lookup:
    """One search for the peers closest to `target`, begun at `seeds`. Seconds on any clock.

    Whoever is `doubted` is asked after the others.
    """

    def __init__(
        self,
        target: bytes,
        own: PeerId,
        seeds: Iterable[PeerId],
        params: LookupParams,
        doubted: Callable[[PeerId], bool] = _nobody,
    ) -> None:
        self._target, self._own = target, own
        self._params, self._doubted = params, doubted
        self._asked: dict[PeerId, float] = {}  # when; whoever was asked once stays here
        self._taken: dict[PeerId, _Path] = {}  # by which path
        self._flying: set[PeerId] = set()
        self._answered: set[PeerId] = set()
        self._failed: set[PeerId] = set()
        self._round_trips: list[float] = []  # seconds, ascending
        nearest = sorted(set(seeds) - {own}, key=self._distance)
        self._paths = [_Path() for _ in range(min(params.paths, max(1, len(nearest))))]
        for at, seed in enumerate(nearest):
            path = self._paths[at % len(self._paths)]
            path.learn(seed, self._distance(seed), 1, params.most_known)

    def wanted(self, now: float) -> list[PeerId]:
        """Whom to ask now: none twice, and by a path at most alpha that are not slow yet."""
        chosen: list[PeerId] = []
        slow = self._slow_after()
        for path in self._paths:
            flying = self._flying & path.asked
            quick = sum(1 for peer in flying if now < self._asked[peer] + slow)
            for peer in self._fresh(path)[: max(0, self._params.alpha - quick)]:
                self._asked[peer], self._taken[peer] = now, path
                path.asked.add(peer)
                self._flying.add(peer)
                chosen.append(peer)
        return chosen

    def told(self, peer: PeerId, closer: Iterable[PeerId], now: float) -> None:
        """`peer` answered and named these; no more than k of them are heard."""
        if peer not in self._flying:
            return
        self._flying.remove(peer)
        self._answered.add(peer)
        insort(self._round_trips, now - self._asked[peer])
        path = self._taken[peer]
        for named in islice(closer, self._params.k):
            if named != self._own:
                hops = path.hops[peer] + 1
                path.learn(named, self._distance(named), hops, self._params.most_known)

    def failed(self, peer: PeerId) -> None:
        """`peer` did not answer, or should not be asked. It has no part in this lookup."""
        self._flying.discard(peer)
        if peer not in self._answered:
            self._failed.add(peer)

    @property
    def done(self) -> bool:
        """Whether on every path the k closest that did not fail answered, or were too many."""
        return not any(
            self._fresh(path) or not self._flying.isdisjoint(self._front(path))
            for path in self._paths
        )

    def result(self) -> list[PeerId]:
        """Who answered, closest first; at most k."""
        return heapq.nsmallest(self._params.k, self._answered, key=self._distance)

    def summary(self, now: float) -> LookupSummary:
        """What it came to until now."""
        closest = self.result()
        return LookupSummary(
            tuple(closest),
            len(self._answered),
            len(self._failed & self._asked.keys()),
            len(self._asked),
            max((self._taken[peer].hops[peer] for peer in closest), default=0),
            now - min(self._asked.values(), default=now),
        )

    def closest(self, count: int, now: float = -math.inf) -> list[PeerId]:
        """The candidates that did not fail, asked or not, closest first.

        With `now` those that are slow then are left out: their answers may never come.
        """
        slow = self._slow_after()
        late = {peer for peer in self._flying if self._asked[peer] + slow <= now}
        known = {
            peer
            for path in self._paths
            for peer in islice((each for each in self._living(path) if each not in late), count)
        }
        return heapq.nsmallest(count, known, key=self._distance)

    def next_deadline(self, now: float) -> float:
        """When the next question becomes slow, so that the rest may say more; or infinity."""
        slow = self._slow_after()
        due = (self._asked[peer] + slow for peer in self._flying)
        return min((when for when in due if when > now), default=math.inf)

    # ------------------------------------------------------------------------------ of one path
    def _living(self, path: _Path) -> Iterator[PeerId]:
        return (peer for _, peer in path.order if peer not in self._failed)

    def _front(self, path: _Path) -> list[PeerId]:
        """Its k closest that did not fail and belong to no other path."""
        own = (peer for peer in self._living(path) if self._taken.get(peer, path) is path)
        return list(islice(own, self._params.k))

    def _fresh(self, path: _Path) -> list[PeerId]:
        """Whom of these nobody has asked, the doubted ones last, as far as the bound allows."""
        left = self._params.most_asked - len(path.asked)
        unasked = [peer for peer in self._front(path) if peer not in self._asked]
        return sorted(unasked, key=self._doubted)[:left]

    def _slow_after(self) -> float:
        if not self._round_trips:
            return self._params.slow_first
        at = len(self._round_trips) // 2
        middle = self._round_trips[at], self._round_trips[~at]
        return max(self._params.slow_least, self._params.slow_factor * sum(middle) / 2)

    def _distance(self, peer: PeerId) -> int:
        return distance(peer.raw, self._target)

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
from enum import Enum
from itertools import islice

from p2pmoe.identity import PeerId


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
    late_least: float = 0.25  # seconds a read waits for a peer that matters, at least; a guess

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


class _State(Enum):
    FRESH = "nobody asked it"
    FLYING = "asked"
    ANSWERED = "answered"
    FAILED = "did not answer, or should not be asked"


class _Candidate:
    """A peer that was named, and what came of it. It belongs to the path that asked it."""

    __slots__ = ("asked_at", "away", "path", "peer", "state")

    def __init__(self, peer: PeerId, away: int) -> None:
        self.peer, self.away = peer, away
        self.state, self.asked_at = _State.FRESH, 0.0
        self.path: _Path | None = None

    def __lt__(self, other: _Candidate) -> bool:
        return self.away < other.away


class _Path:
    """One path's candidates by distance, and how many hops away each one is."""

    __slots__ = ("asked", "hops", "order")

    def __init__(self) -> None:
        self.order: list[_Candidate] = []
        self.hops: dict[PeerId, int] = {}
        self.asked: list[_Candidate] = []

    def learn(self, candidate: _Candidate, hops: int, most: int) -> None:
        if candidate.peer in self.hops:
            return
        self.hops[candidate.peer] = hops
        insort(self.order, candidate)
        if len(self.order) > most:
            places = reversed(range(len(self.order)))
            last = next(at for at in places if self.order[at].path is not self)
            del self.hops[self.order.pop(last).peer]

    def front(self, count: int) -> Iterator[_Candidate]:
        """Its closest that did not fail and belong to no other path."""
        own = (
            each
            for each in self.order
            if each.state is not _State.FAILED and (each.path is None or each.path is self)
        )
        return islice(own, count)


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
        self._target, self._own = int.from_bytes(target, "big"), own
        self._params, self._doubted = params, doubted
        self._known: dict[PeerId, _Candidate] = {}
        self._round_trips: list[float] = []  # seconds, ascending
        nearest = sorted(map(self._candidate, set(seeds) - {own}))
        self._paths = [_Path() for _ in range(min(params.paths, max(1, len(nearest))))]
        for at, seed in enumerate(nearest):
            self._paths[at % len(self._paths)].learn(seed, 1, params.most_known)

    def wanted(self, now: float, front: int = 0) -> list[PeerId]:
        """Whom to ask now: none twice, and by a path at most alpha that are not slow yet.

        With `front` the closest so many of a path come first: the others are asked only when none
        of those is left to be heard. Where these may be enough, that saves questions.
        """
        chosen: list[PeerId] = []
        slow = self._slow_after()
        for path in self._paths:
            quick = sum(now < each.asked_at + slow for each in self._flying(path))
            fresh = self._fresh(path, front or self._params.k)
            if not fresh and not quick:
                fresh = self._fresh(path, self._params.k)
            for each in fresh[: max(0, self._params.alpha - quick)]:
                each.asked_at, each.path, each.state = now, path, _State.FLYING
                path.asked.append(each)
                chosen.append(each.peer)
        return chosen

    def told(self, peer: PeerId, closer: Iterable[PeerId], now: float) -> None:
        """`peer` answered and named these; no more than k of them are heard."""
        candidate = self._known.get(peer)
        if candidate is None or candidate.state is not _State.FLYING:
            return
        path = candidate.path
        assert path is not None  # it was asked
        candidate.state = _State.ANSWERED
        insort(self._round_trips, now - candidate.asked_at)
        hops = path.hops[peer] + 1
        for named in islice(closer, self._params.k):
            if named != self._own:
                path.learn(self._candidate(named), hops, self._params.most_known)

    def failed(self, peer: PeerId) -> None:
        """`peer` did not answer, or should not be asked. It has no part in this lookup."""
        candidate = self._candidate(peer)
        if candidate.state is not _State.ANSWERED:
            candidate.state = _State.FAILED

    @property
    def done(self) -> bool:
        """Whether on every path the k closest that did not fail answered, or were too many."""
        return self.settled(-math.inf)

    def settled(self, now: float) -> bool:
        """As `done`, but whoever is late now is not waited for: it may be dead."""
        late = max(self._params.late_least, self._slow_after())
        for path in self._paths:
            left = self._params.most_asked - len(path.asked)
            for each in path.front(self._params.k):
                if each.state is _State.FLYING and each.asked_at + late > now:
                    return False
                if each.state is _State.FRESH and left > 0:
                    return False
        return True

    def result(self) -> list[PeerId]:
        """The k closest that answered, nearest first."""
        answered = self._in_state(_State.ANSWERED)
        return [each.peer for each in heapq.nsmallest(self._params.k, answered)]

    def summary(self, now: float) -> LookupSummary:
        """What it came to until now."""
        closest = self.result()
        asked = [each for path in self._paths for each in path.asked]
        hops = [
            each.path.hops[each.peer] for each in map(self._known.__getitem__, closest) if each.path
        ]
        return LookupSummary(
            tuple(closest),
            sum(each.state is _State.ANSWERED for each in asked),
            sum(each.state is _State.FAILED for each in asked),
            len(asked),
            max(hops, default=0),
            now - min((each.asked_at for each in asked), default=now),
        )

    def closest(self, count: int, now: float = -math.inf) -> list[PeerId]:
        """The candidates that did not fail, asked or not, closest first.

        With `now` those that are slow then are left out: their answers may never come.
        """
        slow = self._slow_after()
        known: set[_Candidate] = set()
        for path in self._paths:
            living = (
                each
                for each in path.order
                if each.state is _State.FRESH
                or each.state is _State.ANSWERED
                or (each.state is _State.FLYING and each.asked_at + slow > now)
            )
            known.update(islice(living, count))
        return [each.peer for each in heapq.nsmallest(count, known)]

    def has_converged(self, count: int) -> bool:
        """Whether of several paths each has heard from all of its own `count` closest.

        The one that is quickest to agree may have been led astray.
        """
        return len(self._paths) == 1 or all(
            each.state is _State.ANSWERED for path in self._paths for each in path.front(count)
        )

    def next_deadline(self, now: float) -> float:
        """When the next question becomes slow or late, so that the rest may say more; or inf."""
        slow = self._slow_after()
        late = max(self._params.late_least, slow)
        due = (
            each.asked_at + patience
            for path in self._paths
            for each in self._flying(path)
            for patience in (slow, late)
        )
        return min((when for when in due if when > now), default=math.inf)

    # ------------------------------------------------------------------------------ of one path
    def _candidate(self, peer: PeerId) -> _Candidate:
        """What is known of a peer. It is forgotten with the lookup."""
        found = self._known.get(peer)
        if found is None:
            found = self._known[peer] = _Candidate(peer, peer.number ^ self._target)
        return found

    def _flying(self, path: _Path) -> Iterator[_Candidate]:
        return (each for each in path.asked if each.state is _State.FLYING)

    def _in_state(self, state: _State) -> Iterator[_Candidate]:
        return (each for path in self._paths for each in path.asked if each.state is state)

    def _fresh(self, path: _Path, front: int) -> list[_Candidate]:
        """Whom of these nobody has asked, the doubted ones last, as far as the bound allows."""
        left = self._params.most_asked - len(path.asked)
        unasked = [each for each in path.front(front) if each.state is _State.FRESH]
        return sorted(unasked, key=lambda each: self._doubted(each.peer))[:left]

    def _slow_after(self) -> float:
        if not self._round_trips:
            return self._params.slow_first
        at = len(self._round_trips) // 2
        middle = self._round_trips[at], self._round_trips[~at]
        return max(self._params.slow_least, self._params.slow_factor * sum(middle) / 2)

"""Virtual time and links for cores: thousands of nodes in one thread, without Trio.

Rules: nothing here reads a clock or unseeded chance, so a seed gives one trace, whatever Python's
hash seed is. Actions of one instant run in the order in which they were asked for. What kind of
nodes run on it is the business of `simulated_gossip.py` and `simulated_dht.py`.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Action = Callable[..., None]


class Simulation:
    """A heap of actions in virtual time; seconds since the start in `now`."""

    def __init__(self, seed: int) -> None:
        self.now = 0.0
        self.events = 0
        self._seed = seed
        self._heap: list[tuple[float, int, Action, tuple[Any, ...]]] = []
        self._asked = 0

    def dice(self, name: str) -> random.Random:
        """A stream of chance of its own for everything that has a name."""
        return random.Random(f"{self._seed}/{name}")  # noqa: S311  text seeds go through SHA-512

    def at(self, when: float, action: Action, *arguments: Any) -> None:
        """Run this at a time, or now if that has passed."""
        self._asked += 1
        heapq.heappush(self._heap, (max(when, self.now), self._asked, action, arguments))

    def after(self, delay: float, action: Action, *arguments: Any) -> None:
        """Run this in so many seconds."""
        self.at(self.now + delay, action, *arguments)

    def run(self, until: float = math.inf) -> None:
        """Run all that is due up to `until`, and set the time to it; `inf` runs until at rest."""
        heap = self._heap
        while heap and heap[0][0] <= until:
            self.now, _, action, arguments = heapq.heappop(heap)
            self.events += 1
            action(*arguments)
        if math.isfinite(until):
            self.now = max(self.now, until)


class Latency(Protocol):
    """One-way delays between nodes by their index, seconds."""

    def one_way(self, source: int, target: int, rng: random.Random) -> float:
        """The delay of one message."""


@dataclass(frozen=True, slots=True)
class Constant:
    """Every message takes half of `rtt` seconds."""

    rtt: float

    def one_way(self, source: int, target: int, rng: random.Random) -> float:  # noqa: ARG002  same for all
        """The delay of one message."""
        return self.rtt / 2


@dataclass(frozen=True, slots=True)
class Exponential:
    """Delays without memory, `rtt` seconds there and back in the mean."""

    rtt: float

    def one_way(self, source: int, target: int, rng: random.Random) -> float:  # noqa: ARG002  same for all
        """The delay of one message."""
        return rng.expovariate(2 / self.rtt)


@dataclass(frozen=True, slots=True)
class LogNormal:
    """Delays with a long tail: mean round trip `rtt` s, `sigma` of the logarithm."""

    rtt: float
    sigma: float = 0.5

    def one_way(self, source: int, target: int, rng: random.Random) -> float:  # noqa: ARG002  same for all
        """The delay of one message."""
        return rng.lognormvariate(math.log(self.rtt / 2) - self.sigma**2 / 2, self.sigma)


@dataclass(frozen=True, slots=True)
class Regions:
    """Node `i` lives in region `i % len(matrix)`; `matrix` holds mean round trips, seconds."""

    matrix: Sequence[Sequence[float]]
    sigma: float = 0.1

    def one_way(self, source: int, target: int, rng: random.Random) -> float:
        """The delay of one message."""
        count = len(self.matrix)
        return LogNormal(self.matrix[source % count][target % count], self.sigma).one_way(
            source, target, rng
        )

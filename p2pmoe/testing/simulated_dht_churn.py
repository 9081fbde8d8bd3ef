"""Records of the DHT while peers come and go: are they found, how stale, and how many are lost.

Peers live for a session and fall silent without a word; for each another joins by somebody and
looks for its own place, as a real one does. Publishers stay: they announce their records again
every quarter of a half-life. A read succeeds when it names the record. Ground truth is what the
stores of the living hold.

Sessions: `exponential` of a half-life, or fitted through two published points of the IPFS network
(ProbeLab, "rfm19" and "rfm2": half of the sessions end within 2 h, 80 % within 8 h), as `weibull`
and as `lognormal`, then stretched to the half-life that is asked for.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from p2pmoe.dht.messages import PrefixRecord
from p2pmoe.dht.neighbours import LOOK_AFTER
from p2pmoe.dht.reading import Question, Searched, newest
from p2pmoe.dht.records import RecordParams
from p2pmoe.dht.search import SEARCH_LIMIT
from p2pmoe.testing.simulated_dht import (
    Connections,
    SimulatedPeer,
    World,
    WorldParams,
    sign,
    spread,
)
from p2pmoe.testing.simulated_dht_search import Search, Write, honest, read
from p2pmoe.testing.simulator import Exponential, Latency, Simulation
from p2pmoe.wire.envelope import Kind, Signed

LOOKS = 6  # rounds of looking after one's table in one event: fewer events, the same questions
OF_ONE = 10  # records of one publisher
IPFS_SIGMA = math.log(8 / 2) / statistics.NormalDist().inv_cdf(0.8)  # lognormal: 80 % within 8 h
IPFS_SHAPE = math.log(math.log(5) / math.log(2)) / math.log(8 / 2)  # Weibull through both points
CANDIDATES = 64  # sessions of which one is drawn by its length, for those that are there at first
GRID = bytes(32)

Sessions = Callable[[random.Random], float]  # seconds


def sessions(kind: str, half_life: float) -> Sessions:
    """How long peers stay: `exponential`, `weibull` or `lognormal`, half of them `half_life` s."""
    if kind == "exponential":
        return lambda dice: dice.expovariate(math.log(2) / half_life)
    if kind == "weibull":
        scale = half_life / math.log(2) ** (1 / IPFS_SHAPE)
        return lambda dice: dice.weibullvariate(scale, IPFS_SHAPE)
    if kind == "lognormal":
        return lambda dice: dice.lognormvariate(math.log(half_life), IPFS_SIGMA)
    raise ValueError(f"no sessions are called {kind!r}")


def residual(draw: Sessions, dice: random.Random) -> float:
    """What is left of the session of a peer that is met: long ones are met more often."""
    lengths = [draw(dice) for _ in range(CANDIDATES)]
    return dice.choices(lengths, weights=lengths)[0] * dice.random()


@dataclass(frozen=True, slots=True, kw_only=True)
class ChurnRun:
    """What to measure. Seconds."""

    nodes: int = 300
    half_life: float = 3600.0
    kind: str = "exponential"
    records: int = 200
    gets: int = 100_000
    duration: float = 8 * 3600.0
    latency: Latency = field(default_factory=lambda: Exponential(0.05))
    seed: int = 1

    @property
    def period(self) -> float:
        """Between two announcements of a record."""
        return self.half_life / 4


@dataclass(frozen=True, slots=True)
class ChurnFigures:
    """What came of it."""

    gets: int
    succeeded: float  # share of all gets
    missed: int  # gets that failed although a live peer held the record
    stale: float  # share of those that succeeded with a version before the last but one
    p50_ms: float
    p99_ms: float
    slowest_ms: float
    hops: float  # of a get, the mean
    holdings: int  # records just before they were announced again
    lost: int  # of these, those that no live peer held
    lost_low: float  # share: the 95 % confidence interval
    lost_high: float
    bound: float  # (1 - 2^(-T/h))^5
    joined: int
    messages: int


@dataclass(slots=True)
class _Record:
    publisher: SimulatedPeer
    prefix: str
    key: bytes = b""
    version: int = 0
    settled: int = 0  # the newest version whose announcement has ended


class Churn:
    """One run."""

    def __init__(self, run: ChurnRun) -> None:
        self.run = run
        params = WorldParams(
            latency=run.latency,
            records=RecordParams(prefix_ttl=3 * run.period),
            connections=Connections.POOL,
        )
        self.simulation = Simulation(run.seed)
        self.world = honest(World(self.simulation, params))
        self._dice = self.simulation.dice("churn")
        self._sessions = sessions(run.kind, run.half_life)
        self._alive: list[SimulatedPeer] = []
        self._places: dict[SimulatedPeer, int] = {}  # in that list
        self._records: list[_Record] = []
        self.times: list[float] = []
        self.hops = 0
        self.succeeded = self.missed = self.stale = self.joined = 0
        self.holdings = self.lost = 0

    # ------------------------------------------------------------------------------------ people
    def begin(self) -> None:
        """A swarm that has settled, and its publishers, who are in nobody's table."""
        self.world.populate(self.run.nodes)
        for peer in list(self.world.peers):
            self.world.contacts_of(peer)
        publishers = [self.world.add(listed=False) for _ in range(0, self.run.records, OF_ONE)]
        for publisher in publishers:
            self.world.contacts_of(publisher)
        for number in range(self.run.records):
            self._records.append(_Record(publishers[number // OF_ONE], f"r{number}"))
        self.world.seeded = False
        for peer in self.world.peers[: self.run.nodes]:
            self._enter(peer, residual(self._sessions, self._dice))
        for record in self._records:
            self._announce(record)
            first = self._dice.uniform(0.5, 1.0) * self.run.period  # not while it is being put
            self.simulation.after(first, self._renew, record)
        for publisher in publishers:
            self.keep(publisher)

    def keep(self, peer: SimulatedPeer) -> None:
        """A peer that stays for good looks after its table too."""
        self.simulation.after(self._dice.random() * LOOKS * LOOK_AFTER, self._look_after, peer)

    def _enter(self, peer: SimulatedPeer, stays: float) -> None:
        self._places[peer] = len(self._alive)
        self._alive.append(peer)
        self.simulation.after(stays, self._leave, peer)
        self.simulation.after(self._dice.random() * LOOKS * LOOK_AFTER, self._look_after, peer)

    def _leave(self, peer: SimulatedPeer) -> None:
        at, last = self._places.pop(peer), self._alive.pop()
        if last is not peer:
            self._alive[at] = last
            self._places[last] = at
        self.world.kill(peer)
        newcomer = self.world.add()
        self.joined += 1
        self._join(newcomer)

    def _join(self, peer: SimulatedPeer) -> None:
        """By anybody; by somebody else when that one is gone. It reads once it has joined."""
        via = self._dice.choice(self._alive)
        self.world.contacts_of(peer).learn(via.card)
        self.world.contacts_of(peer).vouch(via.id, self.world.now)

        def greeted(reply: object) -> None:
            if reply is None:
                self._join(peer)
            else:
                stays = self._sessions(self._dice)
                Search(self.world, peer, peer.id.raw, lambda _found: self._enter(peer, stays))

        self.world.ask(peer, via.id, peer.id.raw, greeted)

    def _look_after(self, peer: SimulatedPeer) -> None:
        """Ask silent contacts for a sign of life, and look places up that were left alone."""
        if not peer.alive:
            return
        world, now = self.world, self.world.now
        table = world.contacts_of(peer).table
        for _ in range(LOOKS):
            for other in table.to_check(now):
                table.seen(other, now)  # its turn is over until it has answered, or not
                world.ask(peer, other, peer.id.raw, lambda _: None)
        for place in table.to_refresh(now, self._dice):
            table.looked_up(place, now)
            Search(world, peer, place, lambda _found: None)
        self.simulation.after(LOOKS * LOOK_AFTER, self._look_after, peer)

    # ----------------------------------------------------------------------------------- records
    def _renew(self, record: _Record) -> None:
        self.holdings += 1
        self.lost += not self._is_held(record)
        self._announce(record)
        self.simulation.after(self.run.period, self._renew, record)

    def _announce(self, record: _Record) -> None:
        record.version += 1
        version = record.version
        body = PrefixRecord(
            grid=GRID,
            prefix=record.prefix,
            coordinates=(0,),
            epoch=1,
            incarnation=version,
            ttl_ms=int(3000 * self.run.period),
        )
        record.key = body.key

        def stored(_votes: object, _asked: int) -> None:
            record.settled = max(record.settled, version)

        signed: Signed[PrefixRecord] = sign(record.publisher.id, body, Kind.PREFIX)
        Write(self.world, record.publisher, signed, stored).begin()

    def _is_held(self, record: _Record) -> bool:
        now = self.world.now
        return any(
            peer.store is not None and peer.store.get(record.key, now) for peer in self._alive
        )

    # -------------------------------------------------------------------------------------- gets
    def get(self) -> None:
        """Anybody reads any record."""
        record, reader = self._dice.choice(self._records), self._dice.choice(self._alive)
        began, held, settled = self.world.now, self._is_held(record), record.settled
        question = Question(Kind.PREFIX, record.key)
        read(self.world, reader, question, partial(self._got, record, (began, held, settled)))

    def _got(self, _record: _Record, asked: tuple[float, bool, int], found: Searched) -> None:
        began, held, settled = asked
        self.times.append(self.world.now - began)
        self.hops += found.summary.hops if found.summary else 0
        copies = newest(found.all_copies())
        if copies and self.times[-1] <= SEARCH_LIMIT:
            self.succeeded += 1
            self.stale += copies[0].signed.body.incarnation < settled - 1
        else:
            self.missed += held

    def figures(self) -> ChurnFigures:
        """What came of it until now."""
        run, low_high = self.run, wilson(self.lost, self.holdings)
        return ChurnFigures(
            gets=len(self.times),
            succeeded=self.succeeded / max(1, len(self.times)),
            missed=self.missed,
            stale=self.stale / max(1, self.succeeded),
            p50_ms=spread(self.times, 0.5) * 1000,
            p99_ms=spread(self.times, 0.99) * 1000,
            slowest_ms=max(self.times, default=0.0) * 1000,
            hops=self.hops / max(1, len(self.times)),
            holdings=self.holdings,
            lost=self.lost,
            lost_low=low_high[0],
            lost_high=low_high[1],
            bound=(1 - 2 ** (-run.period / run.half_life)) ** 5,
            joined=self.joined,
            messages=self.world.tally.calls,
        )


def wilson(hits: int, of: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's confidence interval of a share, of 95 %."""
    if not of:
        return 0.0, 1.0
    share, square = hits / of, z * z / of
    middle = (share + square / 2) / (1 + square)
    half = z / (1 + square) * math.sqrt(share * (1 - share) / of + square / (4 * of))
    return max(0.0, middle - half), min(1.0, middle + half)


def measure(run: ChurnRun, progress: Callable[[float], None] = lambda _done: None) -> ChurnFigures:
    """Let the swarm live for `run.duration` and read all the while; the first period settles it."""
    churn = Churn(run)
    churn.begin()
    settles = run.period
    churn.simulation.run(settles)
    for number in range(run.gets):
        churn.simulation.run(settles + run.duration * number / run.gets)
        churn.get()
        if number % 100 == 0:
            progress(number / run.gets)
    churn.simulation.run(settles + run.duration + 2 * SEARCH_LIMIT)
    return churn.figures()

"""The search for the best experts of a large grid, in a simulated swarm that has settled.

Each cell's lease and each server's dictionaries lie at the live peers closest to their keys. A
search begins without any knowledge of the grid but its size, and ends with the best `width` cells
by the row's scores. It is what `moe/search.py` does for one row: the same beam, read by read.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from p2pmoe.dht.contacts import ContactParams
from p2pmoe.dht.leases import most_named
from p2pmoe.dht.messages import Lease, PrefixRecord, key_of
from p2pmoe.dht.reading import Question, Searched, newest
from p2pmoe.dht.records import AskFirst, Others, RecordParams
from p2pmoe.dht.search import SearchParams
from p2pmoe.moe.beam import BeamParams, BeamSearch, Place, guesses
from p2pmoe.testing.simulated_dht import (
    Connections,
    SimulatedPeer,
    World,
    WorldParams,
    sign,
    spread,
)
from p2pmoe.testing.simulated_dht_search import honest, read
from p2pmoe.testing.simulator import Exponential, Latency, Simulation
from p2pmoe.wire.envelope import Kind, Signed

GRID, NAME = bytes(32), "ffn"
FOR_EVER = 1e6  # seconds: a settled swarm's records are always fresh
PAUSE = 20.0  # seconds between two searches, so that none meets the other's stragglers


class ExpertSearch:
    """What one peer knows of a grid, and the search that adds to it."""

    def __init__(self, world: World, peer: SimulatedPeer) -> None:
        self._world, self._peer = world, peer
        self._known: dict[Place, list[int] | None] = {}  # what follows; None: a vacant cell
        self.reads: list[Searched] = []

    def find(
        self, scores: Sequence[Sequence[float]], params: BeamParams, then: Callable[[Any], None]
    ) -> None:
        """The best cells by these scores, one list a dimension; `then` gets them, best first."""
        self._depth, self._then = len(scores), then
        self._beam = BeamSearch(scores, params)
        fresh = () in self._known
        self._round([] if fresh else guesses(scores, params.width))

    def _round(self, guessed: Sequence[Place] = ()) -> None:
        while not self._beam.done:
            self._places = self._beam.wanted()
            unknown = [p for p in (*self._places, *guessed) if p not in self._known]
            guessed, self._left = (), len(unknown)
            for place in unknown:
                kind = Kind.LEASE if len(place) == self._depth else Kind.PREFIX
                question = Question(kind, key_of(kind, GRID, _name(place)))
                read(self._world, self._peer, question, partial(self._found, place))
            if unknown:
                return
            self._tell()
        self._then(self._beam.result())

    def _found(self, place: Place, found: Searched) -> None:
        self.reads.append(found)
        if len(place) == self._depth:
            self._known[place] = [] if most_named(found.copies()) else None
        else:
            bodies = [copy.signed.body for copy in newest(found.all_copies())]
            self._known[place] = sorted({each for body in bodies for each in body.coordinates})
        self._left -= 1
        if not self._left:
            self._tell()
            self._round()

    def _tell(self) -> None:
        for place in self._places:
            known = self._known[place]
            if known is None:
                self._beam.failed(place)
            else:
                self._beam.told(place, known)


def _name(place: Place) -> str:
    return ".".join([NAME, *map(str, place)])


# ----------------------------------------------------------------------------- a settled swarm
@dataclass(frozen=True, slots=True, kw_only=True)
class SearchRun:
    """What to measure. `dead`: the share of all table entries that never answer."""

    nodes: int
    experts: int = 4096
    latency: Latency = field(default_factory=lambda: Exponential(0.05))
    dead: float = 0.0
    adversaries: float = 0.0
    connections: Connections = Connections.UP
    search: SearchParams = field(default_factory=SearchParams)
    contacts: ContactParams = field(default_factory=ContactParams)
    searches: int = 100
    width: int = 4
    seed: int = 1


def settled(run: SearchRun) -> World:
    """A swarm of so many peers that know one another, some of them dead, and nothing stored."""
    for_ever = RecordParams(lease_ttl=FOR_EVER, prefix_ttl=FOR_EVER, leases_per_grid=run.experts)
    params = WorldParams(
        latency=run.latency,
        contacts=run.contacts,
        records=for_ever,
        search=run.search,
        connections=run.connections,
    )
    world = honest(World(Simulation(run.seed), params))
    world.populate(run.nodes)
    silent = world.simulation.dice("dead").sample(world.peers, round(run.dead * run.nodes))
    for peer in silent:
        peer.alive = False
    return world


def side_of(experts: int) -> int:
    """How long a side of a square grid of so many cells is."""
    return max(1, math.isqrt(experts))


def serve(world: World, experts: int) -> None:
    """Every cell of a square grid has a server, each live peer at most one share more."""
    side = side_of(experts)
    alive = [peer for peer in world.peers if peer.alive and peer.answers is None]
    servers = world.simulation.dice("servers").sample(alive, min(len(alive), side * side))
    cells: dict[int, list[Place]] = {}
    for at, cell in enumerate(itertools.product(range(side), repeat=2)):
        cells.setdefault(at % len(servers), []).append(cell)
    for at, own in cells.items():
        for record in _records(servers[at], own):
            place(world, record)


def _records(server: SimulatedPeer, cells: Sequence[Place]) -> list[Signed[Any]]:
    below: dict[Place, set[int]] = {}
    records: list[Signed[Any]] = []
    ttl_ms = int(FOR_EVER * 1000)
    for cell in cells:
        for length, coordinate in enumerate(cell):
            below.setdefault(cell[:length], set()).add(coordinate)
        epoch, version = server.version()
        lease = Lease(
            grid=GRID, uid=_name(cell), number=1, epoch=epoch, incarnation=version, ttl_ms=ttl_ms
        )
        records.append(sign(server.id, lease, Kind.LEASE))
    for prefix, coordinates in below.items():
        epoch, version = server.version()
        body = PrefixRecord(
            grid=GRID,
            prefix=_name(prefix),
            coordinates=tuple(sorted(coordinates)),
            epoch=epoch,
            incarnation=version,
            ttl_ms=ttl_ms,
        )
        records.append(sign(server.id, body, Kind.PREFIX))
    return records


def place(world: World, record: Signed[Any], count: int = 5) -> None:
    """Lay a record where it belongs, as if its publisher had put it there."""
    for holder in world.closest(record.body.key, count):
        if holder.answers is None:
            store = world.store_of(holder)
            outcome = store.put(record, world.now)
            if isinstance(outcome, AskFirst):
                store.decide(record, Others(answered=count - 1), world.now)


# ---------------------------------------------------------------------------------- measuring
@dataclass(frozen=True, slots=True)
class SearchFigures:
    """What searches cost. Times in milliseconds, `mean` with its standard deviation."""

    nodes: int
    searches: int
    mean_ms: float
    sd_ms: float
    p50_ms: float
    p99_ms: float
    read_ms: float  # the median of one read; a search has three in a row, or guesses them at once
    hops: float  # of one read
    messages: float  # calls that one search makes
    all_messages: float  # with those that follow from it: dials back, refills, repairs
    dials: float  # with those of peers that were dialled and dial back, once
    kilobytes: float
    found: float  # share of the experts sought that were found
    lookups_when_fresh: int  # reads of the same search asked again at once


def measure(
    run: SearchRun, progress: Callable[[float], None] = lambda _done: None
) -> SearchFigures:
    """Search for the best experts, one search after another, each from another peer."""
    world = settled(run)
    serve(world, run.experts)
    dice = world.simulation.dice("searches")
    alive = [peer for peer in world.peers if peer.alive]
    times: list[float] = []
    found: list[int] = []
    reads: list[Searched] = []
    again = 0
    for at in range(run.searches):
        peer = dice.choice(alive)
        if run.connections is Connections.COLD:
            world.chill(peer)
        search = ExpertSearch(world, peer)
        scores = _scores(dice, side_of(run.experts))
        began = world.now

        def then(cells: list[Place], began: float = began) -> None:
            times.append((world.now - began) * 1000)
            found.append(len(cells))

        search.find(scores, BeamParams(width=run.width), then)
        world.simulation.run(world.now + PAUSE)
        reads += search.reads
        before = len(search.reads)
        search.find(scores, BeamParams(width=run.width), lambda _cells: None)
        again += len(search.reads) - before
        progress((at + 1) / run.searches)
    tally = world.tally
    return SearchFigures(
        nodes=run.nodes,
        searches=run.searches,
        mean_ms=statistics.fmean(times),
        sd_ms=statistics.pstdev(times),
        p50_ms=spread(times, 0.5),
        p99_ms=spread(times, 0.99),
        read_ms=spread([each.summary.elapsed * 1000 for each in reads if each.summary], 0.5),
        hops=statistics.fmean(each.summary.hops for each in reads if each.summary),
        messages=sum(each.summary.messages for each in reads if each.summary) / run.searches,
        all_messages=tally.calls / run.searches,
        dials=tally.dials / run.searches,
        kilobytes=tally.bytes / 1000 / run.searches,
        found=sum(found) / (run.width * run.searches),
        lookups_when_fresh=again,
    )


def _scores(dice: random.Random, side: int) -> list[list[float]]:
    return [[dice.gauss(0.0, 1.0) for _ in range(side)] for _ in range(2)]

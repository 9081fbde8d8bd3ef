"""Attacks on a simulated swarm: liars, ground ids, crowds at the door, and floods.

Liars answer every question with the closest of their own kind, hold nothing, and say of every
record that they stored it; some are silent instead, or poison what is read with a dictionary of
their own. Ground ids are liars whose ids lie closer to a key than anybody else's.
A crowd opens connections from fresh ids that answer when they are dialled back. A flood is one
publisher that offers records without end.
"""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from p2pmoe.dht.leases import RecordCopy, Vote
from p2pmoe.dht.lookup import LookupParams
from p2pmoe.dht.messages import Lease, PrefixRecord
from p2pmoe.dht.reading import Answer, Question, Searched
from p2pmoe.dht.records import AskFirst, Others, RecordParams, RecordStore, Stored
from p2pmoe.dht.search import SearchParams
from p2pmoe.identity import PeerId
from p2pmoe.testing.simulated_dht import Asked, Reply, SimulatedPeer, World, WorldParams, sign
from p2pmoe.testing.simulated_dht_search import Search, Write, honest, read
from p2pmoe.testing.simulator import Exponential, Simulation
from p2pmoe.wire.envelope import Kind, Signed

GRID = bytes(32)
WARM_UP = 6  # lookups by which a peer has an idea of how many there are
FOR_EVER_MS = 10**9


class Liars:
    """Peers of one mind."""

    def __init__(self, world: World, kind: str = "lie") -> None:
        self._world, self._kind = world, kind
        self._k = world.params.search.lookup.k
        self.numbers: list[int] = []
        self.prefix = ""  # what is read, for those that poison it

    def turn(self, peer: SimulatedPeer) -> None:
        """From now on it is one of them."""
        self.numbers.append(peer.id.number)
        peer.answers = partial(self.answer, peer)

    def answer(self, liar: SimulatedPeer, _asker: SimulatedPeer, asked: Asked) -> Reply | None:
        """The closest of their own, as if there were nobody and nothing else."""
        if self._kind == "silent":
            return None
        if not isinstance(asked, bytes | Question):
            return Vote("stored")
        target = int.from_bytes(asked if isinstance(asked, bytes) else asked.key, "big")
        nearest = sorted(self.numbers, key=lambda number: number ^ target)[: self._k]
        closest = tuple(PeerId(number.to_bytes(32, "big")) for number in nearest)
        if self._kind != "poison" or isinstance(asked, bytes):
            return Answer(closest)
        poison = _record(liar, self.prefix)
        return Answer(closest, (RecordCopy(poison, self._world.now + FOR_EVER_MS),))


@dataclass(frozen=True, slots=True, kw_only=True)
class LiarsRun:
    """What to measure: `gets` reads, each of another key and by another honest peer."""

    nodes: int = 1000
    liars: float = 0.3
    paths: int = 2
    ground: int = 0  # ids next to each key
    kind: str = "lie"  # or "silent", or "poison"
    gets: int = 200
    seed: int = 1


@dataclass(frozen=True, slots=True)
class LiarsFigures:
    """Shares of all gets."""

    gets: int
    succeeded: float  # named the record
    held: float  # some honest peer held it
    messages: float  # calls of one get


def measure_liars(
    run: LiarsRun, progress: Callable[[float], None] = lambda _done: None
) -> LiarsFigures:
    """Write a record by its honest publisher, then read it by another honest peer."""
    search = SearchParams(lookup=LookupParams(paths=min(run.paths, 2)), hostile=run.paths > 2)
    params = WorldParams(
        latency=Exponential(0.05), search=search, records=RecordParams(prefix_ttl=1e6)
    )
    world = honest(World(Simulation(run.seed), params))
    world.populate(run.nodes)
    liars, dice = Liars(world, run.kind), world.simulation.dice("liars")
    for peer in dice.sample(world.peers, round(run.liars * run.nodes)):
        liars.turn(peer)
    good = [peer for peer in world.peers if peer.answers is None]
    succeeded = held = messages = 0
    for number in range(run.gets):
        publisher, reader = dice.sample(good, 2)
        liars.prefix = f"r{number}"
        record = _record(publisher, liars.prefix)
        for at in range(run.ground):
            liars.turn(world.add(int.from_bytes(record.body.key, "big") ^ (at + 1)))
        if run.ground:
            for peer in (publisher, reader):
                _learn_the_size(world, peer, dice)
        found = _put_and_get(world, publisher, reader, record)
        succeeded += any(copy.signed.signer == publisher.id for copy in found.all_copies())
        messages += found.summary.messages if found.summary else 0
        held += any(peer.store and peer.store.get(record.body.key, world.now) for peer in good)
        progress((number + 1) / run.gets)
    return LiarsFigures(run.gets, succeeded / run.gets, held / run.gets, messages / run.gets)


def _record(publisher: SimulatedPeer, prefix: str) -> Signed[PrefixRecord]:
    epoch, version = publisher.version()
    body = PrefixRecord(
        grid=GRID,
        prefix=prefix,
        coordinates=(0,),
        epoch=epoch,
        incarnation=version,
        ttl_ms=FOR_EVER_MS,
    )
    return sign(publisher.id, body, Kind.PREFIX)


def _learn_the_size(world: World, peer: SimulatedPeer, dice: random.Random) -> None:
    """Lookups such as those that refresh a table."""
    for _ in range(WARM_UP):
        Search(world, peer, dice.randbytes(32), lambda _found: None)
    world.simulation.run(world.now + 15.0)


def _put_and_get(
    world: World, publisher: SimulatedPeer, reader: SimulatedPeer, record: Signed[Any]
) -> Searched:
    Write(world, publisher, record).begin()
    world.simulation.run(world.now + 15.0)
    results: list[Searched] = []
    read(world, reader, Question(Kind.PREFIX, record.body.key), results.append)
    world.simulation.run(world.now + 15.0)
    return results[0]


def measure_ground_ids(run: LiarsRun, keys: int) -> LiarsFigures:
    """Each key in a swarm of its own: ids that were ground for one key are strangers to others."""
    each = [
        measure_liars(replace(run, gets=1, liars=0.0, seed=run.seed + number))
        for number in range(keys)
    ]
    return LiarsFigures(
        keys,
        sum(one.succeeded for one in each) / keys,
        sum(one.held for one in each) / keys,
        sum(one.messages for one in each) / keys,
    )


# ----------------------------------------------------------------------- a crowd at the door
@dataclass(frozen=True, slots=True)
class CrowdFigures:
    """What a routing table is made of after the attack."""

    honest_before: int
    honest_after: int
    strangers: int

    @property
    def honest(self) -> float:
        """The share of entries that are honest."""
        return self.honest_after / (self.honest_after + self.strangers)


def measure_crowd(nodes: int, connections: int, networks: int, seed: int) -> CrowdFigures:
    """Fresh ids from so many networks of the attacker connect, and answer when dialled back.

    They name one another, too, to the victim's lookups, by which it refreshes its table.
    """
    world = honest(World(Simulation(seed), WorldParams(latency=Exponential(0.05))))
    world.populate(nodes)
    victim, crowd = world.peers[0], Liars(world)
    contacts, dice = world.contacts_of(victim), world.simulation.dice("crowd")
    _learn_the_size(world, victim, dice)
    good = {peer for peer in contacts.table.peers() if world.by_id[peer].answers is None}
    for number in range(connections):
        world.simulation.run(world.now + 0.1)
        for peer in contacts.table.to_check(world.now):
            contacts.table.seen(peer, world.now)
        for place in contacts.table.to_refresh(world.now, dice):
            contacts.table.looked_up(place, world.now)
            Search(world, victim, place, lambda _found: None)
        network = number % networks
        host = f"9.{network >> 8}.{network & 255}.{dice.randrange(1, 255)}"
        stranger = world.add(host=host, listed=False)
        crowd.turn(stranger)
        contacts.learn(stranger.card)
        contacts.dialled(stranger.id, world.now)
    after = set(contacts.table.peers())
    strangers = sum(world.by_id[peer].answers is not None for peer in after)
    return CrowdFigures(len(good), len(good & after), strangers)


# ---------------------------------------------------------------------------------- a flood
@dataclass(frozen=True, slots=True)
class FloodFigures:
    """What a holder has after one publisher offered `offered` uids."""

    offered: int
    stored: int
    grown: int  # bytes of memory
    others: float  # share of what other publishers put during the flood that was taken


def measure_flood(offers: int, others: int, seed: int) -> FloodFigures:
    """One publisher without end, and after each hundredth of it others with a lease each."""
    dice = random.Random(seed)  # noqa: S311  a seed gives one trace
    store = RecordStore(RecordParams(), started_at=0.0)
    flooder = PeerId(dice.randbytes(32))
    stored, taken, every = 0, 0, max(1, offers // others)
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for number in range(offers):
        now = number * 0.001
        stored += isinstance(_offer(store, flooder, number, now), Stored)
        if number % every == 0:
            taken += isinstance(_offer(store, PeerId(dice.randbytes(32)), number, now), Stored)
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    tries = len(range(0, offers, every))
    return FloodFigures(offers, stored, after - before, taken / tries)


def _offer(store: RecordStore, publisher: PeerId, number: int, now: float) -> object:
    """A lease of a cell of its own grid, or a dictionary."""
    first, second = divmod(number // 2, 65_536)
    grid, name = publisher.raw, f"ffn.{first}.{second}"
    if number % 2:
        body = PrefixRecord(
            grid=grid, prefix=name, coordinates=(0,), epoch=1, incarnation=1, ttl_ms=60_000
        )
        return store.put(sign(publisher, body, Kind.PREFIX), now)
    claim = Lease(grid=grid, uid=name, number=1, epoch=1, incarnation=1, ttl_ms=30_000)
    lease = sign(publisher, claim, Kind.LEASE)
    outcome: object = store.put(lease, now)
    if isinstance(outcome, AskFirst):
        outcome = store.decide(lease, Others(answered=4), now)
    return outcome

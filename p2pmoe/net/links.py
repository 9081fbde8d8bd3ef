"""All that the pool holds of one peer: its connections, the dials under way, and its back-off.

Of two control connections one is too many. Dials that crossed are told by their age and by who
dialled: the one that the lower peer id dialled stays, which both sides see alike. Otherwise the
newer one stays: a peer dials only when it has lost the older. Connections of an earlier run of the
peer, as its records tell, are dead.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import trio

from p2pmoe.errors import ConnectionLost, P2PMoEError
from p2pmoe.identity import PeerId
from p2pmoe.net.backoff import Backoff, BackoffParams
from p2pmoe.net.connection import Connection
from p2pmoe.wire.address import Address

CROSSING = 10.0  # seconds between two connections whose dials may have crossed; a dial's limits


@dataclass(eq=False, slots=True)
class Dial:
    """A dial that several calls may wait for."""

    addresses: tuple[Address, ...]
    expect: PeerId | None
    bulk: bool
    done: trio.Event = field(default_factory=trio.Event)
    connection: Connection | None = None
    error: P2PMoEError | None = None

    def end(self, outcome: Connection | P2PMoEError) -> None:
        """Tell those that wait; the first outcome holds."""
        if self.done.is_set():
            return
        if isinstance(outcome, Connection):
            self.connection = outcome
        else:
            self.error = outcome
        self.done.set()

    async def wait(self) -> Connection:
        """The connection, or the error of the dial."""
        await self.done.wait()
        if self.error is not None:
            raise copy.copy(self.error)  # each waiting call gets its own
        assert self.connection is not None
        return self.connection


class Dials:
    """The dials under way, and whom they want where."""

    def __init__(self) -> None:
        self._all: set[Dial] = set()
        self._aims: dict[_Aim, Dial] = {}

    def __iter__(self) -> Iterator[Dial]:
        return iter(self._all)

    def add(self, dial: Dial) -> None:
        """It has been ordered."""
        self._all.add(dial)
        self._aims[_aim(dial)] = dial

    def remove(self, dial: Dial) -> None:
        """It has come to an end."""
        self._all.discard(dial)
        if self._aims.get(_aim(dial)) is dial:
            del self._aims[_aim(dial)]

    def like(self, dial: Dial) -> Dial | None:
        """The one with the same aim, if it can be waited for."""
        under_way = self._aims.get(_aim(dial))
        return None if under_way is None or under_way.done.is_set() else under_way


_Aim = tuple[bool, str, tuple[tuple[str, int], ...]]


def _aim(dial: Dial) -> _Aim:
    """Who is wanted where: an id, or as much of it as the one address tells."""
    wanted = dial.expect.hex if dial.expect else "".join(a.peer_prefix for a in dial.addresses)
    return dial.bulk, wanted, tuple((each.host, each.port) for each in dial.addresses)


def _epoch(connection: Connection) -> int:
    """When the peer's process began, as its record says; 0 where it has none."""
    record = connection.greeted.record
    return record.body.epoch if record is not None else 0


class Links:
    """One peer's, as seen by the peer `own`."""

    def __init__(self, own: PeerId, backoff: BackoffParams) -> None:
        self._own = own
        self.connections: list[Connection] = []
        self.dials: dict[bool, Dial] = {}  # by whether for a bulk connection
        self.backoff = Backoff(backoff)
        self.connected = False  # whether there was a connection since the peer was last lost
        self.may_grow = True  # whether one more connection is worth a dial

    @property
    def empty(self) -> bool:
        """Whether nothing is open or under way."""
        return not (self.connections or self.dials)

    def open(self, *, bulk: bool) -> list[Connection]:
        """The connections of a class on which calls can begin."""
        return [each for each in self.connections if each.bulk == bulk and each.open]

    def best(self, *, bulk: bool) -> Connection | None:
        """The connection with least to do."""
        found = self.open(bulk=bulk)
        if len(found) < 2:
            return found[0] if found else None
        return min(found, key=lambda each: (each.unsent_bytes, each.calls[0]))

    def add(self, connection: Connection) -> None:
        """Another connection was greeted: the peer is there, whoever dialled."""
        self.backoff.clear()
        self.may_grow = True
        for each in self.connections:
            if 0 < _epoch(each) < _epoch(connection):
                each.drop(ConnectionLost("the peer was restarted"))
        self.connections.append(connection)
        self.connected = True
        if (dial := self.dials.get(connection.bulk)) is not None:
            dial.end(connection)  # it goes on, but nobody needs to wait for it

    def remove(self, connection: Connection) -> None:
        """A connection has ended."""
        self.may_grow = True
        self.connections.remove(connection)

    def waiting(self, *, bulk: bool) -> Dial | None:
        """The dial under way that a call can wait for."""
        dial = self.dials.get(bulk)
        return None if dial is None or dial.done.is_set() else dial

    def lost(self) -> bool:
        """Whether the peer is gone since the last time: nothing is open or under way."""
        lost = self.connected and self.empty
        self.connected = self.connected and not lost
        return lost

    def failed(self, now: float, rng: random.Random) -> None:
        """A dial failed: leave the peer alone for a while, or be content with what there is."""
        if self.connections:
            self.may_grow = False
        else:
            self.backoff.failed(now, rng)

    def surplus(self) -> Iterator[Connection]:
        """The control connections to say goodbye on."""
        kept: Connection | None = None
        for each in self.open(bulk=False):
            if kept is None:
                kept = each
            elif self._stays(kept, each):
                yield each
            else:
                yield kept
                kept = each

    def _stays(self, older: Connection, newer: Connection) -> bool:
        """Whether the older of two control connections is the one to keep."""
        crossed = newer.opened_at - older.opened_at < CROSSING
        if not crossed or older.outbound == newer.outbound:
            return False
        return older.outbound == (self._own < older.peer)


def unused(connections: Iterable[Connection], idle: float, most: int) -> list[Connection]:
    """Those not used for `idle` seconds, and as many control connections as are beyond `most`.

    Of these the ones that were used least lately.
    """
    every, longest = list(connections), trio.current_time() - idle
    surplus = sum(not each.bulk for each in every) - most
    waiting = [each for each in every if each.open and not any(each.calls)]
    chosen: list[Connection] = []
    for connection in sorted(waiting, key=lambda each: each.last_used):
        if connection.last_used <= longest or (surplus > 0 and not connection.bulk):
            surplus -= not connection.bulk
            chosen.append(connection)
    return chosen

"""What lies between simulated peers: datagrams that get lost, or streams where loss is delay.

A stream behaves as TCP does to a program: messages of one direction arrive in order, a lost segment
comes one retransmission timeout later (doubling), whatever is sent waits behind it; a connection
costs a dial, ends when the other process dies, and breaks when nothing was acknowledged for
`USER_TIMEOUT`. A process that is gone answers dials with a refusal, a silent host with nothing;
after a failed dial the pool's own backoff drops what is sent until the next one may begin.
Datagrams are lost, doubled and overtaken, and know no connections: every dial succeeds at once.

Rules: peers are numbers; `bytes` counts what senders hand to their sockets, dials included; chance
comes from the simulation's dice alone.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from p2pmoe.net.backoff import Backoff, BackoffParams
from p2pmoe.testing.simulator import Latency, Simulation

RTO = 0.2  # seconds over a round trip, the least until Linux sends a segment again
SYN_RTO = 1.0  # seconds, for the first packet of a connection; RFC 6298, section 2.1
USER_TIMEOUT = 5.0  # seconds without an acknowledgement; TCP_USER_TIMEOUT of control connections
DIAL_LIMIT = 5.0  # seconds for a connection, and as many for TLS and HELLO
DIAL_BYTES = 2600  # a TLS 1.3 handshake with both certificates and HELLOs, both ways; measured
WAITING = 64  # messages that wait for one connection; then the oldest are dropped, as in the shell


class End(Protocol):
    """A peer as the network sees it."""

    def arrived(self, source: int, message: Any) -> None:
        """A message came in."""

    def connected(self, peer: int) -> None:
        """A connection is up."""

    def unreachable(self, peer: int, *, refused: bool) -> None:
        """A connection broke, or a dial failed."""


class Host(enum.Enum):
    """What answers where a peer lives."""

    UP = "up"  # the process
    FROZEN = "frozen"  # its kernel alone: connections are accepted, nothing is read
    REFUSING = "refusing"  # its kernel, without the process
    SILENT = "silent"  # nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkParams:
    """How well messages travel. Shares are between 0 and 1."""

    latency: Latency
    stream: bool = True
    loss: float = 0.0  # of packets, each way
    duplicate: float = 0.0  # of datagrams
    reorder: float = 0.0  # of datagrams, which take three times as long


@dataclass(slots=True)
class Tally:
    """What everybody sent."""

    messages: int = 0
    dials: int = 0
    bytes: int = 0


@dataclass(slots=True, eq=False)
class Connection:
    """Between a dialler and another peer."""

    dialler: int
    peer: int
    up: bool = False
    closed: bool = False
    free_at: dict[int, float] = field(default_factory=dict)  # by sender: no later message is before
    held: dict[int, list[tuple[Any, int]]] = field(default_factory=dict)  # by sender
    overdue: set[int] = field(default_factory=set)  # senders that wait for acknowledgements
    asked: set[int] = field(default_factory=set)  # who wants to know how the dial ends

    def other(self, end: int) -> int:
        """Whom this end is connected to."""
        return self.peer if end == self.dialler else self.dialler


class Links:
    """All ways between so many peers; `ends` has them by number and may be filled later."""

    def __init__(self, simulation: Simulation, params: LinkParams, ends: Sequence[End]) -> None:
        self.params, self.tally = params, Tally()
        self._simulation, self._ends = simulation, ends
        self._dice = simulation.dice("links")
        self._hosts: dict[int, Host] = {}  # those that are not up
        self._blocked: set[tuple[int, int]] = set()
        self._sides: dict[int, int] = {}  # of a partition; who has none is on side 0
        self._connections: dict[int, dict[int, Connection]] = {}
        self._backoffs: dict[tuple[int, int], Backoff] = {}  # of dialler and peer
        self._refused: set[tuple[int, int]] = set()  # those of them where a dial was refused last
        self._backoff = BackoffParams()

    # ---------------------------------------------------------------------------------- weather
    def block(self, source: int, target: int) -> None:
        """From now on nothing gets from the one to the other; the way back stays."""
        self._blocked.add((source, target))

    def split(self, sides: Sequence[Sequence[int]]) -> None:
        """From now on nothing passes between the sides."""
        self._sides = {peer: number for number, side in enumerate(sides) for peer in side}

    def heal(self) -> None:
        """No blocks, no sides."""
        self._blocked.clear()
        self._sides.clear()

    def set_host(self, peer: int, host: Host) -> None:
        """The process stops, goes on, dies or starts anew, or its host falls silent."""
        before = self._hosts.pop(peer, Host.UP)
        if host is not Host.UP:
            self._hosts[peer] = host
        gone = {Host.REFUSING, Host.SILENT}
        if host is Host.REFUSING or (before in gone and host not in gone):
            for connection in [*self._connections.pop(peer, {}).values()]:
                self._reset(connection, peer)

    def clear(self, source: int, target: int) -> bool:
        """Whether packets get from the one to the other now."""
        if self._hosts and Host.SILENT in (self._hosts.get(source), self._hosts.get(target)):
            return False
        if self._sides and self._sides.get(source, 0) != self._sides.get(target, 0):
            return False
        return (source, target) not in self._blocked

    def is_connected(self, peer: int, other: int) -> bool:
        """Whether there is a connection that this peer believes in."""
        connection = self._connections.get(peer, {}).get(other)
        return connection is not None and connection.up

    # ------------------------------------------------------------------------------------ sends
    def send(self, source: int, target: int, message: Any, size: int) -> None:
        """Send `size` bytes. A stream drops them without a connection, and waits for a dial."""
        if not self.params.stream:
            self._send_datagram(source, target, message, size)
            return
        connection = self._connections.get(source, {}).get(target)
        if connection is None:
            return
        if connection.up and source not in connection.held:
            self._transmit(connection, source, message, size)
        else:
            waiting = connection.held.setdefault(source, [])
            waiting.append((message, size))
            del waiting[:-WAITING]

    def dial(self, source: int, target: int) -> None:
        """Make a connection unless there is one. The dialler is told in any case how it ends."""
        connection = self._connections.get(source, {}).get(target)
        if not self.params.stream or (connection is not None and connection.up):
            self._simulation.after(0.0, self._ends[source].connected, target)
        elif connection is not None:
            connection.asked.add(source)
        elif self.backoff(source, target):
            refused = (source, target) in self._refused
            self._simulation.after(0.0, self._lose, source, target, refused)
        else:
            self._dial(source, target)

    def backoff(self, source: int, target: int) -> float:
        """Seconds until the next dial may begin, 0 when it may."""
        backoff = self._backoffs.get((source, target))
        return backoff.wait(self._simulation.now) if backoff else 0.0

    def _send_datagram(self, source: int, target: int, message: Any, size: int) -> None:
        copies = 2 if self._chance(self.params.duplicate) else 1
        self.tally.messages += 1
        self.tally.bytes += size
        if not self.clear(source, target):
            return
        for _ in range(copies):
            if not self._chance(self.params.loss):
                slower = 3 if self._chance(self.params.reorder) else 1
                delay = self._one_way(source, target) * slower
                self._simulation.after(delay, self._arrive, source, target, message)

    def _arrive(self, source: int, target: int, message: Any) -> None:
        if not self._hosts or self._hosts.get(target, Host.UP) in {Host.UP, Host.FROZEN}:
            self._ends[target].arrived(source, message)

    # ---------------------------------------------------------------------------------- streams
    def _transmit(self, connection: Connection, source: int, message: Any, size: int) -> None:
        target = connection.other(source)
        if not self.clear(source, target):
            connection.held[source] = [(message, size)]
            now = self._simulation.now
            self._simulation.after(RTO, self._retry, connection, source, (now, RTO))
            return
        self.tally.messages += 1
        self.tally.bytes += size
        trip = self._one_way(source, target)
        delay = trip + self._late(RTO + 2 * trip)
        arrives = max(self._simulation.now + delay, connection.free_at.get(source, 0.0))
        connection.free_at[source] = arrives
        self._simulation.at(arrives, self._come, connection, source, message)
        if not self.clear(target, source) and source not in connection.overdue:
            connection.overdue.add(source)
            self._simulation.after(USER_TIMEOUT, self._unacknowledged, connection, source)

    def _come(self, connection: Connection, source: int, message: Any) -> None:
        if not connection.closed:
            self._arrive(source, connection.other(source), message)

    def _retry(self, connection: Connection, source: int, since: tuple[float, float]) -> None:
        begun, waited = since
        if connection.closed:
            return
        if self.clear(source, connection.other(source)):
            self._flush(connection, source)
        elif self._simulation.now - begun >= USER_TIMEOUT:
            self._break(connection, source)
        else:
            left = begun + USER_TIMEOUT - self._simulation.now
            again = min(2 * waited, max(left, 1e-3))
            self._simulation.after(again, self._retry, connection, source, (begun, 2 * waited))

    def _flush(self, connection: Connection, source: int) -> None:
        for message, size in connection.held.pop(source, ()):
            if source in connection.held:  # blocked again
                connection.held[source].append((message, size))
            else:
                self._transmit(connection, source, message, size)

    def _unacknowledged(self, connection: Connection, source: int) -> None:
        connection.overdue.discard(source)
        if not connection.closed and not self.clear(connection.other(source), source):
            self._break(connection, source)

    def _break(self, connection: Connection, end: int) -> None:
        """An end gave up; the other learns it by a reset, or after its own timeout."""
        connection.closed = True
        other = connection.other(end)
        self._forget(connection)
        self._ends[end].unreachable(other, refused=False)
        through = self.clear(end, other)
        delay = self._one_way(end, other) if through else USER_TIMEOUT
        if connection.up:
            self._simulation.after(delay, self._lose, other, end, False)

    def _reset(self, connection: Connection, gone: int) -> None:
        """The process at one end ended: the other is told by its kernel, if packets get there."""
        connection.closed = True
        other = connection.other(gone)
        self._forget(connection)
        if connection.up or other in connection.asked:
            through = self.clear(gone, other)
            delay = self._one_way(gone, other) if through else USER_TIMEOUT
            self._simulation.after(delay, self._lose, other, gone, False)

    def _lose(self, end: int, other: int, refused: bool) -> None:
        """Tell this end that its connection broke, unless it has a newer one."""
        if self._alive(end) and other not in self._connections.get(end, {}):
            self._ends[end].unreachable(other, refused=refused)

    def _forget(self, connection: Connection) -> None:
        for end in (connection.dialler, connection.peer):
            known = self._connections.get(end, {})
            if known.get(connection.other(end)) is connection:
                del known[connection.other(end)]

    # ------------------------------------------------------------------------------------ dials
    def _dial(self, source: int, target: int) -> None:
        connection = Connection(source, target)
        connection.asked.add(source)
        self._connections.setdefault(source, {})[target] = connection
        self._connections.setdefault(target, {})[source] = connection
        self.tally.dials += 1
        begun = self._simulation.now
        self._syn(connection, begun, self._late(SYN_RTO))

    def _syn(self, connection: Connection, begun: float, late: float) -> None:
        """The first packet goes out, after `late` seconds of it being lost."""
        if connection.closed:
            return
        source, target = connection.dialler, connection.peer
        waited = self._simulation.now - begun
        if waited + late >= DIAL_LIMIT:
            self._simulation.at(begun + DIAL_LIMIT, self._dial_failed, connection, False)
        elif not (self.clear(source, target) and self.clear(target, source)):
            again = min(waited + SYN_RTO, DIAL_LIMIT - waited)  # after 1, 2, 4 ... seconds
            self._simulation.after(max(again, 1e-3), self._syn, connection, begun, 0.0)
        else:
            trip = self._one_way(source, target) + self._one_way(target, source)
            self._simulation.after(late + trip, self._shake_hands, connection)

    def _shake_hands(self, connection: Connection) -> None:
        """TCP is done: two more round trips for TLS and the HELLOs."""
        source, target = connection.dialler, connection.peer
        if connection.closed:
            return
        if self._hosts.get(target) is Host.REFUSING:
            self._dial_failed(connection, True)
            return
        self.tally.bytes += DIAL_BYTES
        there = self._one_way(source, target)
        delay = 2 * there + self._one_way(target, source) + self._late(RTO + 2 * there)
        limit = self._simulation.now + DIAL_LIMIT
        self._simulation.after(delay, self._greeted, connection, limit)

    def _greeted(self, connection: Connection, limit: float) -> None:
        """The dialler's HELLO is at the other end."""
        source, target = connection.dialler, connection.peer
        if connection.closed:
            return
        host = self._hosts.get(target, Host.UP)
        passes = self.clear(source, target) and self.clear(target, source)
        if host is Host.UP and passes:
            self._ends[target].connected(source)
            self._simulation.after(self._one_way(target, source), self._established, connection)
        elif self._simulation.now >= limit:
            self._dial_failed(connection, False)
        else:  # frozen or cut off: look again
            self._simulation.after(RTO, self._greeted, connection, limit)

    def _established(self, connection: Connection) -> None:
        if connection.closed:
            return
        connection.up = True
        ends = connection.dialler, connection.peer
        for pair in (ends, ends[::-1]):
            self._backoffs.pop(pair, None)
            self._refused.discard(pair)
        if self._alive(connection.dialler):
            self._ends[connection.dialler].connected(connection.peer)
        for end in sorted(connection.held):
            self._flush(connection, end)

    def _dial_failed(self, connection: Connection, refused: bool) -> None:
        if connection.closed:
            return
        connection.closed = True
        self._forget(connection)
        ends = connection.dialler, connection.peer
        backoff = self._backoffs.setdefault(ends, Backoff(self._backoff))
        backoff.failed(self._simulation.now, self._dice)
        (self._refused.add if refused else self._refused.discard)(ends)
        if self._alive(connection.dialler):
            self._ends[connection.dialler].unreachable(connection.peer, refused=refused)
        if connection.peer in connection.asked and self._alive(connection.peer):
            self._ends[connection.peer].unreachable(connection.dialler, refused=False)

    # ------------------------------------------------------------------------------------ chance
    def _alive(self, peer: int) -> bool:
        return self._hosts.get(peer, Host.UP) in {Host.UP, Host.FROZEN}

    def _one_way(self, source: int, target: int) -> float:
        return self.params.latency.one_way(source, target, self._dice)

    def _chance(self, share: float) -> bool:
        return share > 0 and self._dice.random() < share

    def _late(self, timeout: float) -> float:
        """How long a segment is late for having been lost, perhaps again and again."""
        late = 0.0
        while self._chance(self.params.loss):
            late += timeout
            timeout *= 2
        return late

"""All connections of a node: dialled when a call needs one, reused, and closed when idle.

Rules: a caller waits for a dial but never owns it, so a cancelled caller ends nobody's dial. Each
peer has one control connection and a few bulk ones, whoever dialled them. A peer whose dial failed
is left alone for its back-off. A call that the other side certainly did not begin is asked again.
"""

from __future__ import annotations

import math
import random
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

import trio

from p2pmoe import telemetry
from p2pmoe.errors import (
    CallTimeout,
    NodeClosed,
    NotAllowed,
    P2PMoEError,
    PeerBusy,
    PeerUnreachable,
    RemoteProtocolError,
)
from p2pmoe.identity import PeerId
from p2pmoe.net.asking import ATTEMPTS, OutgoingCall, Replies
from p2pmoe.net.backoff import BackoffParams
from p2pmoe.net.calls import Part
from p2pmoe.net.connection import Connection
from p2pmoe.net.door import Door
from p2pmoe.net.events import DialFailed, PeerConnected, PeerLost, PoolEvent
from p2pmoe.net.greeting import Greeted, Greeter
from p2pmoe.net.incoming import Handler
from p2pmoe.net.links import Dial, Dials, Links, unused
from p2pmoe.net.outbox import Buffer
from p2pmoe.net.quota import Quota, QuotaParams
from p2pmoe.net.transport import Channel, Transport
from p2pmoe.wire.address import Address
from p2pmoe.wire.envelope import VerifiedCache
from p2pmoe.wire.peer_record import Contact

__all__ = [
    "DialFailed",
    "Greeted",
    "Handler",
    "Part",
    "PeerConnected",
    "PeerLost",
    "Pool",
    "PoolEvent",
    "PoolParams",
]

WAITING_DIALS = 256  # at once; a guess
CLOSED = "this node is closed"


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolParams:
    """How a node keeps its connections. Seconds.

    Nodes in one process that have the same `verified` check no signature twice.
    """

    quota: QuotaParams = field(default_factory=QuotaParams)
    backoff: BackoffParams = field(default_factory=BackoffParams)
    bulk_per_peer: int = 2  # so that a second large payload need not wait for the first; a guess
    control_connections: int = 128  # kept, the least recently used go; memberlist pools as many
    idle: float = 300.0  # s without a call, then a connection is closed; a guess
    idle_check: float = 10.0  # s between looks; a guess
    call_seconds: float = 30.0  # s for a call whose caller has no deadline; a guess
    verified: VerifiedCache | None = None

    def remembered(self) -> VerifiedCache:
        """What was verified: of these nodes, or a new one for a node of its own."""
        return (
            VerifiedCache(self.quota.records_remembered) if self.verified is None else self.verified
        )


class Pool:
    """The connections of one node. `handlers` answer calls by method, and may be added to.

    `greeting` gives the node's own sealed record, or `None`. Observers are told of `PoolEvent`s as
    they happen, between awaits. What was `verified`, whoever brought it, is not checked again.
    """

    def __init__(
        self,
        transport: Transport,
        greeting: Callable[[], bytes | None],
        network: bytes,
        params: PoolParams,
        rng: random.Random,
    ) -> None:
        self.handlers: dict[str, Handler] = {}
        self.observers: list[Callable[[PoolEvent], None]] = []
        self._own, self._params, self._rng = transport.peer_id, params, rng
        self._quota = Quota(params.quota)
        self.verified = params.remembered()
        greeter = Greeter(network, greeting, params.quota, self.verified)
        self._door = Door(transport, greeter, self._quota, self.handlers)
        self._peers: OrderedDict[PeerId, Links] = OrderedDict()
        self._orders, self._dials = trio.open_memory_channel[Dial](WAITING_DIALS)
        self._under_way = Dials()
        self._ended = trio.lowlevel.ParkingLot()  # drain waits here for connections to end

    # -------------------------------------------------------------- calls
    async def call(
        self,
        to: Contact,
        method: str,
        body: bytes,
        payload: Iterable[Buffer] = (),
        *,
        bulk: bool = False,
    ) -> Part:
        """Ask for an answer of exactly one part.

        What is left of the caller's deadline goes along. A caller without one gets `CallTimeout`
        after 30 s. Raises the error that the peer answered, `PeerUnreachable` (at once while the
        peer is in its back-off, with `retry_after`), `ConnectionLost`, `PeerBusy`, `NotAllowed`,
        `VersionMismatch`, `LocalProtocolError` or `NodeClosed`.
        """
        answer = self.open_call(to, method, body, payload, bulk=bulk)
        if trio.current_effective_deadline() < math.inf:
            return await _one_part(answer)
        with trio.move_on_after(self._params.call_seconds):
            return await _one_part(answer)
        error = CallTimeout(f"{to.peer}: call: no answer after {self._params.call_seconds:g} s")
        error.peer, error.stage, error.elapsed = to.peer.short, "call", self._params.call_seconds
        raise error

    def open_call(
        self,
        to: Contact,
        method: str,
        body: bytes,
        payload: Iterable[Buffer] = (),
        *,
        bulk: bool = False,
    ) -> Replies:
        """Ask for an answer of many parts: `async with` this, then `async for` what has come.

        Leaving the block cancels the call on the far side if it has not ended. The buffers must not
        change inside the block. Raises as `call`, but for `CallTimeout`.
        """
        buffers = list(payload)

        async def ask() -> OutgoingCall:
            connection = await self._connection(to, bulk=bulk)
            return connection.ask(method, body, buffers, self._budget())

        return Replies(ask)

    def open_connection(self, to: Contact, *, bulk: bool) -> Connection | None:
        """The best connection to this peer that is open, to `ask` at once; `None` where none is."""
        links = self._links(to.peer)
        best = links.best(bulk=bulk)
        if bulk and best is not None and best.unsent_bytes:
            self._dial_another(links, to)
        return best

    async def connect(self, address: Address) -> Greeted:
        """Dial an address whose peer is not known yet. Raises as a dial does in `call`.

        Those who want the same at the same time share one dial.
        """
        while True:
            connection = await self._order(Dial((address,), None, bulk=False)).wait()
            if connection.outbound:  # else the peer has dialled meanwhile, which says nothing of it
                return connection.greeted

    def usable(self, peer: PeerId) -> bool:
        """Whether a call to this peer would be tried: it is connected, or not in its back-off."""
        links = self._peers.get(peer)
        if links is None or any(each.open for each in links.connections):
            return True
        return not links.backoff.wait(trio.current_time())

    def connected(self, peer: PeerId) -> bool:
        """Whether a connection to this peer is open, whoever dialled."""
        return any(each.open for each in self._connections(peer))

    def reached(self, to: Contact) -> str | None:
        """The number of the machine to which one of these addresses led, on an open connection."""
        where = {(address.host, address.port) for address in to.addresses}
        ours = (each for each in self._connections(to.peer) if each.open and each.outbound)
        led = (each for each in ours if (each.remote.host, each.remote.port) in where)
        return next((each.greeted.host for each in led), None)

    def forget(self, peer: PeerId) -> None:
        """Drop the peer's connections now; its calls in flight are lost."""
        for connection in list(self._connections(peer)):
            connection.drop(PeerUnreachable("this node dropped the peer"))

    def stats(self) -> dict[str, int]:
        """Figures of this moment, by their names in telemetry."""
        connections = list(self._connections())
        return {
            "p2pmoe_peers_connected": len({each.peer for each in connections}),
            'p2pmoe_connections{class="bulk"}': sum(each.bulk for each in connections),
            'p2pmoe_connections{class="control"}': sum(not each.bulk for each in connections),
            'p2pmoe_calls_in_flight{side="client"}': sum(each.calls[0] for each in connections),
            'p2pmoe_calls_in_flight{side="server"}': sum(each.calls[1] for each in connections),
            "p2pmoe_payload_bytes_reserved": self._quota.payload_bytes,
            "p2pmoe_tasks": trio.lowlevel.current_statistics().tasks_living,
        }

    # -------------------------------------------------------------- life
    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own every dial and every connection that this node dialled, until cancelled."""
        try:
            async with trio.open_nursery() as connections:
                connections.start_soon(self._retire_idle)
                task_status.started()
                async for dial in self._dials:
                    connections.start_soon(self._dial, dial)
        finally:
            self._door.closed = True
            self._dials.close()
            for dial in self._under_way:
                dial.end(NodeClosed(CLOSED))

    async def accepted(self, channel: Channel) -> P2PMoEError | None:
        """Work on a channel that came in, until it ends; why it did. For `Transport.serve`."""
        try:
            connection = await self._door.accept(channel)
        except P2PMoEError as error:
            telemetry.count("p2pmoe_net_greetings_refused_total", why=error.code)
            telemetry.complain(
                channel.peer.hex, "net.greeting.refused", peer=channel.peer, error=error
            )
            return error
        await self._live(connection)
        return connection.error

    async def drain(self) -> None:
        """Say goodbye to everybody: begin no calls, and wait until those in flight are answered."""
        self._door.closed = True
        while connections := list(self._connections()):
            for connection in connections:
                connection.retire()
            await self._ended.park()

    # -------------------------------------------------------------- asking
    def _budget(self) -> float:
        """Seconds left of the caller's deadline."""
        left = trio.current_effective_deadline() - trio.current_time()
        return self._params.call_seconds if math.isinf(left) else left

    async def _connection(self, to: Contact, *, bulk: bool) -> Connection:
        """The best open connection to a peer; waits for a dial when there is none."""
        for _ in range(ATTEMPTS):
            if (best := self.open_connection(to, bulk=bulk)) is not None:
                return best
            links = self._links(to.peer)
            dial = links.waiting(bulk=bulk) or self._order(Dial(to.addresses, to.peer, bulk))
            try:
                connection = await dial.wait()
            except P2PMoEError:
                if self._links(to.peer).best(bulk=bulk) is None:
                    raise
            else:
                if connection.open:
                    return connection
        raise PeerUnreachable(f"{to.peer}: its connections end when they have begun", stage="call")

    def _dial_another(self, links: Links, to: Contact) -> None:
        """A payload waits for its turn: have one more bulk connection next time, if possible."""
        enough = len(links.open(bulk=True)) >= self._params.bulk_per_peer
        if to.addresses and links.may_grow and not (enough or links.dials.get(True)):
            with suppress(PeerUnreachable, PeerBusy):
                self._order(Dial(to.addresses, to.peer, bulk=True))

    def _order(self, dial: Dial) -> Dial:
        """Hand a dial to the pool's own task; the one with its aim that is under way, if any."""
        if self._door.closed:
            raise NodeClosed(CLOSED)
        if (under_way := self._under_way.like(dial)) is not None:
            return under_way
        if dial.expect is not None:
            self._check(dial.expect)
        try:
            self._orders.send_nowait(dial)
        except trio.WouldBlock:
            raise PeerBusy(f"{WAITING_DIALS} dials of this node wait for their turn") from None
        self._under_way.add(dial)
        if dial.expect is not None:
            self._links(dial.expect).dials[dial.bulk] = dial
        return dial

    def _check(self, peer: PeerId) -> None:
        if peer == self._own:
            raise NotAllowed("a node does not dial itself", peer=peer.short, stage="connect")
        if wait := self._links(peer).backoff.wait(trio.current_time()):
            error = PeerUnreachable(
                f"{peer}: connect: a dial failed a moment ago, the next is in {wait:.1f} s",
                peer=peer.short,
                stage="connect",
            )
            error.retry_after = wait
            raise error

    # -------------------------------------------------------------- dials and connections
    async def _dial(self, dial: Dial) -> None:
        try:
            connection = await self._door.dial(dial)
            self._dialled(dial, connection)
            await self._live(connection)
        except P2PMoEError as error:
            self._dialled(dial, error)
        except Exception as error:  # noqa: BLE001  the edge of a task: one dial ends, not the node
            telemetry.emit("net.dial.crashed", level="error", error=repr(error), exc_info=True)
            self._dialled(dial, PeerUnreachable(f"the dial failed: {error!r}", stage="connect"))

    def _dialled(self, dial: Dial, outcome: Connection | P2PMoEError) -> None:
        """Tell those that wait; a peer that was not reached is left alone for a while."""
        self._under_way.remove(dial)
        if dial.expect is not None:
            links = self._links(dial.expect)
            if links.dials.get(dial.bulk) is dial:
                del links.dials[dial.bulk]
            if isinstance(outcome, P2PMoEError):
                links.failed(trio.current_time(), self._rng)
                self._notify(DialFailed(dial.expect, outcome))
                self._tell_if_lost(links, dial.expect, outcome)
        dial.end(outcome)

    async def _live(self, connection: Connection) -> None:
        """A connection among the others, until it ends."""
        links = self._links(connection.peer)
        links.add(connection)
        greeted = connection.greeted
        self._notify(PeerConnected(greeted.peer, greeted.record, connection.outbound, greeted.host))
        if self._door.closed:
            connection.retire()
        for surplus in list(links.surplus()):
            surplus.retire()
        try:
            await connection.run()
        finally:
            self._door.leave(connection)
            links.remove(connection)
            self._ended.unpark_all()
            self._tell_if_lost(links, connection.peer, connection.error)

    def _tell_if_lost(self, links: Links, peer: PeerId, error: P2PMoEError | None) -> None:
        if links.lost():
            self._notify(PeerLost(peer, error))

    async def _retire_idle(self) -> None:
        params = self._params
        while True:
            await trio.sleep(params.idle_check)
            for each in unused(self._connections(), params.idle, params.control_connections):
                each.retire()

    def _connections(self, peer: PeerId | None = None) -> Iterator[Connection]:
        """All connections, or those of one peer."""
        some = self._peers.values() if peer is None else filter(None, [self._peers.get(peer)])
        return (connection for links in some for connection in links.connections)

    def _links(self, peer: PeerId) -> Links:
        if peer not in self._peers:
            if len(self._peers) >= self._params.quota.peers_remembered:
                self._forget_one()
            self._peers[peer] = Links(self._own, self._params.backoff)
        self._peers.move_to_end(peer)
        return self._peers[peer]

    def _forget_one(self) -> None:
        """Drop the oldest peer that nothing is open to, if there is one."""
        empty = (peer for peer, links in self._peers.items() if links.empty)
        if (oldest := next(empty, None)) is not None:
            del self._peers[oldest]

    def _notify(self, event: PoolEvent) -> None:
        for observer in self.observers:
            observer(event)


async def _one_part(answer: Replies) -> Part:
    async with answer as replies:
        parts = [part async for part in replies]
    if len(parts) != 1:
        raise RemoteProtocolError(f"an answer of {len(parts)} parts, where one was expected")
    return parts[0]

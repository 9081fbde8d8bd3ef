"""Who is around: joins, dials back, fills the routing table and keeps it fresh.

A peer enters the table when a connection that we began has reached it, and leaves it at once when
its address refuses. Who connects to us is dialled back at the addresses of its own record, so that
both sides of a swarm of two know each other. A peer that was late once, while its connection
stayed, is asked again: nothing else would bring it back. A node that has lost everybody dials those
that it knew before.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

import trio

from p2pmoe import telemetry
from p2pmoe.dht.asks import Asks
from p2pmoe.dht.contacts import Contacts
from p2pmoe.dht.jobs import Flights, Jobs
from p2pmoe.dht.routing import PingOldest
from p2pmoe.dht.search import Searches
from p2pmoe.errors import NodeClosed, P2PMoEError, PeerBusy, PeerUnreachable
from p2pmoe.identity import ID_BYTES, PeerId
from p2pmoe.net.pool import PeerConnected, PeerLost, Pool, PoolEvent
from p2pmoe.wire.address import Address
from p2pmoe.wire.envelope import Signed
from p2pmoe.wire.peer_record import PeerRecord

LOOK_AFTER = 10.0  # seconds between looks for buckets to refresh and peers to find again; a guess
LOOK_WITHIN = 5.0  # seconds in which a peer whose connection broke is looked for; a guess
DIAL_LIMIT = 3.0  # seconds for dialling back, all addresses of a peer together; as for a question
DIALS_BACK = 8  # at once; a guess
STRAYS = 8  # connected peers without a place that are asked at one look; a guess
FIND_AGAIN = 8  # peers that a node dials when it has lost everybody; a guess


class Sign(enum.Enum):
    """What the pool, or the membership, has seen of a peer."""

    CAME = enum.auto()  # a connection was made
    QUIET = enum.auto()  # it said goodbye: it has left, or has nothing to say to us
    GONE = enum.auto()  # its connection broke, or its addresses refuse
    DOUBTED = enum.auto()  # the membership suspects it


@dataclass(frozen=True, slots=True)
class NeighbourParts:
    """What it works with. `changed` is told each sign of a peer."""

    pool: Pool
    contacts: Contacts
    asks: Asks
    searches: Searches
    jobs: Jobs
    changed: Callable[[PeerId, Sign], None]


class Neighbours:
    """Keeps the routing table true. Registers itself with the pool."""

    def __init__(self, own: PeerId, parts: NeighbourParts, rng: random.Random) -> None:
        self._own, self._parts, self._rng = own, parts, rng
        self._join_by: tuple[Address, ...] = ()
        self._dials: Flights[bool] = Flights(parts.jobs)
        self._limit = trio.CapacityLimiter(DIALS_BACK)
        parts.pool.observers.append(self._observe)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Refresh the table until cancelled."""
        task_status.started()
        if len(self._parts.contacts):  # those that it knew when it last ran
            await self._find_again()
        while True:
            await trio.sleep(LOOK_AFTER)
            table, now = self._parts.contacts.table, trio.current_time()
            places = table.to_refresh(now, self._rng)
            if not len(table):
                await self._find_again()
                places.append(self._own.raw)
            elif len(table) >= self._parts.searches.k:
                wanted = self._parts.searches.size.wanted(now)
                places += [self._rng.randbytes(ID_BYTES) for _ in range(wanted)]
            async with trio.open_nursery() as asks:
                for peer in table.to_check(now):
                    asks.start_soon(self._ping, peer)
                for peer in self._parts.contacts.strays(self._parts.pool.connected, now)[:STRAYS]:
                    asks.start_soon(self.dial_back, peer)
                for place in places:
                    asks.start_soon(self._look_up, place)

    # ----------------------------------------------------------------------------------- joining
    async def join(self, addresses: Iterable[Address]) -> int:
        """Dial these, then look for our own place; returns how many peers are known after.

        The first that answers is enough. Raises its error when there is one address and it does
        not answer, `PeerUnreachable` with what each said when there are several.
        """
        self._join_by = tuple(addresses)
        errors: dict[Address, P2PMoEError] = {}
        async with trio.open_nursery() as dials:

            async def dial(address: Address) -> None:
                if await self._connect(address, errors):
                    dials.cancel_scope.cancel()  # the pool's dials go on without us

            for address in self._join_by:
                dials.start_soon(dial, address)
        if errors and len(errors) == len(set(self._join_by)):
            raise _nobody([errors[address] for address in dict.fromkeys(self._join_by)])
        await self._parts.searches.find(self._own.raw)
        return len(self._parts.contacts)

    async def dial_back(self, peer: PeerId) -> bool:
        """Whether this peer answers at the addresses of its own record; shared, bounded.

        A connection that we began there is as good as a dial if it carries an answer. So of two
        that are connected one alone dials: if both did, each would find two connections too many.
        """
        contacts = self._parts.contacts
        if contacts.was_dialled(peer):
            return True
        contact = contacts.contact(peer)
        host = None if contact is None else self._parts.pool.reached(contact)
        if host is not None:
            if answered := await self._ping(peer):
                self._reached(peer, host)
            return answered
        try:
            return await self._dials.share(peer, partial(self._dial, peer))
        except (NodeClosed, PeerBusy):
            return False

    async def _dial(self, peer: PeerId) -> bool:
        contact = self._parts.contacts.contact(peer)
        with trio.move_on_after(DIAL_LIMIT):
            async with self._limit:
                for address in () if contact is None else contact.addresses:
                    if await self._connect(replace(address, peer_prefix=peer.hex), {}):
                        return True
        self._parts.contacts.failed(peer, trio.current_time())
        return False

    async def _connect(self, address: Address, errors: dict[Address, P2PMoEError]) -> bool:
        try:
            greeted = await self._parts.pool.connect(address)
        except P2PMoEError as error:
            telemetry.emit("dht.dial.failed", address=address, error=error)
            errors[address] = error
            return False
        self._learn(greeted.record)
        self._reached(greeted.peer, greeted.host)
        if address in self._join_by:
            self._parts.contacts.vouch(greeted.peer, trio.current_time())
        return True

    async def _find_again(self) -> None:
        """Everybody is gone: dial where this node joined, and some of those it knew."""
        known = self._parts.contacts.sample(FIND_AGAIN, self._rng)
        async with trio.open_nursery() as dials:
            for address in self._join_by:
                dials.start_soon(self._connect, address, {})
            for peer in known:
                dials.start_soon(self.dial_back, peer)

    async def _look_up(self, place: bytes) -> None:
        try:
            await self._parts.searches.find(place)
        except P2PMoEError as error:
            telemetry.emit("dht.refresh.failed", error=error)

    # ------------------------------------------------------------------------- what the pool sees
    def _observe(self, event: PoolEvent) -> None:
        now = trio.current_time()
        match event:
            case PeerConnected():
                self._learn(event.record)
                self._parts.contacts.connection(event.peer, now, broke=False)
                if event.outbound:
                    self._reached(event.peer, event.host)
                elif self._parts.contacts.contact(event.peer) is not None:
                    self._later(partial(self.dial_back, event.peer))
                self._parts.changed(event.peer, Sign.CAME)
            case PeerLost(error=None):
                self._parts.changed(event.peer, Sign.QUIET)
            case PeerLost():
                self._parts.contacts.connection(event.peer, now, broke=True)
                if event.peer in self._parts.contacts.table:
                    self._later(partial(self._look_for, event.peer))
                self._parts.changed(event.peer, Sign.GONE)
            case _:
                self._parts.contacts.failed(event.peer, now)
                self._parts.changed(event.peer, Sign.GONE)

    def _learn(self, record: Signed[PeerRecord] | None) -> None:
        if record is not None:
            self._parts.contacts.learn(record)

    def _reached(self, peer: PeerId, host: str) -> None:
        outcome = self._parts.contacts.dialled(peer, trio.current_time(), host)
        if isinstance(outcome, PingOldest):
            self._later(partial(self._ping, outcome.oldest))

    async def _look_for(self, peer: PeerId) -> None:
        """Whether a peer whose connection broke is there, if nobody has found out meanwhile.

        Not all at once: many have lost the same one, and whoever has lost many has much to do. One
        that the membership suspects is left to it: some look already, and all will hear of it.
        """
        await trio.sleep(self._rng.uniform(0.0, LOOK_WITHIN))
        contacts, pool = self._parts.contacts, self._parts.pool
        known = peer not in contacts.table or contacts.suspected(peer) or pool.connected(peer)
        if not known:
            await self._ping(peer)

    async def _ping(self, peer: PeerId) -> bool:
        """Ask for a sign of life; silence takes the peer out of the table where it is asked."""
        try:
            await self._parts.asks.find(peer, self._own.raw)
        except P2PMoEError as error:
            telemetry.emit("dht.ping.failed", peer=peer, error=error)
            return False
        return True

    def _later(self, job: Callable[[], Awaitable[object]]) -> None:
        """Begin it from a plain function; with too much to do, or at the end, it is left out."""
        try:
            self._parts.jobs.start(job, lambda: None)
        except (NodeClosed, PeerBusy) as error:
            telemetry.emit("dht.job.dropped", error=error)


def _nobody(errors: list[P2PMoEError]) -> P2PMoEError:
    """What to raise when no address answered."""
    if len(errors) == 1:
        return errors[0]
    return PeerUnreachable("; ".join(map(str, errors)), stage=errors[0].stage)

"""A node: the composition root. `open_node` owns the one long-lived nursery.

When the block of `open_node` ends, nothing of the node is left: no task, no socket, no file held.
Parts are begun in floor order and end in reverse. What the network learns goes up through
`Node.events` alone; what stands above the node adds calls with `handle` and tasks with `start`.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import trio

from p2pmoe import telemetry
from p2pmoe.answers import answer_operators
from p2pmoe.dht.service import DhtParams, DhtService
from p2pmoe.errors import MalformedMessage, P2PMoEError, PeerUnreachable
from p2pmoe.gossip.events import (
    MemberEvent,
    MemberFailed,
    MemberJoined,
    MemberLeft,
    MemberReturned,
    MemberSuspected,
)
from p2pmoe.gossip.membership import MembershipParams
from p2pmoe.gossip.service import GossipParts, GossipService, Member
from p2pmoe.gossip.watching import Watching
from p2pmoe.identity import KeyPair, PeerId
from p2pmoe.net.interfaces import local_addresses
from p2pmoe.net.pool import Handler, Pool, PoolEvent, PoolParams
from p2pmoe.net.tcp import TcpTransport
from p2pmoe.net.tls import Credentials
from p2pmoe.net.transport import Transport
from p2pmoe.state import State, open_state
from p2pmoe.wire.address import DEFAULT_PORT, Address
from p2pmoe.wire.envelope import Signed
from p2pmoe.wire.peer_record import MAX_ADDRESSES, PeerRecord, contact_of, open_record, seal_record
from p2pmoe.wire.status import MAX_ROWS, StatusRow

EVENT_QUEUE = 256  # unread events a subscriber may have; a guess. More are dropped and counted.
REMEMBERED_AT_ONCE = 8  # peers of the last run that are dialled at once; a guess
REMEMBERED_WITHIN = 6.0  # seconds for them; a dial's limit and a greeting
CHECKED_AT_ONCE = 16  # signatures between two checkpoints: 4 ms
ANY_HOST = {"0.0.0.0", "::"}  # noqa: S104  compared with, never bound by default

NodeEvent = PoolEvent | MemberEvent
Section = Callable[[], Mapping[str, Mapping[str, int | str]]]


@dataclass(frozen=True, kw_only=True)
class NodeConfig:
    """How a node runs. Times in seconds.

    `peers` are addresses to join by; without any, those that the state folder remembers are tried,
    and if there are none, it begins a swarm of one. `network` names an open network:
    it keeps nobody out. `state_dir` holds key and epoch; without it, the node has `keys`, or a new
    identity for as long as it lives. A `client_only` node accepts no connections. A `new_swarm` has
    granted no leases yet, so its first node need not wait for those that it may have forgotten.
    """

    peers: tuple[Address, ...] = ()
    new_swarm: bool = False
    network: str = "p2pmoe"
    listen: Address = Address("0.0.0.0", DEFAULT_PORT)  # noqa: S104, RUF009  frozen; a server is reached from outside
    announce: Address | None = None
    client_only: bool = False
    state_dir: Path | None = None
    keys: KeyPair | None = None
    join_within: float = 20.0
    stop_within: float = 20.0
    pool: PoolParams = field(default_factory=PoolParams)
    membership: MembershipParams = field(default_factory=MembershipParams)
    dht: DhtParams = field(default_factory=DhtParams)
    wall_clock: Callable[[], float] = time.time  # seconds since 1970: the epoch, nothing else


class Node:
    """A running peer. Made by `open_node` alone."""

    def __init__(
        self, config: NodeConfig, state: State, network: bytes, parts: trio.Nursery
    ) -> None:
        self.keys = state.keys
        self.epoch = state.epoch
        self.network = network
        self.address: Address | None = None
        self.pool: Pool
        self.dht: DhtService
        self.gossip: GossipService | None = None  # of a node that can be dialled
        self.load: Callable[[], tuple[int, int]] = lambda: (0, 0)  # per mille busy, free slots
        self.end_by = math.inf  # when it has ended at the latest, if that is known before it ends
        self._config, self._state = config, state
        self._start_task = parts.start
        self._started_at = trio.current_time()
        self._grids: tuple[str, ...] = ()
        self._incarnation = 0
        self._record: Signed[PeerRecord] | None = None
        self._sections: dict[str, Section] = {}
        self._subscribers: list[trio.MemorySendChannel[NodeEvent]] = []

    @property
    def id(self) -> PeerId:
        """This peer's id."""
        return self.keys.peer_id

    @property
    def uptime(self) -> float:
        """Seconds since the node was opened."""
        return trio.current_time() - self._started_at

    def wall_clock(self) -> float:
        """Seconds since 1970, as this machine has it."""
        return self._config.wall_clock()

    @property
    def folder(self) -> Path | None:
        """The state folder, if it has one."""
        return self._state.folder

    @property
    def record(self) -> Signed[PeerRecord] | None:
        """The node's own signed record; `None` as long as nobody can dial it."""
        return self._record

    def handle(self, method: str, handler: Handler) -> None:
        """Answer calls of `method` from now on."""
        self.pool.handlers[method] = handler

    async def start(self, run: Callable[..., Awaitable[object]]) -> None:
        """Begin a long-lived part; it is cancelled when the node closes."""
        await self._start_task(run)

    def describe(self, name: str, section: Section) -> None:
        """Add a section to what `node.status` answers."""
        self._sections[name] = section

    def serve_grids(self, names: tuple[str, ...]) -> None:
        """Say in the node's record which grids it serves; signs it again."""
        self._grids = names
        self._sign_record()

    @contextmanager
    def events(self) -> Iterator[trio.MemoryReceiveChannel[NodeEvent]]:
        """What the network learns of peers, from now until the block ends."""
        send, receive = trio.open_memory_channel[NodeEvent](EVENT_QUEUE)
        self._subscribers.append(send)
        try:
            with send, receive:
                yield receive
        finally:
            self._subscribers.remove(send)

    def members(self) -> list[Member]:
        """The other members as this node sees them; a client is no member and sees none."""
        return self.gossip.members() if self.gossip else []

    def figures(self) -> dict[str, int]:
        """Counters of this process and of this node's connections."""
        figures = {name: int(value) for name, value in telemetry.counters().items()}
        return figures | self.pool.stats() | self.dht.stats()

    def sections(self) -> dict[str, tuple[StatusRow, ...]]:
        """What each part says of itself, cut to what one answer carries."""
        room, sections = MAX_ROWS, {}
        for name, section in self._sections.items():
            rows = [StatusRow(name=key, values=dict(row)) for key, row in section().items()][:room]
            room -= len(rows)
            sections[name] = tuple(rows)
        return sections

    def _open_pool(self, transport: Transport, rng: random.Random, *, amnesia: bool) -> None:
        self.pool = Pool(transport, self._greeting, self.network, self._config.pool, rng)
        self.pool.observers.append(self._observe)
        answer_operators(self)
        dht = replace(self._config.dht, amnesia=amnesia, folder=self._state.folder)
        self.dht = DhtService(self.pool, self.keys, self.network, lambda: self._record, dht, rng)

    def _become_member(self, bound: Address, rng: random.Random) -> GossipService:
        """The node can be dialled at this address."""
        self.address = bound
        self._sign_record()
        assert self._record is not None  # it has an address now
        parts = GossipParts(
            pool=self.pool,
            keys=self.keys,
            network=self.network,
            load=lambda: self.load(),
            adopt=self._adopt,
            remember=self._remember,
            params=self._config.membership,
        )
        self.gossip = GossipService(parts, self._record, rng)
        self.gossip.observers.append(self._member)
        self.describe("membership", self.gossip.section)
        return self.gossip

    def _watch_members(self, rng: random.Random) -> Watching:
        """What a client does to learn who fails."""

        def concerned(peer: PeerId) -> bool:
            return self.dht.contact(peer) is not None

        watching = Watching(self.pool, self.network, self.dht.probe, concerned, rng)
        watching.observers.append(self._member)
        return watching

    def _member(self, event: MemberEvent) -> None:
        """Tell all parts what the membership has learned, and those that listen."""
        match event:
            case MemberJoined() | MemberReturned():
                self.dht.member_alive(event.record)
            case MemberSuspected():
                self.dht.member_suspected(event.peer)
            case MemberFailed():
                self.dht.member_failed(event.peer)
                self.pool.forget(event.peer)
            case MemberLeft():
                self.dht.member_left(event.peer)
        self._observe(event)

    def _remember(self, peers: Sequence[bytes]) -> None:
        self._state.remember(peers, int(self.wall_clock() * 1000))

    def _adopt(self, record: Signed[PeerRecord]) -> None:
        """The membership has signed this node's record anew."""
        self._record, self._incarnation = record, record.body.incarnation

    def _sign_record(self) -> None:
        if self.address is None:
            return
        self._incarnation += 1
        self._record = seal_record(
            self.keys,
            PeerRecord(
                epoch=self.epoch,
                incarnation=self._incarnation,
                addresses=tuple(str(address) for address in self.announced()),
                grids=self._grids,
            ),
            self.network,
        )
        if self.gossip is not None:
            self.gossip.own_record(self._record)

    def announced(self) -> list[Address]:
        """The addresses that others are told to dial."""
        if self.address is None:
            return []
        if self._config.announce is not None:
            return [self._config.announce]
        if self.address.host not in ANY_HOST:
            return [self.address]
        return [replace(self.address, host=host) for host in local_addresses()][:MAX_ADDRESSES]

    def _greeting(self) -> bytes | None:
        return self._record.raw if self._record is not None else None

    def _observe(self, event: NodeEvent) -> None:
        for subscriber in self._subscribers:
            try:
                subscriber.send_nowait(event)
            except trio.WouldBlock:
                telemetry.count("p2pmoe_node_events_lost_total")

    async def _join(self) -> None:
        """Enter the swarm by the peers that were named, else by those of the last run."""
        known = [] if self._config.new_swarm else await self._remembered()
        for record in known:
            self.dht.member_alive(record)
        errors: list[P2PMoEError] = []
        for addresses, within in self._ways(known):
            try:
                await self._join_by(addresses, within)
                break
            except P2PMoEError as error:
                errors.append(error)
        else:
            if errors and self._config.peers:
                raise errors[0]
            if errors:
                advice = "nobody of the last run answers: name a peer by --peer to find the swarm"
                telemetry.emit("node.alone", level="warning", advice=advice)
        if self.gossip is not None:
            self.gossip.join(known)

    def _ways(
        self, known: Sequence[Signed[PeerRecord]]
    ) -> Iterator[tuple[tuple[Address, ...], float]]:
        """Addresses to join by, and for how long to try, in turn."""
        if self._config.peers:
            yield self._config.peers, self._config.join_within
        for at in range(0, len(known), REMEMBERED_AT_ONCE):
            contacts = map(contact_of, known[at : at + REMEMBERED_AT_ONCE])
            addresses = (
                replace(address, peer_prefix=contact.peer.hex)
                for contact in contacts
                for address in contact.addresses
            )
            yield tuple(addresses), REMEMBERED_WITHIN

    async def _join_by(self, addresses: tuple[Address, ...], within: float) -> None:
        with trio.move_on_after(within):
            await self.dht.join(addresses)
            return
        asked = ", ".join(str(address) for address in addresses)
        raise PeerUnreachable(f"{asked}: no peer answered within {within:g} s", stage="hello")

    async def _remembered(self) -> list[Signed[PeerRecord]]:
        """The members of the last run whose records are still good."""
        known: list[Signed[PeerRecord]] = []
        for at, raw in enumerate(self._state.peers, 1):
            try:
                known.append(open_record(raw, self.network))
            except MalformedMessage as error:
                advice = "it is ignored: give --peer if the swarm is not found"
                telemetry.emit("node.peers.bad", level="warning", error=error, advice=advice)
            if at % CHECKED_AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
        return [record for record in known if record.signer != self.id and record.body.addresses]


@asynccontextmanager
async def open_node(
    config: NodeConfig, *, transport: Transport | None = None, rng: random.Random | None = None
) -> AsyncIterator[Node]:
    """Run a node until the block ends; then say goodbye within `config.stop_within` seconds.

    Raises `StateError`, `KeyFileError`, `AddressInUse`, or `PeerUnreachable` when peers are named
    and none of them answers. A test passes its own `transport` and `rng`.
    """
    with _state_of(config) as state:
        credentials = Credentials.for_open_network(state.keys, config.network)
        wire = transport or TcpTransport(state.keys, credentials, config.pool.quota)
        dice = rng or random.Random()  # noqa: S311  spreads load, keeps no secret
        try:
            async with trio.open_nursery() as parts:
                node = Node(config, state, credentials.network, parts)
                amnesia = state.ran_before and not config.new_swarm
                node._open_pool(wire, dice, amnesia=amnesia)
                await _begin(node, config, wire, dice, parts)
                try:
                    yield node
                finally:
                    await _end(node, config.stop_within)
                    parts.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            raise _sole(group) from None


async def _begin(
    node: Node, config: NodeConfig, wire: Transport, dice: random.Random, parts: trio.Nursery
) -> None:
    """Start the parts in floor order, then join."""
    await parts.start(node.pool.run)
    if config.client_only:
        await parts.start(node._watch_members(dice).run)
    else:
        bound = await parts.start(wire.serve, config.listen, node.pool.accepted)
        await parts.start(node._become_member(bound, dice).run)
    await parts.start(node.dht.run)
    await node._join()


async def _end(node: Node, within: float) -> None:
    """Leave, finish the calls in flight and say goodbye, for `within` seconds at most."""
    with trio.CancelScope(shield=True, deadline=min(trio.current_time() + within, node.end_by)):
        if node.gossip is not None:
            await node.gossip.leave()
        await node.pool.drain()


@contextmanager
def _state_of(config: NodeConfig) -> Iterator[State]:
    """The state folder's content, or a state that lives as long as the node."""
    now_ms = int(config.wall_clock() * 1000)
    if config.state_dir is None:
        yield State(config.keys or KeyPair.generate(), now_ms, ran_before=False)
    else:
        with open_state(config.state_dir, now_ms) as state:
            yield state


def _sole(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The one error inside nested groups, so that callers catch it by its type; else the group."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error

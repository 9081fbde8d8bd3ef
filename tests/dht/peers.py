"""Whole peers of the DHT over the network in memory, each in its own scope that can be killed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

from p2pmoe.dht.leases import LeaseView
from p2pmoe.dht.messages import PutReply, PutRequest, Verdict
from p2pmoe.dht.records import RecordParams
from p2pmoe.dht.search import SearchParams
from p2pmoe.dht.service import DhtParams, DhtService
from p2pmoe.identity import KeyPair, PeerId
from p2pmoe.net.incoming import Handler, IncomingCall, Prompt
from p2pmoe.net.pool import Pool, PoolParams
from p2pmoe.testing.memory import Line, MemoryNetwork
from p2pmoe.wire import schema
from p2pmoe.wire.address import Address
from p2pmoe.wire.envelope import Signed
from p2pmoe.wire.peer_record import PeerRecord, seal_record
from tests.dht.swarm_of_ids import GRID, NETWORK, dice

PORT = 4747
DELAY = 0.01  # seconds one way
UID = "ffn.3.7"


@dataclass
class Peer:
    """One peer: its DHT, its pool, and the scope of all its tasks."""

    keys: KeyPair
    host: str
    pool: Pool
    dht: DhtService
    scope: trio.CancelScope
    closed: trio.Event = field(default_factory=trio.Event)

    @property
    def id(self) -> PeerId:
        return self.keys.peer_id

    @property
    def address(self) -> Address:
        return Address(self.host, PORT)


class Town:
    """Opens peers on hosts h1, h2, ... and kills them."""

    def __init__(self, network: MemoryNetwork, tasks: trio.Nursery) -> None:
        self.network, self._tasks = network, tasks
        self.peers: list[Peer] = []

    async def open(
        self,
        number: int,
        *,
        by: list[Peer] | None = None,
        client: bool = False,
        epoch: int = 1,
        amnesia: bool = False,
        cells: int = 64,
        folder: Path | None = None,
        hostile: bool = False,
    ) -> Peer:
        """Start peer `number`; it joins by these peers, or else by all that are open."""
        keys, host = KeyPair.from_seed(bytes([number]) * 32), f"h{number}"
        self.network.revive(host)
        own = PeerRecord(epoch=epoch, incarnation=1, addresses=(str(Address(host, PORT)),))
        record: Signed[PeerRecord] | None = None
        if not client:
            record = seal_record(keys, own, NETWORK)
        transport = self.network.transport(keys, host)
        greeting = None if record is None else record.raw
        pool = Pool(transport, lambda: greeting, NETWORK, PoolParams(), dice(number))
        params = DhtParams(
            amnesia=amnesia,
            records=RecordParams(leases_per_grid=cells),
            search=SearchParams(hostile=hostile),
            folder=folder,
        )
        dht = DhtService(pool, keys, NETWORK, lambda: record, params, dice(number))
        peer = Peer(keys, host, pool, dht, trio.CancelScope())

        async def live(*, task_status: trio.TaskStatus[None]) -> None:
            with peer.scope:
                async with trio.open_nursery() as parts:
                    await parts.start(pool.run)
                    if not client:
                        await parts.start(transport.serve, peer.address, pool.accepted)
                    await parts.start(dht.run)
                    task_status.started()
            peer.closed.set()

        await self._tasks.start(live)
        joined_by = self.peers if by is None else by
        self.peers.append(peer)
        if joined_by and joined_by != [peer]:
            await dht.join([other.address for other in joined_by if other is not peer])
        return peer

    async def kill(self, peer: Peer) -> None:
        """As SIGKILL does: its connections break, its port refuses."""
        self.network.kill(peer.host)
        peer.scope.cancel()
        await peer.closed.wait()
        self.peers.remove(peer)


@asynccontextmanager
async def town(delay: float = DELAY) -> AsyncIterator[Town]:
    network = MemoryNetwork(dice(7), Line(latency=delay))
    async with trio.open_nursery() as tasks:
        yield Town(network, tasks)
        tasks.cancel_scope.cancel()


async def pass_on(call: IncomingCall, handler: Handler) -> None:
    """Let a peer's own handler answer, from a test's one in its place."""
    rest = handler.begin(call) if isinstance(handler, Prompt) else handler
    if rest is not None:
        await rest(call)


async def full(call: IncomingCall) -> None:
    """A handler of puts that never has room."""
    count = len(schema.decode(call.body, PutRequest).records)
    await call.send(schema.encode(PutReply(verdicts=(Verdict(outcome="full"),) * count)))


async def abstain(call: IncomingCall) -> None:
    """A handler of puts that has just begun, and does not know what it has forgotten."""
    count = len(schema.decode(call.body, PutRequest).records)
    verdict = Verdict(outcome="abstained", why="restarted")
    await call.send(schema.encode(PutReply(verdicts=(verdict,) * count)))


async def swarm(here: Town, count: int, *, cells: int = 64) -> list[Peer]:
    """Peers 1 to `count`, each joined by the first."""
    peers: list[Peer] = []
    for number in range(1, count + 1):
        peers.append(await here.open(number, by=peers[:1], cells=cells))
    return peers


async def owner_of(peer: Peer, uid: str = UID) -> LeaseView | None:
    return (await peer.dht.get_leases(GRID, [uid])).get(uid)


def held(peer: Peer, uid: str = UID) -> int | None:
    return peer.dht.lease_number(GRID, uid, trio.current_time())

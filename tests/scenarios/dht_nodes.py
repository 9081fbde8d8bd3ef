"""Real nodes on the loopback, in this process and in others, and timed reads at them."""

from __future__ import annotations

import gc
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from weakref import WeakSet

import trio

from p2pmoe.dht.messages import Manifest
from p2pmoe.errors import P2PMoEError
from p2pmoe.identity import KeyPair, PeerId
from p2pmoe.net.secure import SecureStream
from p2pmoe.net.tcp import TcpTransport
from p2pmoe.net.tls import Credentials
from p2pmoe.net.transport import Accepted, Channel
from p2pmoe.node import Node, NodeConfig, open_node
from p2pmoe.wire.address import Address
from p2pmoe.wire.envelope import Signed
from tests.dht.swarm_of_ids import GRID, dice
from tests.scenarios.dht_peer import LOOPBACK, PATIENT, SLOWLY, claim, hold

ROOT = Path(__file__).parents[2]
MANY = 8  # nodes in one process
CALM = 0.05  # seconds by which a task is late at most when this process has nothing else to do
CALM_LOOKS = 20  # in a row, that long each
READY_LIMIT = 600.0  # seconds until all are there; a quiet machine needs a tenth


class Mortal(TcpTransport):
    """A transport whose sockets can end as those of a process that SIGKILL ends: without a word."""

    def __init__(self, keys: KeyPair, config: NodeConfig) -> None:
        credentials = Credentials.for_open_network(keys, config.network)
        super().__init__(keys, credentials, config.pool.quota)
        self._streams: WeakSet[trio.SocketStream] = WeakSet()

    async def dial(self, address: Address, expect: PeerId | None) -> Channel:
        return self._noted(await super().dial(address, expect))

    async def serve(
        self,
        address: Address,
        accepted: Accepted,
        *,
        task_status: trio.TaskStatus[Address] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        async def noted(channel: Channel) -> P2PMoEError | None:
            return await accepted(self._noted(channel))

        await super().serve(address, noted, task_status=task_status)

    def die(self) -> None:
        for stream in self._streams:
            with suppress(OSError):  # the other side was faster
                stream.socket.shutdown(socket.SHUT_RDWR)

    def _noted(self, channel: Channel) -> Channel:
        assert isinstance(channel.stream, SecureStream)
        assert isinstance(channel.stream.transport_stream, trio.SocketStream)
        self._streams.add(channel.stream.transport_stream)
        return channel


@dataclass
class Life:
    """What it takes to end a node."""

    wire: Mortal
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    over: trio.Event = field(default_factory=trio.Event)


@dataclass
class Here:
    """The nodes of this process, each in a scope of its own."""

    tasks: trio.Nursery
    nodes: list[Node] = field(default_factory=list)
    uids: dict[str, str] = field(default_factory=dict)  # of the lease that a node has, by its id
    lives: dict[str, Life] = field(default_factory=dict)  # by id, too

    async def open(self, number: int) -> None:
        await self.tasks.start(self._live, f"ffn.{number}.0")

    async def _live(self, uid: str, *, task_status: trio.TaskStatus[None]) -> None:
        peers = (self.nodes[0].address,) if self.nodes else ()
        keys = KeyPair.generate()
        config = NodeConfig(
            keys=keys,
            peers=tuple(filter(None, peers)),
            listen=LOOPBACK,
            new_swarm=not peers,
            stop_within=0.0,
            join_within=60.0,
            pool=PATIENT,
            membership=SLOWLY,
        )
        life = self.lives[keys.peer_id.hex] = Life(Mortal(keys, config))
        with life.scope:
            async with open_node(config, transport=life.wire) as node:
                self.nodes.append(node)
                await claim(node, uid)
                self.uids[node.id.hex] = uid
                task_status.started()
                await hold(node, uid)
        life.over.set()

    async def open_many(self, count: int) -> None:
        """Each when those before have come to rest.

        Together they hold this one thread up for so long that calls time out, which makes more.
        """
        for number in range(count):
            await self.open(number)
            if number >= MANY:
                await calm()
                gc.freeze()  # a full collection of so many would hold all of them up for a second

    async def kill(self, nodes: list[Node]) -> None:
        """End these at once; returns when what that takes of this thread is done."""
        lives = [self.lives.pop(node.id.hex) for node in nodes]
        for node, life in zip(nodes, lives, strict=True):
            self.nodes.remove(node)
            del self.uids[node.id.hex]
            life.wire.die()
            life.scope.cancel()
        for life in lives:
            await life.over.wait()


@contextmanager
def uncollected() -> Iterator[None]:
    """No collection inside the block: each would stop all nodes of this process at once.

    Those of a node alone take a millisecond; of so many, 0.4 s after a third was killed.
    """
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextmanager
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    """Peers in processes of their own, for `begin`; none outlives the block."""
    begun: list[subprocess.Popen[str]] = []
    try:
        yield begun
    finally:
        for process in begun:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


async def begin(address: str, count: int, begun: list[subprocess.Popen[str]]) -> dict[str, str]:
    """So many peers, each when those before have come to rest; the uids that they have, by id."""
    uids: dict[str, str] = {}
    for number in range(count):
        begun.append(_process(address, f"ffn.{number}.1"))
        stdout = begun[-1].stdout
        assert stdout is not None
        uid, peer = (await trio.to_thread.run_sync(stdout.readline)).split()
        uids[peer] = uid
        await calm()
    return uids


async def calm() -> None:
    """Wait until the nodes of this process leave it time to spare."""
    looks = 0
    while looks < CALM_LOOKS:
        due = trio.current_time() + CALM
        await trio.sleep_until(due)
        looks = looks + 1 if trio.current_time() < due + CALM else 0


def _process(address: str, uid: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.scenarios.dht_peer", address, uid]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


@dataclass
class Gets:
    """Reads, one after the other, how long each took, and how many had to be repeated."""

    seconds: list[float] = field(default_factory=list)
    repeated: int = 0

    async def until(self, get: Callable[[], Awaitable[bool]]) -> None:
        """Read until it succeeds; once is enough, unless this machine has too much to do."""
        began = trio.current_time()
        with trio.fail_after(READY_LIMIT):
            while not await get():
                self.repeated += 1
                await trio.sleep(0.5)
        self.seconds.append(trio.current_time() - began)


async def gets(nodes: list[Node], uids: dict[str, str], made: Signed[Manifest]) -> Gets:
    """Each node reads some leases of others, a dictionary and the manifest."""
    rng, done = dice(1), Gets()
    living = {int(uid.split(".")[1]) for uid in uids.values()}
    for node in nodes:

        async def lease(peer: str, uid: str, node: Node = node) -> bool:
            view = (await node.dht.get_leases(GRID, [uid])).get(uid)
            return view is not None and view.peer.hex == peer

        async def dictionary(node: Node = node) -> bool:
            return living <= (await node.dht.get_prefix(GRID, "ffn")).coordinates.keys()

        async def grid(node: Node = node) -> bool:
            return await node.dht.get_manifest("ffn") == made

        for peer, uid in rng.sample(sorted(uids.items()), 3):
            await done.until(partial(lease, peer, uid))
        await done.until(dictionary)
        await done.until(grid)
    return done

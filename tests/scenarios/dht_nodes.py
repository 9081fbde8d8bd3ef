"""Real nodes on the loopback, in this process and in others, and timed reads at them."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import trio

from p2pmoe.dht.messages import Manifest
from p2pmoe.node import Node, NodeConfig, open_node
from p2pmoe.wire.envelope import Signed
from tests.dht.swarm_of_ids import GRID, dice
from tests.scenarios.dht_peer import LOOPBACK, PATIENT, SLOWLY, claim, hold

ROOT = Path(__file__).parents[2]
MANY = 8  # nodes in one process
CALM = 0.05  # seconds by which a task is late at most when this process has nothing else to do
CALM_LOOKS = 20  # in a row, that long each
READY_LIMIT = 600.0  # seconds until all are there; a quiet machine needs a tenth


@dataclass
class Here:
    """The nodes of this process, each in a scope of its own."""

    tasks: trio.Nursery
    nodes: list[Node] = field(default_factory=list)
    uids: dict[str, str] = field(default_factory=dict)  # of the lease that a node has, by its id
    ends: dict[str, trio.CancelScope] = field(default_factory=dict)
    ended: dict[str, trio.Event] = field(default_factory=dict)

    async def open(self, number: int) -> None:
        await self.tasks.start(self._live, f"ffn.{number}.0")

    async def _live(self, uid: str, *, task_status: trio.TaskStatus[None]) -> None:
        peers = (self.nodes[0].address,) if self.nodes else ()
        config = NodeConfig(
            peers=tuple(filter(None, peers)),
            listen=LOOPBACK,
            new_swarm=not peers,
            stop_within=0.0,  # its end is as sudden as a kill
            join_within=60.0,
            pool=PATIENT,
            membership=SLOWLY,
        )
        ended = trio.Event()
        with trio.CancelScope() as scope:
            async with open_node(config) as node:
                self.nodes.append(node)
                me = node.id.hex
                self.ends[me], self.ended[me] = scope, ended
                await claim(node, uid)
                self.uids[me] = uid
                task_status.started()
                await hold(node, uid)
        ended.set()

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
        gc.freeze()  # as when one is opened: what lives now is not looked through any more
        for node in nodes:
            self.nodes.remove(node)
            del self.uids[node.id.hex]
            self.ends.pop(node.id.hex).cancel()
        for node in nodes:
            await self.ended.pop(node.id.hex).wait()


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

"""A swarm in memory whose lines have weather, and a training thread's handle of it.

Two servers share the experts of a grid; a client is connected by a real `Swarm`, whose calls cross
from a thread into the one loop that runs everything, under a virtual clock. The clock stands still
while a thread computes and jumps while it waits, so that seconds are those of the network alone.
"""

from __future__ import annotations

import gc
import math
import random
import threading
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import trio
from trio.testing import MockClock

from p2pmoe.experts.compute import ComputeParams
from p2pmoe.experts.service import ServeParams
from p2pmoe.experts.serving import Server, ServerConfig, serve_experts
from p2pmoe.experts.uid import Grid
from p2pmoe.identity import KeyPair
from p2pmoe.moe.select import View
from p2pmoe.moe.service import MixtureService
from p2pmoe.nn import DMoE, RemoteExpert
from p2pmoe.node import Node, NodeConfig, open_node
from p2pmoe.swarm import TIMEOUT, Bridge, Swarm
from p2pmoe.testing.memory import Line, MemoryNetwork
from p2pmoe.wire.address import Address

T = TypeVar("T")
GRID = Grid("ffn", (2, 2))
HIDDEN = 4
PARAMS = ServeParams(compute=ComputeParams(threaded=False))
SERVERS, CLIENT, GUEST = ("ada", "bob"), "eve", "fay"
HOSTS = (*SERVERS, CLIENT, GUEST)
CLEAR = Line(latency=0.01)
TASKS_A_CONNECTION = 6  # of both ends: each has an owner, a writer, and one that keeps time


class HeldSwarm(Swarm):
    """A swarm for threads beside a virtual clock: it runs while they wait here, and only then."""

    clock: MockClock
    computing = False  # whether a thread does, or waits here

    def call(self, afn: Callable[..., Awaitable[T]], *args: Any, timeout: float = TIMEOUT) -> T:
        async def timed() -> T:
            self.clock.autojump_threshold = 0.0
            try:
                return await afn(*args)
            finally:
                self.clock.autojump_threshold = math.inf if self.computing else 0.0

        return super().call(timed, timeout=timeout)


@dataclass
class World:
    """The swarm, and what its network has."""

    clock: MockClock
    seed: int
    network: MemoryNetwork = field(init=False)
    nodes: dict[str, Node] = field(default_factory=dict)
    servers: list[Server] = field(default_factory=list)
    swarm: HeldSwarm = field(init=False)
    grid: bytes = b""  # its digest
    base: int = 0  # tasks beside those of connections, when nothing happens
    _layers: dict[float, DMoE] = field(default_factory=dict)
    _remotes: dict[float, RemoteExpert] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.dice = random.Random(self.seed)
        self.network = MemoryNetwork(self.dice, CLEAR)

    @property
    def client(self) -> Node:
        return self.nodes[CLIENT]

    async def begin(self) -> None:
        """Wait until every expert is found, and count what then runs."""

        def find() -> None:
            self.swarm.wait_for(GRID.name, experts=GRID.size)
            self.layer(TIMEOUT)

        await self.in_thread(find)
        self.grid = self.swarm.node.dht._pinned[GRID.name].digest
        self.base = 10**9
        await self.rest(3.0)
        self.base = min([await self._counted() for _ in range(10)])

    async def _counted(self) -> int:
        await trio.sleep(0.37)
        return self.tasks()

    def layer(self, timeout: float) -> DMoE:
        """A layer of that patience, made once; from a thread."""
        if timeout not in self._layers:
            self._layers[timeout] = DMoE(
                self.swarm, GRID.name, HIDDEN, timeout=timeout, k_best=3, grace=timeout / 3
            )
        return self._layers[timeout]

    def remote(self, timeout: float) -> RemoteExpert:
        """An expert of the second server, asked with that patience; from a thread."""
        if timeout not in self._remotes:
            uid = self.servers[1].uids[0]
            self._remotes[timeout] = RemoteExpert(self.swarm, uid, timeout=timeout)
        return self._remotes[timeout]

    def address(self, host: str) -> Address:
        return Address(host, 4747)

    @asynccontextmanager
    async def open(self, host: str, **options: Any) -> AsyncIterator[Node]:
        """A node on a host, which joins by the first server."""
        keys = KeyPair.from_seed(host.encode().ljust(32))
        peers = () if host == SERVERS[0] else (self.address(SERVERS[0]),)
        settings = {
            "peers": peers,
            "new_swarm": not peers,
            "listen": self.address(host),
            "keys": keys,
            "wall_clock": lambda: 1.0e9 + self.clock.current_time(),
            **options,
        }
        transport = self.network.transport(keys, host)
        config = NodeConfig(**settings)
        async with open_node(config, transport=transport, rng=self.dice) as node:
            self.nodes[host] = node
            yield node

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Run work that computes and calls the swarm; returns or raises as it does."""
        self.clock.autojump_threshold, self.swarm.computing = math.inf, True
        try:
            return await trio.to_thread.run_sync(work)
        finally:
            self.clock.autojump_threshold, self.swarm.computing = 0.0, False

    def heal(self) -> None:
        """Clear weather."""
        self.network.heal()
        for a in HOSTS:
            for b in HOSTS:
                if a != b:
                    self.network.break_after(a, b, None)
                    self.network.set_line(a, b, CLEAR)

    def quiet(self) -> bool:
        """Whether nothing runs but what always does, and no memory is reserved."""
        reserved = [node.pool.stats()["p2pmoe_payload_bytes_reserved"] for node in self.living()]
        return self.tasks() <= self.base and not any(reserved)

    @property
    def view(self) -> View:
        """The experts that the client can ask now."""
        service: MixtureService = self.swarm._parts["mixture", GRID.name]
        return service.view

    def living(self) -> list[Node]:
        return [self.nodes[host] for host in (*SERVERS, CLIENT)]

    def tasks(self) -> int:
        """How many tasks there are beside those of connections."""
        living = trio.lowlevel.current_statistics().tasks_living
        return living - TASKS_A_CONNECTION * len(self.network._connections)

    async def settle(self, within: float, why: str = "") -> None:
        """Wait until nothing is left of what was, and every expert can be asked; or fail."""
        with trio.move_on_after(within):
            while not (self.quiet() and len(self.view) == GRID.size):
                await trio.sleep(0.25)
            return
        raise AssertionError(
            f"{self.tasks()} tasks, at first {self.base}, and {len(self.view)} experts, after {why}"
        )

    async def rest(self, seconds: float) -> None:
        """Let time go by, and whatever is late come to its end."""
        await trio.sleep(seconds)
        await self.settle(10 * seconds)


def tables() -> Counter[str]:
    """How many things the tables of all living objects of the package have, and how many live."""
    gc.collect()
    sizes: Counter[str] = Counter()
    for one in gc.get_objects():
        kind = type(one)
        if not str(kind.__module__).startswith("p2pmoe."):
            continue
        sizes[kind.__name__] += 1
        slots = [name for each in kind.__mro__ for name in getattr(each, "__slots__", ())]
        for name in (*slots, *getattr(one, "__dict__", ())):
            value = getattr(one, name, None)
            if isinstance(value, dict | set | list | deque):
                sizes[f"{kind.__name__}.{name}"] += len(value)
    return sizes


@asynccontextmanager
async def world(clock: MockClock, seed: int) -> AsyncIterator[World]:
    """Two servers with all experts of the grid, and a swarm that is connected to them."""
    here = World(clock, seed)
    async with AsyncExitStack() as stack:
        for host in SERVERS:
            first = host == SERVERS[0]
            config = ServerConfig(
                create=first,
                grids=(GRID,) if first else (),
                experts=GRID.size // len(SERVERS),
                hidden_dim=HIDDEN if first else None,
                params=PARAMS,
            )
            node = await stack.enter_async_context(here.open(host))
            here.servers.append(
                await stack.enter_async_context(serve_experts(node, config, here.dice))
            )
        bridge, opened = Bridge(), Future[Node]()
        lives = await stack.enter_async_context(trio.open_nursery())
        client = lambda: here.open(CLIENT, client_only=True, stop_within=2.0)  # noqa: E731  as `connect` has it
        lives.start_soon(bridge.live, client, opened)
        while not opened.done():
            await trio.sleep(0.01)
        finished = threading.Thread(target=int)
        finished.start()
        here.swarm = HeldSwarm(opened.result(), bridge, finished)
        here.swarm.clock = clock
        try:
            await here.begin()
            yield here
        finally:
            bridge.stop()

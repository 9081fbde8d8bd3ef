"""Nodes on one network in memory, each on a host of its own."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from p2pmoe.identity import KeyPair
from p2pmoe.node import Node, NodeConfig, NodeEvent, open_node
from p2pmoe.testing.memory import MemoryNetwork
from p2pmoe.wire.address import Address


def keys_of(host: str) -> KeyPair:
    return KeyPair.from_seed(host.encode().ljust(32, b"."))


class Town:
    """The network, and nodes by host."""

    def __init__(self) -> None:
        self.network = MemoryNetwork(random.Random(7))

    @asynccontextmanager
    async def open(self, host: str, *peers: Node | str, **options: object) -> AsyncIterator[Node]:
        keys = keys_of(host)
        if "state_dir" in options and not (options["state_dir"] / "key.pem").exists():
            keys.save(options["state_dir"] / "key.pem")
        names = [peer if isinstance(peer, str) else host_of(peer) for peer in peers]
        config = NodeConfig(
            keys=keys,
            listen=Address(host, 4747),
            peers=tuple(Address(name, 4747) for name in names),
            **options,
        )
        transport = self.network.transport(keys, host)
        async with open_node(config, transport=transport, rng=random.Random(host)) as node:
            yield node


def host_of(node: Node) -> str:
    return node.announced()[0].host


def states(node: Node) -> dict[str, str]:
    """The states of the other members, by host."""
    return {one.record.body.addresses[0].partition(":")[0]: one.state for one in node.members()}


async def until(happened: Callable[[], bool], within: float) -> float:
    """Wait until something is so; how many seconds that took."""
    began = trio.current_time()
    with trio.fail_after(within):
        while not happened():
            await trio.sleep(0.05)
    return trio.current_time() - began


class Heard:
    """What a node says that happens, from when `listen` began."""

    def __init__(self) -> None:
        self.events: list[NodeEvent] = []

    async def listen(self, node: Node, *, task_status=trio.TASK_STATUS_IGNORED) -> None:
        with node.events() as events:
            task_status.started()
            async for event in events:
                self.events.append(event)

    def of(self, *kinds: type) -> list[tuple[str, str]]:
        """The events of these kinds, with the peer of each."""
        return [
            (type(one).__name__, one.peer.short) for one in self.events if isinstance(one, kinds)
        ]

"""Servers as whole nodes, on a network in memory and under its clock, and what they teach."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import torch

from p2pmoe.experts.backend import Update
from p2pmoe.experts.compute import ComputeParams
from p2pmoe.experts.service import ServeParams
from p2pmoe.experts.serving import Server, ServerConfig, serve_experts
from p2pmoe.experts.uid import Grid
from p2pmoe.identity import KeyPair
from p2pmoe.node import Node, NodeConfig, open_node
from p2pmoe.testing.memory import MemoryNetwork
from p2pmoe.wire.address import Address

GRID = Grid("ffn", (2, 2))
PARAMS = ServeParams(compute=ComputeParams(threaded=False))
FIRST = ServerConfig(create=True, grids=(GRID,), experts=2, hidden_dim=4, params=PARAMS)
JOINER = ServerConfig(experts=2, params=PARAMS)


class World:
    """A network; its hosts are named by the number of their key."""

    def __init__(self) -> None:
        self.dice = random.Random(1)
        self.network = MemoryNetwork(self.dice)

    @asynccontextmanager
    async def node(self, number: int, *peers: Node) -> AsyncIterator[Node]:
        """A node of its own host, which joins by these."""
        keys = KeyPair.from_seed(bytes([number]) * 32)
        config = NodeConfig(
            peers=tuple(peer.address for peer in peers if peer.address),
            new_swarm=not peers,
            listen=Address(f"host{number}", 4747),
            keys=keys,
            wall_clock=lambda: 1.0e9,
        )
        transport = self.network.transport(keys, f"host{number}")
        async with open_node(config, transport=transport, rng=self.dice) as node:
            yield node

    @asynccontextmanager
    async def server(
        self, number: int, config: ServerConfig, *peers: Node
    ) -> AsyncIterator[tuple[Node, Server]]:
        async with self.node(number, *peers) as node, serve_experts(node, config, self.dice) as it:
            yield node, it


def teach(server: Server, steps: int = 1) -> None:
    """Let every expert of a server learn, each from numbers of its own."""
    for uid, expert in server.service.experts.items():
        rng = torch.Generator().manual_seed(sum(uid.encode()))
        for at in range(steps):
            rows, grads = (torch.randn(3, 4, generator=rng) for _ in range(2))
            key = (uid, (expert.backend.step + at).to_bytes(16, "big"))
            expert.backend.backward([Update(inputs=[rows], grads=[grads], key=key)], 0.0)


def state_of(server: Server, uid: str) -> dict[str, torch.Tensor]:
    """Everything that an expert's next step depends on, copied."""
    backend = server.service.experts[uid].backend
    state = {f"weight {name}": one for name, one in backend.module.state_dict().items()}
    for index, memory in backend.optimizer.state_dict()["state"].items():
        state |= {f"memory {index} {key}": one for key, one in memory.items()}
    state["step"] = torch.tensor(backend.step)
    return {name: one.clone() for name, one in state.items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two states are equal bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)

"""A server and its callers over real connections, on a network in memory and under its clock."""

from __future__ import annotations

import math
import random
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import torch
import trio

from p2pmoe.experts.accounts import AccountParams
from p2pmoe.experts.messages import PartReply
from p2pmoe.identity import KeyPair
from p2pmoe.net.pool import Pool, PoolParams
from p2pmoe.testing.memory import Line, MemoryNetwork
from p2pmoe.wire.address import Address
from p2pmoe.wire.peer_record import Contact
from tests.experts.calls import (
    ANY_NUMBER,
    NETWORK,
    FakeCall,
    Server,
    backward,
    forward,
    offer,
    read_replies,
)

UID, OTHER = "ffn.0.1", "ffn.3.3"
SERVER = KeyPair.from_seed(b"s" * 32)
BULK = Line(latency=0.05, bandwidth=10e6)


def rows(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))


@dataclass
class Caller:
    """One client with a pool of its own."""

    pool: Pool
    server: Contact
    replies: dict[int, tuple[PartReply, list[torch.Tensor]]] = field(default_factory=dict)

    async def ask(self, call: FakeCall) -> list[str]:
        """Make a call, collect what comes; the codes of its parts."""
        asked = self.pool.open_call(self.server, call.method, call.body, [call.payload], bulk=True)
        async with asked as parts:
            answers = [(part.body, part.payload) async for part in parts]
        self.replies = read_replies(call, answers)
        return [self.replies[index][0].code for index in sorted(self.replies)]


class World:
    """A server on one host, and as many clients as a test wants on others."""

    def __init__(self, parts: trio.Nursery, accounts: AccountParams) -> None:
        self.dice = random.Random(1)
        self.network = MemoryNetwork(self.dice, BULK)
        self.server = Server(max_batch=4096, accounts=accounts)
        self._parts = parts

    def _pool(self, keys: KeyPair, host: str) -> tuple[Pool, object]:
        transport = self.network.transport(keys, host)
        return Pool(transport, lambda: None, NETWORK, PoolParams(), self.dice), transport

    async def open(self) -> World:
        pool, transport = self._pool(SERVER, "server")
        pool.handlers |= self.server.handlers
        await self._parts.start(pool.run)
        address = await self._parts.start(transport.serve, Address("server", 4747), pool.accepted)
        self.contact = Contact(SERVER.peer_id, (address,))
        for uid in (UID, OTHER):
            await self.server.service.build(offer(), uid)
        return self

    async def compute(self) -> None:
        """Begin to work on what callers ask; without it, parts wait in the queue."""
        await self._parts.start(self.server.service.run)

    async def caller(self, number: int) -> Caller:
        pool, _ = self._pool(KeyPair.from_seed(struct.pack("32B", *[number] * 32)), f"c{number}")
        await self._parts.start(pool.run)
        return Caller(pool, self.contact)


@asynccontextmanager
async def world(
    *, compute: bool = True, accounts: AccountParams = ANY_NUMBER
) -> AsyncIterator[World]:
    async with trio.open_nursery() as parts:
        here = await World(parts, accounts).open()
        if compute:
            await here.compute()
        yield here
        parts.cancel_scope.cancel()


async def test_a_call_of_several_parts_goes_there_and_back(autojump_clock: object) -> None:
    async with world() as here:
        caller = await here.caller(1)
        assert await caller.ask(
            forward((UID, rows(3)), ("ffn.1.1", rows(1)), (OTHER, rows(2)))
        ) == [
            "",
            "unavailable",
            "",
        ]
        for index, uid, count in ((0, UID, 3), (2, OTHER, 2)):
            _, (y,) = caller.replies[index]
            assert torch.allclose(y, here.server.module(uid)(rows(count)), atol=1e-6)
        assert await caller.ask(backward((UID, rows(3), rows(3, seed=1)))) == [""]
        assert caller.replies[0][0].step == 1


async def test_large_tensors_cross_in_chunks_and_take_the_time_of_the_line(
    autojump_clock: object,
) -> None:
    async with world() as here:
        caller, x = await here.caller(1), rows(4096).repeat(8, 1)
        await caller.ask(forward((UID, rows(1))))
        call = forward(*((UID, part) for part in x.split(4096)))
        begun = trio.current_time()
        assert await caller.ask(call) == [""] * 8
        took = trio.current_time() - begun
        least = 2 * BULK.latency + 2 * x.nbytes / BULK.bandwidth
        assert least <= took <= 3 * least
        for index, part in enumerate(x.split(4096)):
            assert torch.allclose(
                caller.replies[index][1][0], here.server.module(UID)(part), atol=1e-6
            )


async def test_eight_good_callers_and_bad_ones_share_an_expert(autojump_clock: object) -> None:
    async with world() as here:
        codes: dict[int, list[str]] = {}

        async def ask(number: int, x: torch.Tensor) -> None:
            caller = await here.caller(number)
            codes[number] = await caller.ask(forward((UID, x)))
            if codes[number] == [""]:
                expected = here.server.module(UID)(x)
                assert torch.allclose(caller.replies[0][1][0], expected, atol=1e-6)

        async with trio.open_nursery() as callers:
            for number in range(1, 9):
                callers.start_soon(ask, number, rows(2, seed=number))
            callers.start_soon(ask, 9, torch.randn(2, 7))
            callers.start_soon(ask, 10, rows(2) * math.nan)
        assert codes == {n: [""] for n in range(1, 9)} | {9: ["schema"], 10: ["nonfinite"]}


async def test_a_call_that_is_given_up_is_dropped_at_the_server_too(
    autojump_clock: object,
) -> None:
    async with world(compute=False) as here:
        caller = await here.caller(1)
        with trio.move_on_after(1):
            await caller.ask(backward((UID, rows(2), rows(2)), (OTHER, rows(2), rows(2))))
        await trio.sleep(0.2)  # within so many seconds, says the rule
        assert all(row["dropped"] for row in here.server.service.section().values())
        await here.compute()
        assert await caller.ask(forward((UID, rows(1)))) == [""]
        section = here.server.service.section()
        assert [section[uid]["dropped"] for uid in (UID, OTHER)] == [1, 1]
        assert [section[uid]["updates"] for uid in (UID, OTHER)] == [0, 0]

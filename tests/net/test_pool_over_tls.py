"""The same pools on real sockets, with TLS: what the network in memory cannot show."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from p2pmoe.errors import ConnectionLost, NotAllowed
from p2pmoe.identity import KeyPair
from p2pmoe.net.pool import PeerLost, Pool, PoolEvent, PoolParams
from p2pmoe.net.tcp import TcpTransport
from p2pmoe.net.tls import Credentials, Tls
from p2pmoe.wire.address import Address
from p2pmoe.wire.peer_record import Contact
from tests.net.pools import KEYS, echo
from tests.net.strangers import ALICE, LONG_AGO, forge

ANY_PORT = Address("127.0.0.1", 0)
WITHIN = 30.0  # seconds, for what takes milliseconds


@asynccontextmanager
async def serving(keys: KeyPair, network: str = "home") -> AsyncIterator[tuple[Pool, Contact]]:
    """A pool that listens on the loopback interface, and where it does."""
    credentials = Credentials.for_open_network(keys, network)
    transport = TcpTransport(keys, credentials)
    pool = Pool(transport, lambda: None, credentials.network, PoolParams(), random.Random(1))
    pool.handlers["echo"] = echo
    with trio.fail_after(WITHIN):
        async with trio.open_nursery() as parts:
            await parts.start(pool.run)
            address = await parts.start(transport.serve, ANY_PORT, pool.accepted)
            yield pool, Contact(keys.peer_id, (address,))
            parts.cancel_scope.cancel()


async def test_payloads_come_whole_through_tls():
    async with serving(KEYS[0]) as (a, _), serving(KEYS[1]) as (_, b):
        for size in (0, 1, 5_000_000):
            payload = random.Random(size).randbytes(size)
            part = await a.call(b, "echo", b"body", [payload], bulk=True)
            assert (part.body, part.payload) == (b"body", payload)


async def test_a_goodbye_ends_both_sides_in_good_order():
    async with serving(KEYS[0]) as (a, _), serving(KEYS[1]) as (pool, b):
        await a.call(b, "echo", b"")
        send, receive = trio.open_memory_channel[PoolEvent](1)
        a.observers.append(send.send_nowait)
        await pool.drain()
        assert await receive.receive() == PeerLost(b.peer, None)


async def test_a_stranger_learns_why_it_is_not_let_in_where_that_can_be_known():
    async with serving(KEYS[0], "elsewhere") as (a, _), serving(KEYS[1]) as (pool, b):
        with pytest.raises(NotAllowed, match=r"127\.0\.0\.1:.* tls: .*another network") as caught:
            await a.call(b, "echo", b"")
        assert caught.value.stage == "tls"
        assert pool.stats()["p2pmoe_peers_connected"] == 0


async def test_a_verdict_of_the_listener_is_heard_in_the_greeting():
    network = "forgery"
    keys = ALICE
    honest = Credentials.for_open_network(keys, network)
    expired = Credentials.of(keys, honest.authority, forge(keys.public_key, not_after=LONG_AGO))
    transport = TcpTransport(keys, expired)
    transport._tls = Tls(expired, wall_clock=lambda: 0.0)  # it does not know that it has expired
    pool = Pool(transport, lambda: None, expired.network, PoolParams(), random.Random(1))
    async with serving(KEYS[1], network) as (_, b), trio.open_nursery() as parts:
        await parts.start(pool.run)
        with pytest.raises(NotAllowed, match="tls: it finds this peer's certificate expired"):
            await pool.call(b, "echo", b"")
        parts.cancel_scope.cancel()


async def test_a_server_that_dies_loses_the_calls_on_it():
    async with serving(KEYS[0]) as (a, _), serving(KEYS[1]) as (pool, b):

        async def die(call) -> None:
            for connection in list(pool._connections()):
                connection.drop(ConnectionLost("power cut"))

        pool.handlers["die"] = die
        with pytest.raises(ConnectionLost, match="call: the connection ended"):
            await a.call(b, "die", b"", bulk=True)
        assert (await a.call(b, "echo", b"again")).body == b"again"

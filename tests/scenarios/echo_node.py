"""A process that echoes over TLS on the loopback interface: `python echo_node.py`.

It prints its address and its id, and ends when its standard input does. The other side of it, a
pool of the same network, is `open_pool`.
"""

from __future__ import annotations

import random
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from p2pmoe.identity import KeyPair
from p2pmoe.net.incoming import IncomingCall
from p2pmoe.net.pool import Pool, PoolParams
from p2pmoe.net.quota import QuotaParams
from p2pmoe.net.tcp import TcpTransport
from p2pmoe.net.tls import Credentials
from p2pmoe.wire.address import Address
from p2pmoe.wire.peer_record import Contact

MIB = 2**20
ROOM = QuotaParams(payload_a_peer=1024 * MIB, payload_in_all=2048 * MIB)


@asynccontextmanager
async def open_pool(seed: int) -> AsyncIterator[tuple[Pool, Contact]]:
    """A pool that echoes and listens on a free port of loopback, until the block ends."""
    keys = KeyPair.from_seed(bytes([seed]) * 32)
    credentials = Credentials.for_open_network(keys, "echo")
    transport = TcpTransport(keys, credentials)
    params = PoolParams(quota=ROOM)
    pool = Pool(transport, lambda: None, credentials.network, params, random.Random(seed))
    pool.handlers["echo"] = echo
    async with trio.open_nursery() as parts:
        await parts.start(pool.run)
        address = await parts.start(transport.serve, Address("127.0.0.1", 0), pool.accepted)
        yield pool, Contact(keys.peer_id, (address,))
        parts.cancel_scope.cancel()


async def echo(call: IncomingCall) -> None:
    await call.send(call.body, [call.payload])


async def _main() -> None:
    async with open_pool(1) as (_, contact):
        print(contact.addresses[0], contact.peer.raw.hex(), flush=True)  # noqa: T201  data
        await trio.to_thread.run_sync(sys.stdin.read)


if __name__ == "__main__":
    trio.run(_main)

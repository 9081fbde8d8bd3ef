"""Peers on one network in memory, and strangers among them that break its rules, for tests."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

from p2pmoe.identity import KeyPair
from p2pmoe.net.incoming import IncomingCall
from p2pmoe.net.messages import Header, Hello, decode_header
from p2pmoe.net.pool import Pool, PoolEvent, PoolParams
from p2pmoe.net.transport import Channel
from p2pmoe.testing.memory import MemoryNetwork, MemoryTransport
from p2pmoe.wire import schema
from p2pmoe.wire.address import Address
from p2pmoe.wire.framing import BULK_LIMITS, Frame, FrameReader, frame_prefix
from p2pmoe.wire.peer_record import Contact, PeerRecord, seal_record
from p2pmoe.wire.schema import Message

NETWORK = bytes(range(32))
PORT = 4747


def key(number: int) -> KeyPair:
    """The key of peer `number`; ids grow with the number."""
    return KEYS[number]


KEYS = sorted((KeyPair.from_seed(bytes([n]) * 32) for n in range(20)), key=lambda k: k.peer_id)


def host(number: int) -> str:
    return f"peer{number}"


def record_of(keys: KeyPair, address: Address, network: bytes = NETWORK, epoch: int = 1) -> bytes:
    record = PeerRecord(epoch=epoch, incarnation=1, addresses=(str(address),))
    return seal_record(keys, record, network).raw


@dataclass
class Peer:
    """A pool, and all that a test wants to know of it."""

    keys: KeyPair
    address: Address
    transport: MemoryTransport
    pool: Pool
    life: trio.CancelScope
    events: list[PoolEvent] = field(default_factory=list)

    @property
    def contact(self) -> Contact:
        return Contact(self.keys.peer_id, (self.address,))


class World:
    """A network in memory, and peers on it."""

    def __init__(self, lives: trio.Nursery, seed: int) -> None:
        self._lives = lives
        self.start = lives.start
        self.network = MemoryNetwork(random.Random(seed))

    async def peer(
        self,
        number: int,
        *,
        params: PoolParams | None = None,
        network: bytes = NETWORK,
        greeting: Callable[[], bytes | None] | None = None,
        listens: bool = True,
        epoch: int = 1,
    ) -> Peer:
        """Start a peer; it echoes by the method `echo`."""
        keys, address = key(number), Address(host(number), PORT)
        transport = self.network.transport(keys, host(number))
        record = record_of(keys, address, network, epoch) if listens else None
        pool = Pool(
            transport,
            greeting or (lambda: record),
            network,
            params or PoolParams(),
            random.Random(number),
        )
        pool.handlers["echo"] = echo
        life = await self._lives.start(_live, pool, transport, address if listens else None)
        peer = Peer(keys, address, transport, pool, life)
        pool.observers.append(peer.events.append)
        return peer


async def _live(
    pool: Pool,
    transport: MemoryTransport,
    address: Address | None,
    *,
    task_status: trio.TaskStatus[trio.CancelScope],
) -> None:
    with trio.CancelScope() as life:
        async with trio.open_nursery() as parts:
            await parts.start(pool.run)
            if address is not None:
                await parts.start(transport.serve, address, pool.accepted)
            task_status.started(life)


async def echo(call: IncomingCall) -> None:
    """Answer with what was asked."""
    await call.send(call.body, [call.payload])


@asynccontextmanager
async def world(seed: int = 1) -> AsyncIterator[World]:
    """A network that ends with the block, and all its peers with it."""
    async with trio.open_nursery() as lives:
        yield World(lives, seed)
        lives.cancel_scope.cancel()


class Stranger:
    """A peer that says what a test wants, frame by frame."""

    def __init__(self, channel: Channel) -> None:
        self.stream = channel.stream
        self._reader = FrameReader(BULK_LIMITS)
        self._ready: list[Frame] = []

    async def say(self, *messages: Message | tuple[Message, bytes]) -> None:
        await self.stream.send_all(b"".join(map(wire, messages)))

    async def hear(self) -> Header:
        """The next header; raises `EOFError` at the end."""
        return (await self.hear_frame())[0]

    async def hear_frame(self) -> tuple[Header, bytes]:
        while not self._ready:
            if not (data := await self.stream.receive_some()):
                raise EOFError
            self._ready = self._reader.receive_data(data)
        frame = self._ready.pop(0)
        return decode_header(frame.header), bytes(frame.payload)


def wire(message: Message | tuple[Message, bytes]) -> bytes:
    """A frame as it crosses the wire."""
    header, payload = message if isinstance(message, tuple) else (message, b"")
    raw = schema.encode(header)
    return frame_prefix(len(raw), len(payload)) + raw + payload


def hello(**changes: object) -> Hello:
    fields = {"version_min": 1, "version_max": 1, "network": NETWORK, "channel": "bulk"}
    return Hello(**(fields | changes))


async def dial(w: World, to: Peer, number: int = 9) -> Stranger:
    """A stranger that dialled a peer, and has said nothing."""
    transport = w.network.transport(key(number), host(number))
    return Stranger(await transport.dial(to.address, None))


async def greet(w: World, to: Peer, number: int = 9, **changes: object) -> Stranger:
    """A stranger that dialled a peer and was let in."""
    stranger = await dial(w, to, number)
    await stranger.say(hello(**changes))
    assert isinstance(await stranger.hear(), Hello)
    return stranger


class Ambush:
    """A listener that says what a test wants to whoever dials it."""

    def __init__(self, number: int) -> None:
        self.contact = Contact(key(number).peer_id, (Address(host(number), PORT),))
        self._send, self._receive = trio.open_memory_channel[Stranger](10)

    async def accepted(self, channel: Channel) -> None:
        await self._send.send(Stranger(channel))
        await trio.sleep_forever()

    async def next(self) -> Stranger:
        """The next that dialled; it has said nothing that was read."""
        return await self._receive.receive()

    async def next_greeted(self) -> Stranger:
        stranger = await self.next()
        said = await stranger.hear()
        assert isinstance(said, Hello)
        await stranger.say(hello(channel=said.channel))
        return stranger


async def ambush(w: World, number: int = 9) -> Ambush:
    waiting = Ambush(number)
    transport = w.network.transport(key(number), host(number))
    await w.start(transport.serve, waiting.contact.addresses[0], waiting.accepted)
    return waiting

"""A fault proxy: a line between real processes that delays, narrows, spoils, stalls and cuts.

It takes TCP connections in at an address of its own and carries their bytes to its target. What
each direction does to them is a `Fault`, and may be another one at any time. A server that should
be reached through it listens at the target and announces the proxy's address.

Rules: it does not know what it carries, so it cannot break TLS, only what TLS rests on. It holds no
more than `PIECES` pieces for each direction of a connection: a reader that stops stops the writer.
No dice but `rng`. It is for tests: loopback, or a namespace of their own.
"""

from __future__ import annotations

import math
import random
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

import trio

from p2pmoe.wire.address import Address

PIECE = 16 * 1024  # bytes that are carried at once; a TLS record's size
PIECES = 128  # on their way, each way of a connection: 2 MiB, which is 10 MB/s for 200 ms
CONNECTIONS = 64  # at once, so that all pieces are 256 MiB; a guess
ABORT = struct.pack("ii", 1, 0)  # SO_LINGER: closing sends RST
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What one direction does to bytes; by itself, nothing.

    They take `delay` seconds, and up to `jitter` seconds more, but stay in order. All connections
    share `bandwidth` bytes a second. Each is reset when it has carried `cut_after` bytes. `garbage`
    is the share of pieces in which a bit is flipped. A `stalled` direction carries nothing for as
    long as it is so: both ends believe that the line is there.
    """

    delay: float = 0.0
    jitter: float = 0.0
    bandwidth: float = math.inf
    cut_after: float = math.inf
    garbage: float = 0.0
    stalled: bool = False


CLEAR = Fault()


class _Way:
    """One direction of all connections."""

    def __init__(self, rng: random.Random) -> None:
        self.fault = CLEAR
        self.carried = 0  # bytes
        self._rng = rng
        self._free_at = 0.0
        self._changed = trio.Event()

    def set(self, fault: Fault) -> None:
        """Be like this from now on; what is on its way arrives when it would have."""
        self.fault = fault
        self._changed.set()
        self._changed = trio.Event()

    def arrival(self, size: int) -> float:
        """When so many bytes that are sent now arrive."""
        fault = self.fault
        self._free_at = max(self._free_at, trio.current_time()) + size / fault.bandwidth
        return self._free_at + fault.delay + fault.jitter * self._rng.random()

    def spoiled(self, data: bytes) -> bytes:
        """What becomes of these bytes."""
        if not data or self._rng.random() >= self.fault.garbage:
            return data
        bit = self._rng.randrange(8 * len(data))
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        return bytes(changed)

    async def flows(self) -> None:
        """Wait for as long as this direction is stalled."""
        while self.fault.stalled:
            await self._changed.wait()


class _Cut(Exception):
    """A connection is to end at once, on both sides."""


class FaultProxy:
    """The line, made by `open_proxy`. `target` may be changed; it counts for new connections."""

    def __init__(self, target: Address, rng: random.Random) -> None:
        self.target = target
        self.address = target  # where the proxy listens, once it does
        self._there, self._back = _Way(rng), _Way(rng)
        self._lives: set[trio.CancelScope] = set()
        self._refusing = False
        self._stirred = trio.Event()

    @property
    def connections(self) -> int:
        """How many are carried now."""
        return len(self._lives)

    @property
    def carried(self) -> tuple[int, int]:
        """Bytes that have come through to the target, and back."""
        return self._there.carried, self._back.carried

    def set(self, *, there: Fault = CLEAR, back: Fault = CLEAR) -> None:
        """What happens from now on to bytes for the target, and to those from it."""
        self._there.set(there)
        self._back.set(back)

    def cut(self) -> int:
        """Reset all connections; how many there were."""
        for life in self._lives:
            life.cancel()
        return len(self._lives)

    def refuse(self, *, refusing: bool = True) -> None:
        """Refuse new connections, as a machine does where nobody listens; or take them again."""
        self._refusing = refusing
        self._stirred.set()
        self._stirred = trio.Event()

    async def serve(
        self, host: str, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Take connections in on a port of `host`, always the same one, until cancelled."""
        port = 0
        async with trio.open_nursery() as connections:
            while True:
                [listener, *_] = await trio.open_tcp_listeners(port, host=host)
                port = listener.socket.getsockname()[1]
                self.address = Address(host, port)
                task_status.started()
                task_status = trio.TASK_STATUS_IGNORED
                async with listener, trio.open_nursery() as doors:
                    doors.start_soon(self._accept, listener, connections)
                    while not self._refusing:
                        await self._stirred.wait()
                    doors.cancel_scope.cancel()
                while self._refusing:
                    await self._stirred.wait()

    async def _accept(self, listener: trio.SocketListener, connections: trio.Nursery) -> None:
        while True:
            stream = await listener.accept()
            connections.start_soon(self._attend, stream)

    async def _attend(self, near: trio.SocketStream) -> None:
        """A connection that came in: dial the target for it, and carry its bytes."""
        try:
            await self._there.flows()
            if self.connections < CONNECTIONS:
                far = await trio.open_tcp_stream(self.target.host, self.target.port)
                await self.carry(near, far)
        except OSError:  # nobody listens there: neither does anybody here
            pass
        finally:
            await _reset(near)

    async def carry(
        self, near: trio.abc.HalfCloseableStream, far: trio.abc.HalfCloseableStream
    ) -> None:
        """Carry bytes between two streams until both have ended, or one breaks; close them."""
        with trio.CancelScope() as life:
            self._lives.add(life)
            try:
                async with trio.open_nursery() as ways:
                    ways.start_soon(self._carry, near, far, self._there, life)
                    ways.start_soon(self._carry, far, near, self._back, life)
            finally:
                self._lives.discard(life)
                end = _reset if life.cancel_called else trio.aclose_forcefully
                try:
                    await end(near)
                finally:
                    await end(far)

    async def _carry(
        self,
        source: trio.abc.ReceiveStream,
        sink: trio.abc.HalfCloseableStream,
        way: _Way,
        life: trio.CancelScope,
    ) -> None:
        send, receive = trio.open_memory_channel[tuple[float, bytes]](PIECES)
        try:
            async with send, receive, trio.open_nursery() as halves:
                halves.start_soon(_take, source, send, way)
                await _give(receive, sink, way)
                halves.cancel_scope.cancel()
        except* (_Cut, trio.BrokenResourceError, trio.ClosedResourceError):
            life.cancel()


async def _take(
    source: trio.abc.ReceiveStream, onto: trio.MemorySendChannel[tuple[float, bytes]], way: _Way
) -> None:
    """Put on the line what one side sends; empty bytes are its end."""
    data, at = b"?", 0.0
    while data:
        await way.flows()
        data = bytes(await source.receive_some(PIECE))
        at = max(at, way.arrival(len(data)))
        await onto.send((at, way.spoiled(data)))


async def _give(
    line: trio.MemoryReceiveChannel[tuple[float, bytes]],
    sink: trio.abc.HalfCloseableStream,
    way: _Way,
) -> None:
    """Give the other side what has arrived."""
    carried = 0
    async for at, data in line:
        await trio.sleep_until(at)
        await way.flows()
        if not data:
            await sink.send_eof()
            return
        left = max(0, int(min(len(data), way.fault.cut_after - carried)))
        await sink.send_all(data[:left])
        carried += left
        way.carried += left
        if carried >= way.fault.cut_after:
            raise _Cut


async def _reset(stream: trio.abc.AsyncResource) -> None:
    """Close a stream so that the other side learns of a failure."""
    if isinstance(stream, trio.SocketStream) and stream.socket.fileno() >= 0:
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT)
    await trio.aclose_forcefully(stream)


@asynccontextmanager
async def open_proxy(
    target: Address, *, host: str = LOOPBACK, rng: random.Random | None = None
) -> AsyncIterator[FaultProxy]:
    """A line to `target` that begins at `proxy.address`, until the block ends."""
    proxy = FaultProxy(target, rng or random.Random(0))  # noqa: S311  seeded, so that runs can be repeated
    async with trio.open_nursery() as lines:
        await lines.start(partial(proxy.serve, host))
        yield proxy
        lines.cancel_scope.cancel()

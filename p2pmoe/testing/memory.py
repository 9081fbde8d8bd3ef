"""A network in memory behind the seam of `net.transport`, for tests under a virtual clock.

Hosts are names; a transport is one peer on one host. Lines between hosts have latency, jitter and
bandwidth; connections can be cut, hosts parted and killed. There is no TLS: a channel's key is
simply the listener's. Rules: no task of its own, no real time, and no dice but the network's `rng`,
so a test that runs twice sees the same network twice. Buffers are bounded: a reader that stops
stops the writer.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import trio

from p2pmoe.errors import AddressInUse, ConfigurationError, NotAllowed, PeerUnreachable
from p2pmoe.identity import KeyPair, PeerId
from p2pmoe.net.transport import Accepted, Channel, failure
from p2pmoe.wire.address import Address

BUFFER_BYTES = 256 * 1024  # sent and not yet read, each way; the order of a socket's buffers
CONNECT_LIMIT = 5.0  # seconds that a dial waits for a host that does not answer
DIAL_ROUND_TRIPS = 2  # TCP and TLS 1.3; the greeting above takes one more
BACKLOG = 128  # connections that a listener has not taken yet; the usual one of a socket
FIRST_PORT = 40_000  # given to listeners that do not ask for one
ANY_HOST = {"0.0.0.0", "::"}  # noqa: S104  compared with; in memory nothing is bound


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """What lies between two hosts, for each direction of each connection."""

    latency: float = 0.0  # seconds
    jitter: float = 0.0  # seconds more, at most; bytes stay in order
    bandwidth: float = math.inf  # bytes a second


class MemoryNetwork:
    """Hosts, the lines between them, and what goes wrong there. All hosts see all others."""

    def __init__(self, rng: random.Random, line: Line | None = None) -> None:
        self._rng = rng
        self._line = line or Line()
        self._lines: dict[frozenset[str], Line] = {}
        self._listeners: dict[tuple[str, int], _Listener] = {}
        self._connections: set[_Connection] = set()
        self._break_after: dict[tuple[str, str], int] = {}
        self._groups: dict[str, int] = {}
        self._dead: set[str] = set()
        self._healed = trio.lowlevel.ParkingLot()

    def transport(self, keys: KeyPair, host: str) -> MemoryTransport:
        """A peer's transport on this host."""
        return MemoryTransport(self, keys, host)

    # -------------------------------------------------------------- what lies between hosts
    def set_line(self, a: str, b: str, line: Line) -> None:
        """What lies between these two from now on, on connections that exist as well."""
        self._lines[frozenset((a, b))] = line

    def line(self, a: str, b: str) -> Line:
        """What lies between these two."""
        return self._lines.get(frozenset((a, b)), self._line)

    def delay(self, line: Line) -> float:
        """How long bytes take on this line now, in seconds."""
        return line.latency + (line.jitter * self._rng.random() if line.jitter else 0.0)

    # -------------------------------------------------------------- what goes wrong
    def cut(self, a: str, b: str) -> int:
        """Break the connections between two hosts, both ways at once; how many there were."""
        pair = {a, b}
        broken = [each for each in self._connections if {each.dialler, each.listener} == pair]
        for connection in broken:
            connection.reset()
        return len(broken)

    def break_after(self, sender: str, receiver: str, size: int | None) -> None:
        """Each new connection breaks when `sender` has sent so many bytes; `None` ends this."""
        if size is None:
            self._break_after.pop((sender, receiver), None)
        else:
            self._break_after[sender, receiver] = size

    def partition(self, *groups: Iterable[str]) -> None:
        """Hosts of different groups do not hear each other; hosts in none are one more group.

        Nothing breaks: what was sent arrives after `heal`, as TCP would repeat it.
        """
        self._groups = {host: i for i, group in enumerate(groups, 1) for host in group}

    def heal(self) -> None:
        """All hosts hear each other again."""
        self._groups = {}
        self._wake()

    def kill(self, host: str) -> None:
        """What runs on the host is gone: its connections break, and it refuses new ones."""
        self._dead.add(host)
        self._listeners = {at: each for at, each in self._listeners.items() if at[0] != host}
        for connection in [c for c in self._connections if host in (c.dialler, c.listener)]:
            connection.reset()

    def revive(self, host: str) -> None:
        """The host may dial and listen again."""
        self._dead.discard(host)

    # -------------------------------------------------------------- for transports and streams
    def parted(self, a: str, b: str) -> bool:
        """Whether two hosts do not hear each other now."""
        return self._groups.get(a, 0) != self._groups.get(b, 0)

    async def dial(
        self, dialler: MemoryTransport, address: Address, expect: PeerId | None
    ) -> Channel:
        """Connect a peer to whatever listens at `address`."""
        host, begun = dialler.host, trio.current_time()
        await trio.sleep(2 * DIAL_ROUND_TRIPS * self.delay(self.line(host, address.host)))
        while self.parted(host, address.host):
            with trio.move_on_at(begun + CONNECT_LIMIT) as waiting:
                await self._healed.park()
            if waiting.cancelled_caught:
                reason = f"no answer within {CONNECT_LIMIT:g} s"
                raise failure(PeerUnreachable, "connect", address, reason)
        listener = self._listeners.get((address.host, address.port))
        if listener is None or {host, address.host} & self._dead:
            raise failure(PeerUnreachable, "connect", address, "connection refused")
        if reason := _wrong_peer(dialler.peer_id, listener.keys.peer_id, address, expect):
            raise failure(NotAllowed, "tls", address, reason)
        connection = _Connection(self, host, address.host)
        near, far = connection.streams
        try:
            listener.incoming.send_nowait(
                _channel(far, dialler.keys, Address(host, self._any_port()))
            )
        except trio.WouldBlock:
            raise failure(PeerUnreachable, "connect", address, "connection refused") from None
        self._connections.add(connection)
        return _channel(near, listener.keys, address)

    def _any_port(self) -> int:
        return FIRST_PORT + self._rng.randrange(20_000)

    def limit(self, sender: str, receiver: str) -> float:
        """After how many bytes a new connection breaks in this direction."""
        return self._break_after.get((sender, receiver), math.inf)

    def over(self, connection: _Connection) -> None:
        """Both sides of a connection are closed, or it is broken."""
        self._connections.discard(connection)

    @contextmanager
    def listening(self, keys: KeyPair, address: Address) -> Iterator[_Listener]:
        """Listen inside the block; raises `AddressInUse`."""
        port = address.port
        if not port:
            port = FIRST_PORT
            while (address.host, port) in self._listeners:
                port += 1
        if (address.host, port) in self._listeners:
            raise failure(AddressInUse, "listen", address, "address already in use")
        send, receive = trio.open_memory_channel[Channel](BACKLOG)
        listener = _Listener(keys, Address(address.host, port), send, receive)
        self._listeners[address.host, port] = listener
        try:
            with send, receive:
                yield listener
        finally:
            if self._listeners.get((address.host, port)) is listener:
                del self._listeners[address.host, port]

    def _wake(self) -> None:
        self._healed.unpark_all()
        for connection in self._connections:
            for pipe in connection.pipes:
                pipe.news.unpark_all()


class MemoryTransport:
    """One peer on one host of a `MemoryNetwork`."""

    def __init__(self, network: MemoryNetwork, keys: KeyPair, host: str) -> None:
        self._network, self.keys, self.host = network, keys, host

    @property
    def peer_id(self) -> PeerId:
        """See `Transport.peer_id`."""
        return self.keys.peer_id

    async def dial(self, address: Address, expect: PeerId | None) -> Channel:
        """See `Transport.dial`."""
        return await self._network.dial(self, address, expect)

    async def serve(
        self,
        address: Address,
        accepted: Accepted,
        *,
        task_status: trio.TaskStatus[Address] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """See `Transport.serve`."""
        if address.host not in {self.host, *ANY_HOST}:
            raise failure(ConfigurationError, "listen", address, f"this is host {self.host}")
        with self._network.listening(self.keys, Address(self.host, address.port)) as listener:
            async with trio.open_nursery() as connections:
                task_status.started(listener.address)
                async for channel in listener.waiting:
                    connections.start_soon(_attend, channel, accepted)


def _channel(stream: MemoryStream, keys: KeyPair, remote: Address) -> Channel:
    return Channel(stream, keys.peer_id, keys.public_key, remote, math.inf)


def _wrong_peer(own: PeerId, found: PeerId, address: Address, expect: PeerId | None) -> str:
    """Why this is not the one to talk to; empty if it is."""
    if found == own:
        return "it is this peer itself"
    if expect is not None and found != expect:
        return f"peer {found} answers there, and not {expect}"
    if not address.matches(found):
        return f"peer {found} answers there, and not {address.peer_prefix}"
    return ""


async def _attend(channel: Channel, accepted: Accepted) -> None:
    try:
        await accepted(channel)
    finally:
        await trio.aclose_forcefully(channel.stream)


@dataclass(frozen=True, slots=True, eq=False)
class _Listener:
    keys: KeyPair
    address: Address
    incoming: trio.MemorySendChannel[Channel]
    waiting: trio.MemoryReceiveChannel[Channel]


class _Pipe:
    """One direction of a connection: what was sent and not read, and when each piece arrives."""

    def __init__(self, network: MemoryNetwork, sender: str, receiver: str) -> None:
        self.network, self.sender, self.receiver = network, sender, receiver
        self.pieces: deque[tuple[float, memoryview]] = deque()
        self.unread = 0
        self.left = network.limit(sender, receiver)  # bytes until the connection breaks
        self.closed = False  # by the sender
        self.news = trio.lowlevel.ParkingLot()  # both ends wait here
        self._free_at = self._last_at = 0.0

    def push(self, data: memoryview) -> None:
        """Put bytes on the line; empty ones are its end."""
        line = self.network.line(self.sender, self.receiver)
        start = max(self._free_at, trio.current_time())
        self._free_at = start + len(data) / line.bandwidth
        self._last_at = max(self._last_at, self._free_at + self.network.delay(line))
        self.pieces.append((self._last_at, data))
        self.unread += len(data)
        self.left -= len(data)
        self.news.unpark_all()

    def next_at(self) -> float:
        """When there is something to read, as far as is known."""
        if not self.pieces or self.network.parted(self.sender, self.receiver):
            return math.inf
        return self.pieces[0][0]

    def pull(self, most: int | None) -> memoryview:
        """Take what has arrived."""
        at, data = self.pieces.popleft()
        if not data:  # the end stays
            self.pieces.appendleft((at, data))
        elif most is not None and len(data) > most:
            self.pieces.appendleft((at, data[most:]))
            data = data[:most]
        self.unread -= len(data)
        self.news.unpark_all()
        return data


class _Connection:
    """Two pipes and the two streams that use them."""

    def __init__(self, network: MemoryNetwork, dialler: str, listener: str) -> None:
        self.dialler, self.listener = dialler, listener
        self._network = network
        self.broken = False
        there, back = _Pipe(network, dialler, listener), _Pipe(network, listener, dialler)
        self.pipes = there, back
        self.streams = MemoryStream(self, back, there), MemoryStream(self, there, back)

    def reset(self, *, deliver: _Pipe | None = None) -> None:
        """Break both ways; what is on its way is lost, but in the pipe to `deliver`."""
        self.broken = True
        self._network.over(self)
        for pipe in self.pipes:
            if pipe is not deliver:
                pipe.pieces.clear()
            pipe.news.unpark_all()

    def closed(self) -> None:
        """One side has closed."""
        if all(pipe.closed for pipe in self.pipes):
            self._network.over(self)


class MemoryStream(trio.abc.Stream):
    """One end of a connection."""

    def __init__(self, connection: _Connection, incoming: _Pipe, outgoing: _Pipe) -> None:
        self._connection, self._incoming, self._outgoing = connection, incoming, outgoing
        self._sending = self._receiving = False

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """See `trio.abc.SendStream`. Cancelled, it has sent a part."""
        if self._sending:
            raise trio.BusyResourceError("another task sends on this stream")
        self._sending = True
        try:
            await trio.lowlevel.checkpoint()
            rest = memoryview(data if isinstance(data, bytes) else bytes(data))
            while len(rest):
                rest = rest[self._send_some(rest) :]
                if len(rest):
                    await self._outgoing.news.park()
        finally:
            self._sending = False

    def _send_some(self, data: memoryview) -> int:
        pipe = self._outgoing
        if pipe.closed:
            raise trio.ClosedResourceError
        if self._connection.broken or self._incoming.closed:
            raise trio.BrokenResourceError("the connection broke")
        size = int(min(len(data), BUFFER_BYTES - pipe.unread, pipe.left))
        if size:
            pipe.push(data[:size])
        if not pipe.left:
            self._connection.reset(deliver=pipe)
            raise trio.BrokenResourceError("the connection broke")
        return size

    async def wait_send_all_might_not_block(self) -> None:
        """See `trio.abc.SendStream`."""
        await trio.lowlevel.checkpoint()
        while self._outgoing.unread >= BUFFER_BYTES and not self._connection.broken:
            await self._outgoing.news.park()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """See `trio.abc.ReceiveStream`."""
        if self._receiving:
            raise trio.BusyResourceError("another task receives on this stream")
        self._receiving = True
        try:
            await trio.lowlevel.checkpoint()
            while True:
                if self._outgoing.closed:
                    raise trio.ClosedResourceError
                if (at := self._incoming.next_at()) <= trio.current_time():
                    return bytes(self._incoming.pull(max_bytes))
                if self._connection.broken and not self._incoming.pieces:
                    raise trio.BrokenResourceError("the connection broke")
                with trio.move_on_at(at):
                    await self._incoming.news.park()
        finally:
            self._receiving = False

    async def aclose(self) -> None:
        """See `trio.abc.AsyncResource`."""
        if not self._outgoing.closed:
            self._outgoing.push(memoryview(b""))
            self._outgoing.closed = True
            self._incoming.news.unpark_all()
            self._connection.closed()
        await trio.lowlevel.checkpoint()

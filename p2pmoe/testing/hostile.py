"""A hostile peer, for tests of what it can do to a node: it speaks TCP and TLS, and misbehaves.

What it does is a script: a sequence of steps, each frozen and bounded in count and time. The other
side may end it at any step; the `Outcome` says which, and after how long. Rules: it dials addresses
that are not global only, and a script always ends by itself.
"""

from __future__ import annotations

import ipaddress
import math
import socket
import ssl
import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import TypeAlias

import trio

from p2pmoe.errors import P2PMoEError
from p2pmoe.identity import KeyPair, network_id, open_network_seed
from p2pmoe.net.messages import Cancel, ChannelClass, Hello, Refuse, Request, decode_header
from p2pmoe.net.tls import Credentials, make_context
from p2pmoe.wire import schema
from p2pmoe.wire.address import Address
from p2pmoe.wire.framing import FrameLimits, FrameReader, frame_prefix
from p2pmoe.wire.schema import Message

MAX_TIMES = 1_000_000  # of one step; a guess
MAX_SECONDS = 600.0  # for one script; a guess
CONTEXTS = 64  # of TLS, that are kept for members who come again
MAX_SAID = 2**20  # bytes that are kept for a replay
BATCH = 100  # repetitions joined into one send
SEND_BYTES = 256 * 1024  # of repetitions joined into one send
OVER = (trio.BrokenResourceError, trio.ClosedResourceError, EOFError)  # the other side closed
LAST_WORDS = 0.2  # seconds in which a peer that was closed reads why
_NO_LIMITS = FrameLimits(2**32 - 1, 2**32 - 1)


@dataclass(frozen=True, slots=True)
class Shake:
    """Prove a key by TLS, as a member of the network would."""


@dataclass(frozen=True, slots=True)
class Greet:
    """Say HELLO and wait for the other side's."""

    channel: ChannelClass = "bulk"


@dataclass(frozen=True, slots=True)
class Send:
    """Send these bytes `times` over, `pause` seconds apart."""

    data: bytes
    times: int = 1
    pause: float = 0.0


@dataclass(frozen=True, slots=True)
class Say:
    """Send a frame: a header as this package encodes it, or any bytes for one; with a payload."""

    header: Message | bytes
    payload: bytes = b""
    times: int = 1
    pause: float = 0.0


@dataclass(frozen=True, slots=True)
class Call:
    """Begin `times` calls, each announcing a payload of `size` bytes that does not follow.

    With `cancel`, each is cancelled at once. `pause` lies between two bundles of 100.
    """

    method: str = "node.status"
    body: bytes = b""
    size: int = 0
    times: int = 1
    cancel: bool = False
    pause: float = 0.0


@dataclass(frozen=True, slots=True)
class Replay:
    """Send once more all that was sent since the handshake, `times` over."""

    times: int = 1


@dataclass(frozen=True, slots=True)
class Hear:
    """Read for so long, or to the end."""

    seconds: float = MAX_SECONDS


@dataclass(frozen=True, slots=True)
class Wait:
    """Neither read nor write for so long."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Reset:
    """Break the connection off, with a RST."""


Step: TypeAlias = Shake | Greet | Send | Say | Call | Replay | Hear | Wait | Reset
Script: TypeAlias = Sequence[Step]


def trickle(data: bytes, pause: float = 1.0) -> list[Step]:
    """The steps that send these bytes one by one, `pause` seconds apart."""
    return [Send(bytes([byte]), pause=pause) for byte in data]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a script.

    `ended_at` is the step at which the other side closed, `None` if the script was gone through.
    `refusal` is the other side's last word, if it was heard. Seconds and bytes.
    """

    seconds: float
    sent: int
    received: int
    ended_at: Step | None
    refusal: Refuse | None


class HostilePeer:
    """One connection that goes wrong. `stream` is plain; the script says whether to shake hands."""

    def __init__(self, stream: trio.abc.Stream, keys: KeyPair, network: str = "p2pmoe") -> None:
        self._stream = self._bottom = stream
        self._keys, self._network = keys, network
        self._reader = FrameReader(_NO_LIMITS)
        self._said = bytearray()
        self._calls = count(1, 2)
        self._sent = self._received = 0
        self._refusal: Refuse | None = None

    async def perform(self, script: Script) -> Outcome:
        """Go through the script, and close."""
        begun = trio.current_time()
        ended_at: Step | None = None
        try:
            with trio.move_on_after(MAX_SECONDS):
                for step in script:
                    try:
                        await self._do(step)
                    except OVER:
                        ended_at = step
                        break
            seconds = trio.current_time() - begun
            if ended_at is not None:
                with suppress(*OVER):
                    await self._hear_for(LAST_WORDS)
        finally:
            await trio.aclose_forcefully(self._bottom)
        return Outcome(seconds, self._sent, self._received, ended_at, self._refusal)

    async def _do(self, step: Step) -> None:
        match step:
            case Shake():
                await self._shake()
            case Greet():
                await self._greet(step.channel)
            case Send():
                await self._repeat(step.data, step.times, step.pause)
            case Say():
                await self._repeat(frame(step.header, step.payload), step.times, step.pause)
            case Call():
                await self._call(step)
            case Replay():
                await self._repeat(bytes(self._said), step.times, 0.0)
            case Hear():
                await self._hear_for(step.seconds)
            case Wait():
                await trio.sleep(step.seconds)
            case Reset():
                self._reset()

    async def _shake(self) -> None:
        context = _context(self._keys, self._network)
        secured = trio.SSLStream(self._bottom, context, https_compatible=True)
        await secured.do_handshake()
        self._stream = secured

    async def _greet(self, channel: ChannelClass) -> None:
        authority = KeyPair.from_seed(open_network_seed(self._network))
        network = network_id(authority.public_key)
        hello = Hello(version_min=1, version_max=1, network=network, channel=channel)
        await self._repeat(frame(hello), 1, 0.0)
        while not await self._hear():
            pass

    async def _repeat(self, data: bytes, times: int, pause: float) -> None:
        if not 0 <= times <= MAX_TIMES:
            raise ValueError(f"{times} times are not between 0 and {MAX_TIMES}")
        at_once = 1 if pause else max(1, min(BATCH, SEND_BYTES // max(1, len(data))))
        for done in range(0, times, at_once):
            await self._send(data * min(at_once, times - done))
            await trio.sleep(pause)

    async def _send(self, data: bytes) -> None:
        await self._stream.send_all(data)
        self._sent += len(data)
        self._said += data[: MAX_SAID - len(self._said)]

    async def _call(self, step: Call) -> None:
        if not 0 <= step.times <= MAX_TIMES:
            raise ValueError(f"{step.times} times are not between 0 and {MAX_TIMES}")
        for begun in range(0, step.times, BATCH):
            numbers = [next(self._calls) for _ in range(min(BATCH, step.times - begun))]
            await self._send(b"".join(self._one_call(step, number) for number in numbers))
            await trio.sleep(step.pause)

    @staticmethod
    def _one_call(step: Call, number: int) -> bytes:
        request = Request(
            id=number, method=step.method, budget_ms=300_000, body=step.body, size=step.size
        )
        return frame(request) + (frame(Cancel(id=number)) if step.cancel else b"")

    async def _hear(self) -> int:
        """Read what has come; how many frames were complete."""
        data = await self._stream.receive_some()
        if not data:
            raise EOFError
        self._received += len(data)
        if self._stream is self._bottom and not self._said:
            return 0
        try:
            frames = self._reader.receive_data(data)
            for each in frames:
                if isinstance(header := decode_header(each.header), Refuse):
                    self._refusal = header
        except P2PMoEError:  # it need not understand what it hears
            return 0
        return len(frames)

    async def _hear_for(self, seconds: float) -> None:
        with trio.move_on_after(seconds):
            while True:
                await self._hear()

    def _reset(self) -> None:
        if isinstance(self._bottom, trio.SocketStream):
            abort = struct.pack("ii", 1, 0)
            self._bottom.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, abort)


@lru_cache(CONTEXTS)
def _context(keys: KeyPair, network: str) -> ssl.SSLContext:
    return make_context(Credentials.for_open_network(keys, network), ssl.PROTOCOL_TLS_CLIENT)


def frame(header: Message | bytes, payload: bytes = b"") -> bytes:
    """A frame as it crosses the wire, its header well-formed or not."""
    raw = header if isinstance(header, bytes) else schema.encode(header)
    return frame_prefix(len(raw), len(payload)) + raw + payload


async def attack(
    address: Address, script: Script, *, keys: KeyPair | None = None, network: str = "p2pmoe"
) -> Outcome:
    """Dial a node by TCP and go through the script. Raises `OSError` if it cannot be dialled."""
    if ipaddress.ip_address(address.host).is_global:
        raise ValueError(f"{address} is not an address of a test")
    stream = await trio.open_tcp_stream(address.host, address.port)
    return await HostilePeer(stream, keys or KeyPair.generate(), network).perform(script)


async def crowd(
    address: Address, script: Script, size: int, *, at_once: float = math.inf
) -> list[Outcome]:
    """So many hostile peers with keys of their own, `at_once` of them beside one another.

    A peer that cannot dial has no outcome.
    """
    outcomes: list[Outcome] = []
    room = trio.CapacityLimiter(at_once)

    async def one() -> None:
        async with room:
            with suppress(OSError):
                outcomes.append(await attack(address, script))

    async with trio.open_nursery() as attacks:
        for _ in range(size):
            attacks.start_soon(one)
    return outcomes

"""The greeting: a HELLO each way, the dialler's first, or a REFUSE that says why not.

Rules: nothing counts as connected until the listener's HELLO has come. The dialler sends nothing
behind its own before that, so what a stranger may send is one small frame. A refusal speaks of the
dialler and the listener, so that it reads the same on both sides.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass

import trio

from p2pmoe.errors import (
    ConnectionLost,
    MalformedMessage,
    NotAllowed,
    P2PMoEError,
    PeerUnreachable,
    VersionMismatch,
    from_code,
)
from p2pmoe.identity import PeerId
from p2pmoe.net.frames import FrameStream
from p2pmoe.net.messages import (
    FEATURES,
    MAX_DETAIL,
    VERSION_MAX,
    VERSION_MIN,
    Header,
    Hello,
    Refuse,
    decode_header,
)
from p2pmoe.net.outbox import OutFrame
from p2pmoe.net.quota import QuotaParams
from p2pmoe.net.tls import explain
from p2pmoe.net.transport import Channel, failure
from p2pmoe.version import __version__
from p2pmoe.wire import schema
from p2pmoe.wire.envelope import Signed, VerifiedCache
from p2pmoe.wire.framing import BULK_LIMITS, CONTROL_LIMITS, HELLO_LIMITS
from p2pmoe.wire.peer_record import PeerRecord, open_record

AGENT = f"p2pmoe/{__version__}"


@dataclass(frozen=True, slots=True)
class Greeted:
    """Who greeted back, with the peer record that came along; `None` if nobody can dial it."""

    peer: PeerId
    record: Signed[PeerRecord] | None
    host: str = ""  # as `Channel.host`


@dataclass(frozen=True, slots=True)
class Greeter:
    """How this peer greets. `record` gives its own sealed record."""

    network: bytes
    record: Callable[[], bytes | None]
    quota: QuotaParams
    verified: VerifiedCache

    async def dial(self, channel: Channel, *, bulk: bool) -> tuple[FrameStream, Greeted]:
        """Greet on a channel that this peer dialled, and wait for the answer.

        Raises what a REFUSE names, `PeerUnreachable` with stage `hello`, `NotAllowed`,
        `VersionMismatch` or `MalformedMessage`. On failure the caller closes the channel.
        """
        frames = FrameStream(channel, BULK_LIMITS if bulk else CONTROL_LIMITS)
        with _stage(channel, self.quota.hello):
            await frames.send([self._hello(bulk=bulk)])
            answer = await _first_header(frames)
        if isinstance(answer, Refuse):
            raise _refused(answer, channel)
        async with _refusing(frames, self.quota.refuse):
            return frames, self._judge(_hello(answer), channel, them="listener", us="dialler")

    async def accept(
        self, channel: Channel, admit: Callable[[bool], None]
    ) -> tuple[FrameStream, Greeted]:
        """Wait for the greeting on a channel that came in, and greet back.

        `admit` is told whether it is for bulk, and raises if there is no room for this peer, who is
        told so. Raises as `dial`.
        """
        frames = FrameStream(channel, HELLO_LIMITS)
        with _stage(channel, self.quota.hello):
            first = await _first_header(frames)
        async with _refusing(frames, self.quota.refuse):
            theirs = _hello(first)
            bulk = theirs.channel == "bulk"
            greeted = self._judge(theirs, channel, them="dialler", us="listener")
            admit(bulk)
        frames.widen(BULK_LIMITS if bulk else CONTROL_LIMITS)
        with _stage(channel, self.quota.hello):
            await frames.send([self._hello(bulk=bulk)])
        return frames, greeted

    def _hello(self, *, bulk: bool) -> OutFrame:
        hello = Hello(
            version_min=VERSION_MIN,
            version_max=VERSION_MAX,
            network=self.network,
            channel="bulk" if bulk else "control",
            record=self.record() or b"",
            features=FEATURES,
            agent=AGENT,
        )
        return OutFrame(schema.encode(hello))

    def _judge(self, theirs: Hello, channel: Channel, *, them: str, us: str) -> Greeted:
        """Whether this is somebody to talk to."""
        if theirs.network != self.network:
            networks = theirs.network.hex()[:8], self.network.hex()[:8]
            reason = f"the {them} is of network {networks[0]}, the {us} of {networks[1]}"
            raise failure(NotAllowed, "hello", channel.remote, reason)
        if max(theirs.version_min, VERSION_MIN) > min(theirs.version_max, VERSION_MAX):
            spoken = f"{theirs.version_min} to {theirs.version_max}"
            reason = f"the {them} speaks protocol {spoken}, the {us} {VERSION_MIN} to {VERSION_MAX}"
            raise failure(VersionMismatch, "hello", channel.remote, reason)
        if not theirs.record:
            return Greeted(channel.peer, None, channel.host)
        record = open_record(theirs.record, self.network, self.verified)
        if record.signer != channel.peer:
            raise MalformedMessage("hello.record", f"the {them} sent the record of another peer")
        return Greeted(channel.peer, record, channel.host)


async def _first_header(frames: FrameStream) -> Header:
    frame = await frames.first()
    if len(frame.payload):
        raise MalformedMessage("hello.payload")
    return decode_header(frame.header)


def _hello(header: Header) -> Hello:
    if not isinstance(header, Hello):
        raise MalformedMessage("hello.expected", f"a {type(header).__name__} came first")
    return header


def _refused(refuse: Refuse, channel: Channel) -> P2PMoEError:
    error = from_code(
        refuse.code,
        f"{channel.remote}: hello: refused: {refuse.detail}",
        peer=channel.peer.short,
        stage="hello",
    )
    error.address = str(channel.remote)
    return error


@contextmanager
def _stage(channel: Channel, limit: float) -> Iterator[None]:
    """What goes wrong inside has stage `hello`, or `tls` where only now the verdict is heard."""
    try:
        with trio.fail_after(limit):
            yield
    except trio.TooSlowError:
        reason = f"no HELLO within {limit:g} s"
        raise failure(PeerUnreachable, "hello", channel.remote, reason) from None
    except ConnectionLost as error:
        broken = error.__cause__
        verdict = isinstance(broken, trio.BrokenResourceError) and broken.__cause__
        if isinstance(verdict, ssl.SSLError):
            raise explain(verdict, address=channel.remote) from error
        raise failure(PeerUnreachable, "hello", channel.remote, str(error)) from error
    except MalformedMessage as error:
        raise _placed(error, channel) from None


@asynccontextmanager
async def _refusing(frames: FrameStream, limit: float) -> AsyncIterator[None]:
    """Tell the other side when its greeting is refused."""
    try:
        yield
    except P2PMoEError as error:
        refuse = Refuse(code=error.code, detail=str(error)[:MAX_DETAIL])
        with trio.move_on_after(limit), suppress(ConnectionLost):
            await frames.send([OutFrame(schema.encode(refuse))])
        raise _placed(error, frames.channel) from None


def _placed(error: P2PMoEError, channel: Channel) -> P2PMoEError:
    """The error, with where it happened."""
    if isinstance(error, MalformedMessage):
        error = MalformedMessage(error.why, f"{channel.remote}: hello: {error.detail}")
    error.peer, error.stage, error.address = channel.peer.short, "hello", str(channel.remote)
    return error

"""The way to a peer, step by step, each timed: what `p2pmoe ping` walks.

It is the way that a node's own dials take, with the same parts, but one step is not begun before
the last one is done and measured, and what fails says which step it was and what to do.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import trio

from p2pmoe.cli.joining import GOODBYE
from p2pmoe.errors import CallTimeout, P2PMoEError, PeerUnreachable
from p2pmoe.identity import KeyPair
from p2pmoe.net.connection import Connection, Terms
from p2pmoe.net.greeting import Greeter
from p2pmoe.net.quota import Quota, QuotaParams
from p2pmoe.net.tls import Credentials, Tls
from p2pmoe.net.transport import Channel, failure
from p2pmoe.wire import schema
from p2pmoe.wire.address import Address
from p2pmoe.wire.envelope import VerifiedCache
from p2pmoe.wire.status import ECHO, EchoReply, EchoRequest

ADVICE = {
    "resolve": "check how the name is spelled, or give a numeric address",
    "connect": "check that a node runs there and listens on this port, and the firewalls between",
    "tls": "check that it is a node of the same --network, and the one that you mean",
    "hello": "check that both sides run a version that the other one speaks",
    "echo": "it is reachable and does not answer: look at its load by `p2pmoe status`, or its log",
}


@dataclass
class Trip:
    """One way to a peer. `stages` are in milliseconds, in the order of the way."""

    address: Address
    network: str
    stages: dict[str, float] = field(default_factory=dict)
    peer: str = ""
    reached: str = ""
    reply: EchoReply | None = None
    offset_ms: float = 0.0

    def facts(self) -> dict[str, Any]:
        """What there is to say of it."""
        facts: dict[str, Any] = {"address": str(self.address), "stages_ms": self.stages}
        if self.peer:
            facts |= {"peer": self.peer, "reached": self.reached}
        if (reply := self.reply) is not None:
            facts |= {
                "version": reply.version,
                "protocol": [reply.version_min, reply.version_max],
                "clock_offset_ms": round(self.offset_ms, 1),
                "load": reply.load,
                "free_slots": reply.free_slots,
            }
        return facts

    async def travel(self, count: int, within: float) -> None:
        """Go all the way. Raises the error of the stage that failed, with what to do."""
        at = "resolve"
        try:
            with trio.fail_after(within):
                async with AsyncExitStack() as ends:
                    way = _Way(self, ends)
                    for at, step in way.steps().items():
                        begun = time.perf_counter()
                        await step()
                        self.stages[at] = _ms(begun)
                    at = "echo"
                    await way.echo(count)
        except trio.TooSlowError:
            error = CallTimeout(f"no answer in {within:g} s", stage=at, address=str(self.address))
            raise _advised(error) from None
        except P2PMoEError as error:
            error.stage = error.stage if error.stage in ADVICE else at
            raise _advised(error) from None


class _Way:
    """The steps, one after the other, each with what the one before it brought."""

    def __init__(self, trip: Trip, ends: AsyncExitStack) -> None:
        self._trip, self._ends = trip, ends
        self._found: list[str] = []
        self._stream: trio.SocketStream
        self._channel: Channel
        self._connection: Connection
        self._credentials = Credentials.for_open_network(KeyPair.generate(), trip.network)
        self._tls = Tls(self._credentials)

    def steps(self) -> dict[str, Callable[[], Awaitable[None]]]:
        """What comes before the echo."""
        return {
            "resolve": self.resolve,
            "connect": self.connect,
            "tls": self.prove,
            "hello": self.greet,
        }

    async def resolve(self) -> None:
        address = self._trip.address
        try:
            found = await trio.socket.getaddrinfo(
                address.host, address.port, type=socket.SOCK_STREAM
            )
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise failure(PeerUnreachable, "resolve", address, reason) from None
        self._found = list(dict.fromkeys(str(entry[4][0]) for entry in found))

    async def connect(self) -> None:
        address, reasons = self._trip.address, []
        for host in self._found:
            try:
                self._stream = await trio.open_tcp_stream(host, address.port)
            except OSError as error:
                reasons.append(_reason(error))
            else:
                self._ends.push_async_callback(trio.aclose_forcefully, self._stream)
                self._trip.reached = host
                return
        reason = ", ".join(dict.fromkeys(reasons))
        raise failure(PeerUnreachable, "connect", address, reason)

    async def prove(self) -> None:
        self._channel = await self._tls.dialled(self._stream, self._trip.address, None)
        self._trip.peer = self._channel.peer.hex

    async def greet(self) -> None:
        quota = Quota(QuotaParams())
        account = quota.connect(self._channel.peer, bulk=False, now=trio.current_time())
        greeter = Greeter(self._credentials.network, lambda: None, quota.params, VerifiedCache(1))
        frames, greeted = await greeter.dial(self._channel, bulk=False)
        terms = Terms(frames, greeted, bulk=False, outbound=True)
        self._connection = Connection(terms, account, {})

    async def echo(self, count: int) -> None:
        failure: P2PMoEError | None = None
        async with trio.open_nursery() as connection:
            connection.start_soon(self._connection.run)
            try:
                for _ in range(count):
                    await self._echo()
            except P2PMoEError as error:
                failure = error
            self._connection.retire()
            connection.cancel_scope.deadline = trio.current_time() + GOODBYE
        if failure is not None:
            raise failure

    async def _echo(self) -> None:
        """Ask once; the quickest answer says most of the other clock (Cristian, 1989)."""
        sent_ms, begun = time.time() * 1000, time.perf_counter()
        call = self._connection.ask(ECHO, schema.encode(EchoRequest()), (), budget=10.0)
        try:
            part = await call.next_part()
        finally:
            call.close()
        took, trip = _ms(begun), self._trip
        assert part is not None  # an answer without a part has an error
        reply = schema.decode(part.body, EchoReply)
        if trip.reply is None or took < trip.stages["echo"]:
            trip.reply, trip.offset_ms = reply, reply.clock_ms - (sent_ms + took / 2)
            trip.stages["echo"] = took


def _ms(begun: float) -> float:
    return round((time.perf_counter() - begun) * 1000, 2)


def _reason(error: OSError) -> str:
    """What the system says; Trio keeps it in the cause."""
    cause = error.__cause__
    first = cause.exceptions[0] if isinstance(cause, BaseExceptionGroup) else error
    number = getattr(first, "errno", None)
    return os.strerror(number).lower() if number else str(first).lower()


def _advised(error: P2PMoEError) -> P2PMoEError:
    """The error, with what to do."""
    advice = ADVICE.get(error.stage or "", "")
    error.args = (f"{error}: {advice}",)
    return error

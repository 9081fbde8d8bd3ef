"""A server on the loopback interface, clients of it, and what telemetry is told meanwhile."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import trio
import trio.testing

from p2pmoe import telemetry
from p2pmoe.net.quota import QuotaParams
from p2pmoe.net.tcp import TcpTransport
from p2pmoe.net.tls import Credentials
from p2pmoe.net.transport import Channel
from p2pmoe.wire.address import Address
from tests.net.strangers import (
    ALICE,
    BOB,
    credentials,
)

ANY_PORT = Address("127.0.0.1", 0)
WITHIN = 10.0  # seconds, for what takes milliseconds
SECRET = b"what the peers say to each other"


def transport(own: Credentials, quota: QuotaParams | None = None) -> TcpTransport:
    return TcpTransport(own.keys, own, quota)


class Events:
    """What telemetry was told, to be waited for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._send, self._receive = trio.open_memory_channel[tuple[str, dict[str, Any]]](1000)
        monkeypatch.setattr(telemetry, "emit", self._emit)
        monkeypatch.setattr(telemetry, "_too_many", lambda of: False)

    def _emit(self, event: str, /, **fields: Any) -> None:
        self._send.send_nowait((event, fields))

    async def next(self, event: str) -> dict[str, Any]:
        with trio.fail_after(WITHIN):
            async for name, fields in self._receive:
                if name == event:
                    return fields
        raise AssertionError(event)


@dataclass
class Bob:
    """A server that gives back what it gets."""

    address: Address
    channels: list[Channel] = field(default_factory=list)

    async def accepted(self, channel: Channel) -> None:
        self.channels.append(channel)
        with trio.fail_after(WITHIN):
            while data := await channel.stream.receive_some():
                await channel.stream.send_all(data)


@asynccontextmanager
async def bob(
    own: Credentials | None = None, quota: QuotaParams | None = None
) -> AsyncIterator[Bob]:
    server = Bob(ANY_PORT)
    async with trio.open_nursery() as servers:
        serve = transport(own or credentials(BOB), quota).serve
        server.address = await servers.start(serve, ANY_PORT, server.accepted)
        yield server
        servers.cancel_scope.cancel()


@asynccontextmanager
async def dialled(address: Address, own: Credentials | None = None) -> AsyncIterator[Channel]:
    channel = await transport(own or credentials(ALICE)).dial(address, None)
    async with channel.stream:
        yield channel


async def echoed(channel: Channel, data: bytes = SECRET) -> bytes:
    with trio.fail_after(WITHIN):
        await channel.stream.send_all(data)
        got = b""
        while len(got) < len(data):
            got += await channel.stream.receive_some()
    return got

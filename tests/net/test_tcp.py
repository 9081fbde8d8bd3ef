"""Channels over real sockets on the loopback interface."""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from p2pmoe.errors import (
    AddressInUse,
    ConfigurationError,
    PeerUnreachable,
)
from p2pmoe.net.lobby import Lobby
from p2pmoe.net.quota import QuotaParams
from p2pmoe.net.tcp import TcpTransport
from p2pmoe.net.transport import Channel, Transport
from p2pmoe.wire.address import Address
from tests.net.loopback import (
    ANY_PORT,
    SECRET,
    WITHIN,
    Bob,
    Events,
    bob,
    dialled,
    echoed,
    transport,
)
from tests.net.strangers import (
    ALICE,
    BOB,
    credentials,
)


async def test_two_peers_talk() -> None:
    async with bob() as server, dialled(server.address) as channel:
        assert await echoed(channel) == SECRET
        assert (channel.peer, channel.remote) == (BOB.peer_id, server.address)
        assert [other.peer for other in server.channels] == [ALICE.peer_id]
        assert server.channels[0].remote.host == "127.0.0.1"


async def test_megabytes_arrive_whole() -> None:
    data = os.urandom(1 << 20)
    async with bob() as server, dialled(server.address) as channel, trio.open_nursery() as writes:
        writes.start_soon(channel.stream.send_all, data)
        got = bytearray()
        with trio.fail_after(WITHIN):
            while len(got) < len(data):
                got += await channel.stream.receive_some()
        assert got == data


def test_it_is_a_transport() -> None:
    wire: Transport = transport(credentials(ALICE))
    assert wire.peer_id == ALICE.peer_id
    with pytest.raises(ValueError, match="credentials"):
        TcpTransport(BOB, credentials(ALICE))


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="not on this system")
async def test_how_long_bytes_may_stay_unacknowledged_is_set_on_both_sides() -> None:
    async with bob() as server, dialled(server.address) as channel:
        await echoed(channel)
        for end in (channel, server.channels[0]):
            end.set_user_timeout(5.0)
            kernel = end.stream.transport_stream
            assert kernel.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 5000
            assert kernel.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


async def test_without_that_option_the_hook_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(socket, "TCP_USER_TIMEOUT", raising=False)
    async with bob() as server, dialled(server.address) as channel:
        channel.set_user_timeout(5.0)
        assert await echoed(channel) == SECRET


# ------------------------------------------------------------------ what a dialler is told
async def test_a_closed_port_is_unreachable_at_the_stage_connect() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = Address("127.0.0.1", server.getsockname()[1])
    with pytest.raises(PeerUnreachable) as caught:
        await transport(credentials(ALICE)).dial(closed, None)
    assert str(caught.value) == f"{closed}: connect: connection refused"
    assert (caught.value.stage, caught.value.retryable) == ("connect", True)


class Names(trio.abc.HostnameResolver):
    """A resolver that knows the names it is told of."""

    def __init__(self, known: dict[str, list[str]]) -> None:
        self._known = known

    async def getaddrinfo(self, host: Any, port: Any, *args: Any, **flags: Any) -> Any:
        name = host.decode()
        if name not in self._known:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        if not self._known[name]:
            await trio.sleep_forever()
        kind = (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "")
        return [(*kind, (ip, port)) for ip in self._known[name]]

    async def getnameinfo(self, sockaddr: Any, flags: int) -> Any:
        raise AssertionError("nobody asks for the name of an address")


async def test_a_name_that_nobody_knows_is_unreachable_at_the_stage_resolve() -> None:
    trio.socket.set_custom_hostname_resolver(Names({}))
    with pytest.raises(PeerUnreachable) as caught:
        await transport(credentials(ALICE)).dial(Address("bob.example", 4747), None)
    assert str(caught.value) == "bob.example:4747: resolve: name or service not known"
    assert caught.value.stage == "resolve"


async def test_an_address_that_does_not_answer_is_given_up(autojump_clock: object) -> None:
    trio.socket.set_custom_hostname_resolver(Names({"bob.example": []}))
    with pytest.raises(PeerUnreachable, match=r"connect: no answer within 5 s") as caught:
        await transport(credentials(ALICE)).dial(Address("bob.example", 4747), None)
    assert caught.value.elapsed == pytest.approx(QuotaParams().connect)


async def test_every_address_of_a_name_is_tried() -> None:
    trio.socket.set_custom_hostname_resolver(Names({"bob.example": ["127.0.0.2", "127.0.0.1"]}))
    async with bob() as server:
        address = Address("bob.example", server.address.port)
        async with dialled(address) as channel:
            assert channel.peer == BOB.peer_id
            assert channel.remote == address
    with pytest.raises(PeerUnreachable, match=r"connect: connection refused$"):
        await transport(credentials(ALICE)).dial(address, None)


# ------------------------------------------------------------------ the server goes on
async def test_a_port_in_use_is_named() -> None:
    async with bob() as server:
        with pytest.raises(AddressInUse) as caught:
            await transport(credentials(ALICE)).serve(server.address, server.accepted)
    assert str(caught.value) == f"{server.address}: listen: address already in use"


async def test_an_address_of_another_machine_cannot_be_listened_on() -> None:
    with pytest.raises(ConfigurationError, match=r"192.0.2.1:0: listen: cannot assign"):
        await transport(credentials(ALICE)).serve(Address("192.0.2.1", 0), Bob(ANY_PORT).accepted)


async def test_a_name_with_several_addresses_gets_one_port() -> None:
    trio.socket.set_custom_hostname_resolver(Names({"bob.example": ["127.0.0.1", "127.0.0.2"]}))
    server = Bob(ANY_PORT)
    async with trio.open_nursery() as servers:
        serve = transport(credentials(BOB)).serve
        bound = await servers.start(serve, Address("bob.example", 0), server.accepted)
        assert (bound.host, bound.port > 0) == ("bob.example", True)
        async with dialled(Address("127.0.0.1", bound.port)) as channel:
            assert await echoed(channel) == SECRET
        servers.cancel_scope.cancel()


async def test_every_address_of_a_name_is_listened_on() -> None:
    trio.socket.set_custom_hostname_resolver(Names({"bob.example": ["127.0.0.1", "127.0.0.2"]}))
    server = Bob(ANY_PORT)
    with socket.socket() as reserved:  # bound and not listening: nobody else is given this port
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
        async with trio.open_nursery() as servers:
            serve = transport(credentials(BOB)).serve
            await servers.start(serve, Address("bob.example", port), server.accepted)
            for host in ("127.0.0.1", "127.0.0.2"):
                async with dialled(Address(host, port)) as channel:
                    assert await echoed(channel) == SECRET
            servers.cancel_scope.cancel()


async def test_a_connection_that_crashes_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    events = Events(monkeypatch)

    async def accepted(channel: Channel) -> None:
        await channel.stream.receive_some()
        raise RuntimeError("a bug")

    async with trio.open_nursery() as servers:
        address = await servers.start(transport(credentials(BOB)).serve, ANY_PORT, accepted)
        for _ in range(2):
            async with dialled(address) as channel:
                await channel.stream.send_all(SECRET)
                crashed = await events.next("net.connection.crashed")
                assert "a bug" in crashed["error"]
                assert await channel.stream.receive_some() == b""
        servers.cancel_scope.cancel()


async def test_a_server_without_descriptors_accepts_again_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events = Events(monkeypatch)
    accept, failures = trio.SocketListener.accept, [errno.EMFILE, errno.ENFILE]

    async def scarce(self: trio.SocketListener) -> trio.SocketStream:
        if failures:
            code = failures.pop()
            raise OSError(code, os.strerror(code))
        return await accept(self)

    monkeypatch.setattr(trio.SocketListener, "accept", scarce)
    quota = QuotaParams(accept_pause=0)
    async with bob(quota=quota) as server, dialled(server.address) as channel:
        assert await echoed(channel) == SECRET
        assert (await events.next("net.accept.failed"))["level"] == "warning"
    assert failures == []


def knock_and_run(address: Address) -> None:
    """Connect and reset before the server, in the same thread, can have accepted."""
    with socket.create_connection((address.host, address.port)) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def test_a_client_that_is_gone_before_it_is_accepted_does_no_harm() -> None:
    async with bob() as server:
        knock_and_run(server.address)
        async with dialled(server.address) as channel:
            assert await echoed(channel) == SECRET
        assert len(server.channels) == 1


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lists a process's descriptors")
async def test_clients_that_come_and_go_leave_no_descriptor() -> None:
    async with bob() as server:
        before = descriptors()
        for _ in range(30):
            stream = await trio.open_tcp_stream(server.address.host, server.address.port)
            await trio.aclose_forcefully(stream)
            async with dialled(server.address) as channel:
                await echoed(channel)
    assert descriptors() < before  # the listener is gone too


# ------------------------------------------------------------------ the room for strangers
async def test_a_stranger_that_dawdles_makes_room_for_one_that_comes_later() -> None:
    async with bob(quota=QuotaParams(strangers=2)) as server:
        host, port = server.address.host, server.address.port
        streams = [await trio.open_tcp_stream(host, port) for _ in range(3)]
        with trio.fail_after(WITHIN):
            assert await streams[0].receive_some() == b""  # the first was sent away
            async with dialled(server.address) as channel:
                assert await echoed(channel) == SECRET
            assert await streams[1].receive_some() == b""
        for stream in streams:
            await stream.aclose()


async def test_a_crowd_from_one_address_is_turned_away_and_that_is_an_event(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events = Events(monkeypatch)
    monkeypatch.setattr(Lobby, "enter", lambda *args: None)
    async with bob() as server:
        with pytest.raises(PeerUnreachable, match="tls: "):
            await transport(credentials(ALICE)).dial(server.address, None)
        assert (await events.next("net.handshake.refused"))["code"] == "busy"
        assert server.channels == []

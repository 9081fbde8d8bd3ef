"""Who is refused on a real socket, what each side says, and what a capture of the rest shows."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
import trio
import trio.testing

from p2pmoe.errors import (
    MalformedMessage,
    NotAllowed,
    P2PMoEError,
    PeerUnreachable,
    VersionMismatch,
)
from p2pmoe.net.quota import QuotaParams, Rate
from p2pmoe.net.tls import ALPN
from p2pmoe.net.transport import Channel
from p2pmoe.wire.address import Address
from tests.net.loopback import (
    ANY_PORT,
    SECRET,
    WITHIN,
    Events,
    bob,
    dialled,
    echoed,
    transport,
)
from tests.net.strangers import (
    ALICE,
    BOB,
    EXPIRED,
    LARGE,
    MALLORY,
    MEMBER,
    OLD_TLS,
    OTHER_NETWORK,
    RSA_KEY,
    WITHOUT_CERTIFICATE,
    Stranger,
    by_mallory,
    credentials,
    forge,
    member_authority,
    of_mallory,
    strange,
)


# ------------------------------------------------------------------ who comes in
async def plaintext(stream: trio.SocketStream) -> object:
    async with stream:
        await stream.send_all(b"GET / HTTP/1.1\r\nHost: bob\r\n\r\n")
        return b"".join([data async for data in stream])


REFUSED = {
    "a plaintext client": (None, PeerUnreachable, "does not speak TLS"),
    "a TLS 1.2 client": (OLD_TLS, VersionMismatch, "does not speak TLS 1.3"),
    "a client without certificate": (WITHOUT_CERTIFICATE, NotAllowed, "shows no certificate"),
    "a client of another network": (OTHER_NETWORK, NotAllowed, "of another network"),
    "a leaf that says CA:TRUE": (of_mallory(member_authority(MALLORY)), NotAllowed, "CA:TRUE"),
    "another ALPN": (of_mallory(MEMBER, alpn="p2pmoe/2"), VersionMismatch, ALPN),
    "a leaf signed by a member": (by_mallory(MEMBER), NotAllowed, "signed by a peer"),
    "an expired leaf": (EXPIRED, NotAllowed, "has expired"),
    "an RSA leaf": (
        Stranger(private_key=RSA_KEY, chain=(forge(RSA_KEY.public_key()),)), NotAllowed, "Ed25519"),
    "a large leaf": (LARGE, NotAllowed, "more than 2048"),
    "itself": (
        Stranger(private_key=BOB.private_key, chain=(forge(BOB.public_key),)),
        NotAllowed, "this peer itself"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
async def test_a_refused_client_is_an_event_and_reaches_no_one(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = Events(monkeypatch)
    stranger, kind, reason = REFUSED[what]
    async with bob() as server:
        stream = await trio.open_tcp_stream(server.address.host, server.address.port)
        host, port = stream.socket.getsockname()
        with trio.fail_after(WITHIN):
            talk = strange(stream, stranger, server=False) if stranger else plaintext(stream)
            heard = await talk
        refused = (await events.next("net.handshake.refused"))["error"]
        assert type(refused) is kind
        assert str(refused).startswith(f"{host}:{port}: tls: ")
        assert reason in str(refused)
        assert (refused.stage, refused.address) == ("tls", f"{host}:{port}")
        assert server.channels == []
        assert isinstance(heard, P2PMoEError) or SECRET not in heard
        async with dialled(server.address) as channel:  # and the server goes on
            assert await echoed(channel) == SECRET


@pytest.mark.parametrize(
    ("stranger", "reason"),
    [
        (WITHOUT_CERTIFICATE, "asks for a certificate"),
        (OTHER_NETWORK, "of another network"),
        (EXPIRED, "finds this peer's certificate expired"),
    ],
)
async def test_a_refused_client_hears_why_at_its_first_read(
    stranger: Stranger, reason: str
) -> None:
    async with bob() as server:
        stream = await trio.open_tcp_stream(server.address.host, server.address.port)
        heard = await strange(stream, stranger, server=False)
    assert type(heard) is NotAllowed
    assert reason in str(heard)


# ------------------------------------------------------------------ who is dialled
@asynccontextmanager
async def server_of(stranger: Stranger | None) -> AsyncIterator[Address]:
    async def attend(stream: trio.SocketStream) -> None:
        await (strange(stream, stranger, server=True) if stranger else plaintext(stream))

    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as connections:
        connections.start_soon(trio.serve_listeners, attend, listeners)
        yield Address("127.0.0.1", listeners[0].socket.getsockname()[1])
        connections.cancel_scope.cancel()


@pytest.mark.parametrize("what", sorted(set(REFUSED) - {"a client without certificate", "itself"}))
async def test_a_server_that_is_no_member_is_not_talked_to(what: str) -> None:
    stranger, kind, reason = REFUSED[what]
    async with server_of(stranger) as address:
        with pytest.raises(kind, match=reason) as caught:
            await transport(credentials(ALICE)).dial(address, None)
    assert str(caught.value).startswith(f"{address}: tls: ")
    assert "\n" not in str(caught.value)
    assert (caught.value.stage, caught.value.address) == ("tls", str(address))
    assert caught.value.elapsed < WITHIN


async def test_a_peer_that_answers_for_another_id_is_told_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with bob() as server:
        with pytest.raises(NotAllowed, match=f"peer {BOB.peer_id.short} answers there") as caught:
            await transport(credentials(ALICE)).dial(server.address, MALLORY.peer_id)
        address = Address(server.address.host, server.address.port, MALLORY.peer_id.hex)
        with pytest.raises(NotAllowed, match=f"peer {BOB.peer_id.short} answers there"):
            await transport(credentials(ALICE)).dial(address, None)
    assert caught.value.stage == "tls"
    assert not caught.value.retryable


async def test_a_peer_that_dials_itself_is_told_so() -> None:
    async with bob() as server:
        with pytest.raises(NotAllowed, match="this peer itself"):
            await transport(credentials(BOB)).dial(server.address, None)
        assert server.channels == []


async def test_networks_that_meet_by_mistake_both_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    events = Events(monkeypatch)
    async with bob(credentials(BOB, "another")) as server:
        with pytest.raises(NotAllowed, match="of another network: this peer's is"):
            await transport(credentials(ALICE)).dial(server.address, None)
        refused = await events.next("net.handshake.refused")
        assert refused["code"] == "not_allowed"
        assert "of another network: this peer's is" in str(refused["error"])


# ------------------------------------------------------------------ what a capture shows
@dataclass
class Wire:
    """A proxy that writes down what passes: up to the server, and down to the client."""

    target: Address
    up: bytearray = field(default_factory=bytearray)
    down: bytearray = field(default_factory=bytearray)

    async def attend(self, client: trio.SocketStream) -> None:
        server = await trio.open_tcp_stream(self.target.host, self.target.port)
        async with client, server, trio.open_nursery() as ways:
            ways.start_soon(self._carry, client, server, self.up)
            ways.start_soon(self._carry, server, client, self.down)

    async def _carry(self, of: trio.SocketStream, to: trio.SocketStream, log: bytearray) -> None:
        async for data in of:
            log += data
            await to.send_all(data)
        await to.send_eof()


def records(capture: bytes) -> list[tuple[int, int, bytes]]:
    """The TLS records (type, version, content) that a direction consists of; RFC 8446, 5.1."""
    found, at = [], 0
    while at < len(capture):
        size = int.from_bytes(capture[at + 3 : at + 5], "big")
        version = int.from_bytes(capture[at + 1 : at + 3], "big")
        found.append((capture[at], version, capture[at + 5 : at + 5 + size]))
        at += 5 + size
    assert at == len(capture)
    return found


def chosen_version(server_hello: bytes) -> int:
    """The version in the extension supported_versions; RFC 8446, 4.1.3 and 4.2.1."""
    assert server_hello[0] == 2
    at = 4 + 2 + 32  # type and length, legacy version, random
    at += 1 + server_hello[at] + 2 + 1 + 2  # session id, cipher, compression, length of extensions
    while at < len(server_hello):
        kind, size = (int.from_bytes(server_hello[at + i : at + i + 2], "big") for i in (0, 2))
        if kind == 43:
            return int.from_bytes(server_hello[at + 4 : at + 4 + size], "big")
        at += 4 + size
    raise AssertionError("no version")


HANDSHAKE, CHANGE_CIPHER, ENCRYPTED = 22, 20, 23


async def test_a_capture_shows_nothing_but_tls_1_3() -> None:
    async with bob() as server, trio.open_nursery() as proxies:
        wire = Wire(server.address)
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        proxies.start_soon(trio.serve_listeners, wire.attend, listeners)
        port = listeners[0].socket.getsockname()[1]
        async with dialled(Address("127.0.0.1", port)) as channel:
            assert await echoed(channel) == SECRET
        proxies.cancel_scope.cancel()

    up, down = records(bytes(wire.up)), records(bytes(wire.down))
    for first, *rest in (up, down):
        assert first[0] == HANDSHAKE  # ClientHello, ServerHello: all else is encrypted
        assert {kind for kind, _, _ in rest} == {CHANGE_CIPHER, ENCRYPTED}
        assert all(content == b"\x01" for kind, _, content in rest if kind == CHANGE_CIPHER)
        assert {version for _, version, _ in rest} == {0x0303}  # as RFC 8446, 5.1 has it
    assert chosen_version(down[0][2]) == 0x0304
    for said in (SECRET, SECRET[:8], ALICE.public_key, BOB.public_key, b"p2pmoe peer"):
        assert said not in wire.up + wire.down


# ------------------------------------------------------------------ who broke the protocol before
async def test_an_address_whose_peers_break_the_protocol_is_served_slowly() -> None:
    slow = QuotaParams(offences=Rate(0.001, 1), handshakes_in_disgrace=Rate(0.001, 1))
    async with trio.open_nursery() as servers:
        broken = MalformedMessage("a rule")
        judged: list[P2PMoEError | None] = [None, broken, None, broken]

        async def judge(channel: Channel) -> P2PMoEError | None:
            await channel.stream.send_all(SECRET)
            return judged.pop(0) if judged else None

        serve = transport(credentials(BOB), slow).serve
        address = await servers.start(serve, ANY_PORT, judge)
        for _ in range(5):  # the fifth is the one that each address has in disgrace
            async with dialled(address) as channel:
                assert await channel.stream.receive_some() == SECRET
                assert await channel.stream.receive_some() == b""
        with trio.move_on_after(0.1) as patience:
            await transport(credentials(ALICE)).dial(address, None)
        assert patience.cancelled_caught
        servers.cancel_scope.cancel()

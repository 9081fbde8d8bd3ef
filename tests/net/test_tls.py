"""What each side of a handshake says of the other; streams in memory, time virtual."""

from __future__ import annotations

import os
import ssl
import stat
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from cryptography.hazmat.primitives.serialization import Encoding

from p2pmoe.errors import (
    ConfigurationError,
    NotAllowed,
    P2PMoEError,
    PeerUnreachable,
    VersionMismatch,
)
from p2pmoe.identity import KeyPair, network_id
from p2pmoe.net.certificates import issue, make_authority
from p2pmoe.net.quota import QuotaParams
from p2pmoe.net.tls import (
    OPEN_FROM,
    OPEN_UNTIL,
    Credentials,
    Tls,
    _as_file,
    explain,
    make_context,
)
from tests.net.strangers import (
    ADDRESS,
    ALICE,
    AUTHORITY_KEY,
    BOB,
    MALLORY,
    MEMBER,
    RSA_KEY,
    Outcome,
    credentials,
    forge,
    met,
    proved,
)


# ------------------------------------------------------------------ members of one network
async def greet(mine: Credentials, theirs: Credentials, **dial: Any) -> tuple[Outcome, Outcome]:
    """What a dialler and a listener come to."""
    here, there = trio.testing.memory_stream_pair()
    address, expect = dial.get("address", ADDRESS), dial.get("expect")
    return await met(Tls(mine).dialled(here, address, expect), Tls(theirs).accepted(there, ADDRESS))


async def test_two_members_prove_their_keys_to_each_other() -> None:
    mine, theirs = await greet(credentials(ALICE), credentials(BOB), expect=BOB.peer_id)
    assert (mine.peer, mine.public_key) == (BOB.peer_id, BOB.public_key)
    assert (theirs.peer, theirs.public_key) == (ALICE.peer_id, ALICE.public_key)
    assert mine.remote == ADDRESS
    assert mine.expires_at == OPEN_UNTIL.timestamp()
    assert mine.stream.tls.version() == "TLSv1.3"
    async with trio.open_nursery() as writes:
        writes.start_soon(mine.stream.send_all, b"hello")
        assert await theirs.stream.receive_some() == b"hello"


async def test_nobody_gets_a_ticket_to_come_back_with() -> None:
    mine, theirs = await greet(credentials(ALICE), credentials(BOB))
    async with trio.open_nursery() as writes:
        writes.start_soon(theirs.stream.send_all, b"hello")
        assert await mine.stream.receive_some() == b"hello"
    assert not mine.stream.tls.session.has_ticket
    assert not mine.stream.tls.session_reused


@pytest.mark.parametrize(
    "dial",
    [
        {"expect": MALLORY.peer_id},
        {"address": replace(ADDRESS, peer_prefix=MALLORY.peer_id.hex[:12])},
    ],
)
async def test_a_peer_that_answers_for_another_is_refused_by_name(dial: dict[str, Any]) -> None:
    mine, _ = await greet(credentials(ALICE), credentials(BOB), **dial)
    assert type(mine) is NotAllowed
    assert f"peer {BOB.peer_id.short} answers there, and not {MALLORY.peer_id.short}" in str(mine)
    assert mine.peer == BOB.peer_id.short


async def test_a_peer_may_be_dialled_by_the_beginning_of_its_id() -> None:
    address = replace(ADDRESS, peer_prefix=BOB.peer_id.hex[:12])
    mine, _ = await greet(credentials(ALICE), credentials(BOB), address=address)
    assert mine.peer == BOB.peer_id


async def test_a_peer_does_not_talk_to_itself() -> None:
    mine, theirs = await greet(credentials(ALICE), credentials(ALICE))
    assert type(mine) is NotAllowed
    assert type(theirs) is NotAllowed
    assert "this peer itself" in str(mine)


async def test_open_networks_of_different_names_do_not_meet() -> None:
    mine, theirs = await greet(credentials(ALICE), credentials(BOB, "another"))
    assert "of another network: this peer's is" in str(mine)
    assert "of another network: this peer's is" in str(theirs)


@pytest.mark.parametrize("word", ["caf\u00e9", "cafe\u0301"])
def test_a_network_has_one_id_however_its_name_is_typed(word: str) -> None:
    assert credentials(ALICE, word).network == credentials(BOB, "caf\u00e9").network


# ------------------------------------------------------------------ private networks, and expiry
OWNER = KeyPair.from_seed(b"owner of a private network......")
SOON = datetime(2090, 1, 1, tzinfo=UTC)


def invited(keys: KeyPair, until: datetime = SOON) -> Credentials:
    authority = make_authority(OWNER, OPEN_FROM, OPEN_UNTIL)
    return Credentials.of(keys, authority, issue(OWNER, keys.public_key, OPEN_FROM, until))


async def test_a_private_network_lets_in_whom_its_owner_invited() -> None:
    mine, theirs = await greet(invited(ALICE), invited(BOB))
    assert mine.peer == BOB.peer_id
    assert theirs.peer == ALICE.peer_id
    assert invited(ALICE).network == network_id(OWNER.public_key)


async def test_a_channel_ends_with_the_invitation_that_ends_first() -> None:
    mine, theirs = await greet(invited(ALICE), invited(BOB, OPEN_UNTIL))
    assert mine.expires_at == theirs.expires_at == SOON.timestamp()


@pytest.mark.parametrize("dials", [True, False], ids=["dials", "accepts"])
async def test_an_expired_peer_says_so_before_it_asks_anybody(dials: bool) -> None:
    late = Tls(invited(ALICE), wall_clock=SOON.timestamp)
    here, there = trio.testing.memory_stream_pair()
    with pytest.raises(NotAllowed, match=r"this peer has expired") as caught:
        await proved(late, here, dials=dials)
    assert caught.value.address == str(ADDRESS)
    assert await there.receive_some() == b""


@pytest.mark.parametrize(
    ("authority", "leaf", "why"),
    [
        (make_authority(OWNER, OPEN_FROM, OPEN_UNTIL), MEMBER, "signed by the network's authority"),
        (make_authority(AUTHORITY_KEY, OPEN_FROM, OPEN_UNTIL), MEMBER, "for another key"),
        (forge(RSA_KEY.public_key()), MEMBER, "holds no Ed25519 key"),
    ],
)
def test_credentials_that_do_not_fit_together_are_refused(
    authority: Any, leaf: Any, why: str
) -> None:
    with pytest.raises(ConfigurationError, match=why):
        Credentials.of(ALICE, authority, leaf)


# ------------------------------------------------------------------ other ends of a handshake
@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n\r\n", b"hello\n", b"SSH-2.0-OpenSSH_9\r\n"])
@pytest.mark.parametrize("dials", [True, False], ids=["dials", "accepts"])
async def test_plain_bytes_are_not_taken_for_tls(data: bytes, dials: bool) -> None:
    here, there = trio.testing.memory_stream_pair()
    await there.send_all(data)
    await there.send_eof()
    with pytest.raises(PeerUnreachable, match="does not speak TLS") as caught:
        await proved(Tls(credentials(ALICE)), here, dials=dials)
    assert caught.value.stage == "tls"


async def test_a_connection_that_closes_at_once_is_unreachable() -> None:
    here, there = trio.testing.memory_stream_pair()
    await there.aclose()
    with pytest.raises(PeerUnreachable, match="tls: "):
        await Tls(credentials(ALICE)).accepted(here, ADDRESS)


@pytest.mark.parametrize("dials", [True, False], ids=["dials", "accepts"])
async def test_a_silent_stranger_has_five_seconds(autojump_clock: Any, dials: bool) -> None:
    here, there = trio.testing.memory_stream_pair()
    begun = trio.current_time()
    with pytest.raises(PeerUnreachable, match=r"no handshake within 5 s"):
        await proved(Tls(credentials(ALICE)), here, dials=dials)
    assert trio.current_time() - begun == pytest.approx(QuotaParams().handshake)
    with pytest.raises(trio.BrokenResourceError):
        await there.send_all(b"hello")  # closed on the other side


async def test_a_stranger_that_drips_bytes_has_five_seconds_too(autojump_clock: Any) -> None:
    here, there = trio.testing.memory_stream_pair()

    async def drip() -> None:
        with suppress(trio.BrokenResourceError):
            for byte in b"\x16\x03\x01\x02\x00" + bytes(100):
                await there.send_all(bytes([byte]))
                await trio.sleep(1)

    async with trio.open_nursery() as writes:
        writes.start_soon(drip)
        with pytest.raises(PeerUnreachable, match=r"no handshake within 5 s"):
            await Tls(credentials(ALICE)).accepted(here, ADDRESS)


async def test_a_refused_stranger_cannot_hold_the_server_by_going_on(autojump_clock: Any) -> None:
    here, there = trio.testing.memory_stream_pair()
    begun = trio.current_time()
    await there.send_all(b"GET / HTTP/1.1\r\n\r\n")  # and neither reads nor closes
    with pytest.raises(PeerUnreachable):
        await Tls(credentials(ALICE)).accepted(here, ADDRESS)
    assert trio.current_time() - begun == pytest.approx(QuotaParams().linger)


async def test_a_refused_stranger_cannot_send_without_end() -> None:
    quota = QuotaParams(linger=60.0)
    here, there = trio.testing.memory_stream_pair()

    async def pour() -> None:
        with suppress(trio.BrokenResourceError):
            while True:
                await there.send_all(bytes(16384))

    with trio.fail_after(30):
        async with trio.open_nursery() as writes:
            writes.start_soon(pour)
            with pytest.raises(PeerUnreachable):
                await Tls(credentials(ALICE), quota).accepted(here, ADDRESS)


async def test_a_cancelled_handshake_closes_its_stream() -> None:
    here, there = trio.testing.memory_stream_pair()
    with trio.CancelScope() as scope:
        scope.cancel()
        await Tls(credentials(ALICE)).dialled(here, ADDRESS, None)
    with pytest.raises(trio.BrokenResourceError):
        await there.send_all(b"hello")


# ------------------------------------------------------------------ explain, and the chain's file
def openssl(reason: str | None) -> ssl.SSLError:
    error = ssl.SSLError(1, "as OpenSSL says it")
    error.reason = reason
    return error


@pytest.mark.parametrize(
    ("cause", "kind", "text"),
    [
        (openssl("TLSV1_ALERT_UNKNOWN_CA"), NotAllowed, "of another network"),
        (openssl("SSLV3_ALERT_BAD_CERTIFICATE"), NotAllowed, "bad certificate"),
        (openssl("SSLV3_ALERT_HANDSHAKE_FAILURE"), PeerUnreachable, "handshake failure"),
        (openssl("TLSV1_ALERT_NO_APPLICATION_PROTOCOL"), VersionMismatch, "p2pmoe/1"),
        (openssl("RECORD_LAYER_FAILURE"), PeerUnreachable, "record layer failure"),
        (openssl(None), PeerUnreachable, "no reason given"),
        (
            ConnectionResetError(104, "Connection reset by peer"),
            PeerUnreachable,
            "connection reset",
        ),
        (None, PeerUnreachable, "the connection broke"),
    ],
)
def test_an_end_is_explained(cause: Exception | None, kind: type[P2PMoEError], text: str) -> None:
    broken = trio.BrokenResourceError()
    broken.__cause__ = cause
    error = explain(broken)
    assert type(error) is kind
    assert text in str(error)
    assert error.stage == "tls"
    if isinstance(cause, ssl.SSLError):
        assert str(explain(cause)) == str(error)


@pytest.mark.parametrize("in_memory", [True, False])
def test_the_key_is_in_a_file_only_while_it_is_read_and_for_the_owner_alone(
    in_memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not in_memory:
        monkeypatch.delattr(os, "memfd_create")
    with _as_file(b"secret") as name:
        path = Path(name)
        assert path.read_bytes() == b"secret"
        assert in_memory or stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not path.exists()


@pytest.mark.parametrize("protocol", [ssl.PROTOCOL_TLS_CLIENT, ssl.PROTOCOL_TLS_SERVER])
def test_a_context_leaves_nothing_to_its_defaults(protocol: int) -> None:
    own = credentials(ALICE)
    context = make_context(own, protocol)
    assert context.minimum_version == context.maximum_version == ssl.TLSVersion.TLSv1_3
    assert context.verify_mode == ssl.CERT_REQUIRED
    assert context.get_ca_certs(binary_form=True) == [own.authority.public_bytes(Encoding.DER)]
    assert not context.check_hostname

"""Who is refused in a handshake, and what each side says and learns; streams in memory."""

from __future__ import annotations

import pytest
import trio.testing

from p2pmoe.errors import NotAllowed, P2PMoEError, VersionMismatch
from p2pmoe.net.tls import Tls
from tests.net.strangers import (
    ADDRESS,
    ALICE,
    EC_KEY,
    EXPIRED,
    LARGE,
    MALLORY,
    MEMBER,
    OLD_TLS,
    OTHER_NETWORK,
    RSA_KEY,
    WITHOUT_CERTIFICATE,
    Outcome,
    Stranger,
    by_mallory,
    credentials,
    forge,
    member_authority,
    met,
    of_mallory,
    proved,
    strange,
)

NETWORK = credentials(ALICE).network


async def judged(stranger: Stranger, *, stranger_is_server: bool) -> tuple[Outcome, Outcome]:
    """What Alice makes of a stranger, and what the stranger learns of it."""
    here, there = trio.testing.memory_stream_pair()
    mine = proved(Tls(credentials(ALICE)), here, dials=stranger_is_server)
    return await met(mine, strange(there, stranger, server=stranger_is_server))


REFUSED = {
    "another network": (OTHER_NETWORK, NotAllowed, f"this peer's is {NETWORK.hex()[:8]}"),
    "an expired leaf": (EXPIRED, NotAllowed, "has expired"),
    "a leaf that says CA:TRUE": (of_mallory(member_authority(MALLORY)), NotAllowed, "CA:TRUE"),
    "a leaf without extensions": (
        of_mallory(forge(MALLORY.public_key, extensions=())), NotAllowed, "refused"),
    "a leaf by a member": (by_mallory(MEMBER), NotAllowed, "signed by a peer"),
    "a leaf by a member that says CA:TRUE": (
        by_mallory(member_authority(MALLORY)), NotAllowed, "signed by a peer"),
    "an EC key": (
        Stranger(private_key=EC_KEY, chain=(forge(EC_KEY.public_key()),)), NotAllowed, "Ed25519"),
    "an RSA key": (
        Stranger(private_key=RSA_KEY, chain=(forge(RSA_KEY.public_key()),)), NotAllowed, "Ed25519"),
    "a large leaf": (LARGE, NotAllowed, "more than 2048"),
    "another ALPN": (of_mallory(MEMBER, alpn="p2pmoe/2"), VersionMismatch, "p2pmoe/1"),
    "no ALPN": (of_mallory(MEMBER, alpn=None), VersionMismatch, "p2pmoe/1"),
    "our own key": (
        Stranger(private_key=ALICE.private_key, chain=(forge(ALICE.public_key),)),
        NotAllowed, "this peer itself"),
}  # fmt: skip


@pytest.mark.parametrize("stranger_is_server", [False, True], ids=["client", "server"])
@pytest.mark.parametrize("what", REFUSED)
async def test_a_stranger_is_refused_with_the_reason(what: str, stranger_is_server: bool) -> None:
    stranger, kind, reason = REFUSED[what]
    mine, theirs = await judged(stranger, stranger_is_server=stranger_is_server)
    assert type(mine) is kind
    assert reason in str(mine)
    assert str(mine).startswith(f"{ADDRESS}: tls: ")
    assert (mine.stage, mine.address) == ("tls", str(ADDRESS))
    assert not mine.retryable
    assert isinstance(theirs, P2PMoEError) or theirs == b""  # not one byte of ours was sent


@pytest.mark.parametrize(
    ("stranger", "kind", "reason"),
    [
        (WITHOUT_CERTIFICATE, NotAllowed, "shows no certificate"),
        (OLD_TLS, VersionMismatch, "does not speak TLS 1.3"),
    ],
)
async def test_a_client_that_lacks_something_is_refused(
    stranger: Stranger, kind: type[P2PMoEError], reason: str
) -> None:
    mine, _ = await judged(stranger, stranger_is_server=False)
    assert type(mine) is kind
    assert reason in str(mine)


async def test_a_server_with_an_old_tls_is_refused_by_itself() -> None:
    mine, theirs = await judged(OLD_TLS, stranger_is_server=True)
    assert type(mine) is type(theirs) is VersionMismatch
    assert "does not speak TLS 1.3" in str(mine)


@pytest.mark.parametrize("stranger_is_server", [False, True], ids=["client", "server"])
@pytest.mark.parametrize(
    ("stranger", "reason"),
    [
        (OTHER_NETWORK, "of another network"),
        (EXPIRED, "finds this peer's certificate expired"),
        (of_mallory(forge(MALLORY.public_key, extensions=())), "certificate unknown"),
    ],
)
async def test_the_refused_side_learns_why_though_it_sent_first(
    stranger: Stranger, reason: str, stranger_is_server: bool
) -> None:
    _, theirs = await judged(stranger, stranger_is_server=stranger_is_server)
    assert type(theirs) is NotAllowed
    assert reason in str(theirs)


async def test_a_client_without_certificate_learns_why() -> None:
    _, theirs = await judged(WITHOUT_CERTIFICATE, stranger_is_server=False)
    assert type(theirs) is NotAllowed
    assert "asks for a certificate" in str(theirs)

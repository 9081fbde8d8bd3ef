"""Which leaf certificates become a value, and which do not."""

from __future__ import annotations

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from p2pmoe.identity import KeyPair
from p2pmoe.net.certificates import LEAF_BYTES, issue, make_authority, read_leaf
from p2pmoe.net.tls import OPEN_FROM, OPEN_UNTIL
from tests.net.strangers import (
    ALICE,
    AUTHORITY_KEY,
    MALLORY,
    NETWORK,
    ballast,
    forge,
    leaf_extensions,
    member_authority,
)

AUTHORITY = make_authority(AUTHORITY_KEY, OPEN_FROM, OPEN_UNTIL)
IDENTITY_POINT = (1).to_bytes(32, "little")  # of order one: a signature for it verifies everything


def read(leaf: x509.Certificate) -> object:
    return read_leaf(leaf.public_bytes(Encoding.DER), AUTHORITY)


def test_an_issued_leaf_says_its_key_and_its_end() -> None:
    leaf = read(issue(AUTHORITY_KEY, ALICE.public_key, OPEN_FROM, OPEN_UNTIL))
    assert leaf.public_key == ALICE.public_key
    assert leaf.expires_at == OPEN_UNTIL.timestamp()


def test_an_authority_may_sign_leaves_and_no_further_authority() -> None:
    constraints = AUTHORITY.extensions.get_extension_for_class(x509.BasicConstraints)
    usage = AUTHORITY.extensions.get_extension_for_class(x509.KeyUsage)
    assert constraints.critical
    assert (constraints.value.ca, constraints.value.path_length) == (True, 0)
    assert usage.critical
    assert usage.value.key_cert_sign
    assert not usage.value.digital_signature


def test_no_certificate_carries_the_name_of_its_network() -> None:
    leaf = issue(AUTHORITY_KEY, ALICE.public_key, OPEN_FROM, OPEN_UNTIL)
    for certificate in (AUTHORITY, leaf):
        assert NETWORK.encode() not in certificate.public_bytes(Encoding.DER)


def test_a_leaf_is_far_below_its_limit() -> None:
    leaf = issue(AUTHORITY_KEY, ALICE.public_key, OPEN_FROM, OPEN_UNTIL)
    assert len(leaf.public_bytes(Encoding.DER)) < LEAF_BYTES / 4


@pytest.mark.parametrize(
    ("leaf", "why"),
    [
        (member_authority(MALLORY), "CA:TRUE"),
        (AUTHORITY, "CA:TRUE"),
        (forge(MALLORY.public_key, extensions=()), "not of the form"),
        (forge(MALLORY.public_key, signer=ALICE.private_key), "not signed by"),
        (forge(MALLORY.public_key, issuer="another"), "not signed by"),
        (forge(ec.generate_private_key(ec.SECP256R1()).public_key()), "no Ed25519 key"),
        (forge(IDENTITY_POINT), "key.small_order"),
        (forge(b"\xff" * 32), "key.not_canonical"),
        (forge(MALLORY.public_key, extensions=(*leaf_extensions(), ballast(LEAF_BYTES))), "bytes"),
    ],
)
def test_a_leaf_that_an_honest_authority_does_not_issue_is_no_value(
    leaf: x509.Certificate, why: str
) -> None:
    with pytest.raises(ValueError, match=why):
        read(leaf)


@pytest.mark.parametrize("der", [b"", b"0", bytes(100), b"\x30\x82\x01\x00" + bytes(256)])
def test_bytes_that_are_no_certificate_are_no_value(der: bytes) -> None:
    with pytest.raises(ValueError, match="form"):
        read_leaf(der, AUTHORITY)


@pytest.mark.filterwarnings("ignore:Parsed a serial number")
def test_a_leaf_cut_short_anywhere_or_with_one_byte_changed_is_no_value() -> None:
    der = forge(ALICE.public_key).public_bytes(Encoding.DER)
    assert read_leaf(der, AUTHORITY).public_key == ALICE.public_key
    for at in range(len(der)):
        changed = bytes(byte ^ (index == at) for index, byte in enumerate(der))
        for bad in (der[:at], changed):
            with pytest.raises(ValueError, match=r"\w"):
                read_leaf(bad, AUTHORITY)


def test_two_authorities_of_the_same_key_are_one() -> None:
    twin = make_authority(KeyPair(AUTHORITY_KEY.private_key), OPEN_FROM, OPEN_UNTIL)
    leaf = issue(AUTHORITY_KEY, ALICE.public_key, OPEN_FROM, OPEN_UNTIL)
    assert read_leaf(leaf.public_bytes(Encoding.DER), twin).public_key == ALICE.public_key

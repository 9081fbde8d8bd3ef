"""Certificates: an authority makes a network, and a leaf that it signed lets one peer in.

Rules: everything stands on Ed25519. The authority signs leaves and nothing else may (pathlen 0). A
leaf carries its peer's identity key, and no certificate carries the name of a network. A leaf from
outside becomes a value through `read_leaf` alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from p2pmoe.errors import MalformedMessage
from p2pmoe.identity import KeyPair, check_public_key

LEAF_BYTES = 2048  # a leaf made here has about 360; a guess
AUTHORITY_NAME = "p2pmoe authority"  # the same in all networks; RFC 5280, 4.1.2.4 wants a name
LEAF_NAME = "p2pmoe peer"

# What cryptography raises for bytes that are no certificate of the usual form.
_UNREADABLE = (
    ValueError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.ExtensionNotFound,
    x509.UnsupportedGeneralNameType,
)


@dataclass(frozen=True, slots=True)
class Leaf:
    """What a checked leaf says; made by `read_leaf` alone. `expires_at` in seconds since 1970."""

    public_key: bytes
    expires_at: float


def make_authority(
    authority_key: KeyPair, not_before: datetime, not_after: datetime
) -> x509.Certificate:
    """The certificate of a network's authority, signed by itself. Times carry a time zone."""
    public_key = authority_key.private_key.public_key()
    return (
        _begin(AUTHORITY_NAME, authority_key.public_key, not_before, not_after)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .sign(authority_key.private_key, None)
    )


def issue(
    authority_key: KeyPair, public_key: bytes, not_before: datetime, not_after: datetime
) -> x509.Certificate:
    """The leaf that lets the holder of `public_key` into the network. Times carry a time zone."""
    authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(
        authority_key.private_key.public_key()
    )
    return (
        _begin(LEAF_NAME, public_key, not_before, not_after)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(authority, critical=False)
        .sign(authority_key.private_key, None)
    )


def read_leaf(der: bytes, authority: x509.Certificate) -> Leaf:
    """A leaf as a value, after every check but the one of its period, which needs a clock.

    Raises `ValueError` with what is wrong, in words that follow "the certificate".
    """
    if len(der) > LEAF_BYTES:
        raise ValueError(f"has {len(der)} bytes, more than {LEAF_BYTES}")
    try:
        leaf = x509.load_der_x509_certificate(der)
        key = leaf.public_key()
        constraints = leaf.extensions.get_extension_for_class(x509.BasicConstraints)
        expires_at = leaf.not_valid_after_utc.timestamp()
    except _UNREADABLE:
        raise ValueError("is not of the form that peers have") from None
    if not isinstance(key, Ed25519PublicKey):
        raise ValueError("holds no Ed25519 key")
    if constraints.value.ca:
        raise ValueError("says CA:TRUE, but only the authority may issue others")
    try:
        leaf.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        raise ValueError("is not signed by the network's authority itself") from None
    try:
        return Leaf(check_public_key(key.public_bytes_raw()), expires_at)
    except MalformedMessage as error:
        raise ValueError(f"holds a key that no peer may have ({error})") from None


def _begin(
    subject: str, public_key: bytes, not_before: datetime, not_after: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .issuer_name(_name(AUTHORITY_NAME))
        .subject_name(_name(subject))
        .public_key(Ed25519PublicKey.from_public_bytes(public_key))
        .serial_number(x509.random_serial_number())
        .not_valid_before(not_before)
        .not_valid_after(not_after)
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common_name)])


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )

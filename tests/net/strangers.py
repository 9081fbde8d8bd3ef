"""Two sides of a handshake, and the certificates and contexts that no honest peer has."""

from __future__ import annotations

import ssl
import tempfile
from collections.abc import Awaitable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import trio
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from p2pmoe.errors import P2PMoEError
from p2pmoe.identity import KeyPair, open_network_seed
from p2pmoe.net.certificates import AUTHORITY_NAME, LEAF_NAME
from p2pmoe.net.quota import QuotaParams
from p2pmoe.net.tls import ALPN, OPEN_FROM, OPEN_UNTIL, Credentials, Tls, _say_why, explain
from p2pmoe.net.transport import Channel
from p2pmoe.wire.address import Address

NETWORK = "forgery"
AUTHORITY_KEY = KeyPair.from_seed(open_network_seed(NETWORK))
ALICE, BOB, MALLORY = (KeyPair.from_seed(bytes([n]) * 32) for n in (1, 2, 3))
EC_KEY = ec.generate_private_key(ec.SECP256R1())
RSA_KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
ADDRESS = Address("192.0.2.7", 4747)
Extensions = tuple[tuple[x509.ExtensionType, bool], ...]
LONG_AGO = datetime(2001, 1, 1, tzinfo=UTC)


def credentials(keys: KeyPair, network: str = NETWORK) -> Credentials:
    return Credentials.for_open_network(keys, network)


def name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])


def forge(
    public_key: Any,
    *,
    signer: Any = AUTHORITY_KEY.private_key,
    issuer: str = AUTHORITY_NAME,
    subject: str = LEAF_NAME,
    not_after: datetime = OPEN_UNTIL,
    extensions: Extensions | None = None,
) -> x509.Certificate:
    """A certificate signed by `signer`, with the extensions of a leaf unless others are given."""
    if isinstance(public_key, bytes):
        public_key = Ed25519PublicKey.from_public_bytes(public_key)
    builder = (
        x509.CertificateBuilder()
        .issuer_name(name(issuer))
        .subject_name(name(subject))
        .public_key(public_key)
        .serial_number(1)
        .not_valid_before(OPEN_FROM)
        .not_valid_after(not_after)
    )
    for extension, critical in leaf_extensions(signer) if extensions is None else extensions:
        builder = builder.add_extension(extension, critical=critical)
    return builder.sign(signer, None)


def leaf_extensions(signer: Any = AUTHORITY_KEY.private_key) -> Extensions:
    """Those of an honest leaf."""
    return (*_rights(ca=False), _issuer(signer))


def member_authority(keys: KeyPair) -> x509.Certificate:
    """A leaf of the true authority, in perfect form, that says its holder may issue others."""
    own = x509.SubjectKeyIdentifier.from_public_key(keys.private_key.public_key())
    return forge(
        keys.public_key,
        extensions=(*_rights(ca=True), _issuer(AUTHORITY_KEY.private_key), (own, False)),
    )


def _issuer(signer: Any) -> tuple[x509.ExtensionType, bool]:
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), False


def _rights(*, ca: bool) -> Extensions:
    usage = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement"), False
    ) | dict.fromkeys(("crl_sign", "encipher_only", "decipher_only"), False)
    return (
        (x509.BasicConstraints(ca=ca, path_length=None), True),
        (x509.KeyUsage(digital_signature=True, key_cert_sign=ca, **usage), True),
    )


def ballast(size: int) -> tuple[x509.ExtensionType, bool]:
    """An extension of about `size` bytes that nobody knows."""
    return x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.6.1.4.1.1"), bytes(size)), False


@dataclass(frozen=True, kw_only=True)
class Stranger:
    """How somebody who is no honest peer speaks TLS. `chain` is a leaf and what stands above it."""

    private_key: Any = None
    chain: tuple[x509.Certificate, ...] = ()
    alpn: str | None = ALPN
    version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3

    def context(self, protocol: int) -> ssl.SSLContext:
        """A context that shows the chain, and believes every certificate it is shown."""
        context = ssl.SSLContext(protocol)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.minimum_version = context.maximum_version = self.version
        if self.alpn:
            context.set_alpn_protocols([self.alpn])
        if protocol == ssl.PROTOCOL_TLS_SERVER:
            context.num_tickets = 0
        if self.chain:
            key = self.private_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
            with tempfile.NamedTemporaryFile() as file:
                file.write(key + b"".join(c.public_bytes(Encoding.PEM) for c in self.chain))
                file.flush()
                context.load_cert_chain(file.name)
        return context


# ------------------------------------------------------------------ who comes along
def of_mallory(*chain: Any, **other: Any) -> Stranger:
    return Stranger(private_key=MALLORY.private_key, chain=chain, **other)


def by_mallory(above: Any) -> Stranger:
    """A leaf for Bob that Mallory signed, with what Mallory has below it."""
    leaf = forge(BOB.public_key, signer=MALLORY.private_key, issuer="p2pmoe peer", subject="bob")
    return Stranger(private_key=BOB.private_key, chain=(leaf, above))


MEMBER = forge(MALLORY.public_key)
OTHER_NETWORK = of_mallory(credentials(MALLORY, "another").leaf)
WITHOUT_CERTIFICATE = Stranger()
OLD_TLS = of_mallory(MEMBER, version=ssl.TLSVersion.TLSv1_2)
EXPIRED = of_mallory(forge(MALLORY.public_key, not_after=LONG_AGO))
LARGE = of_mallory(forge(MALLORY.public_key, extensions=(*leaf_extensions(), ballast(2048))))


# ------------------------------------------------------------------ two sides that meet
Outcome = Channel | P2PMoEError | bytes


async def met(first: Awaitable[Outcome], second: Awaitable[Outcome]) -> tuple[Outcome, Outcome]:
    """What two sides that talk to each other came to."""
    outcomes: dict[int, Outcome] = {}

    async def run(side: int, work: Awaitable[Outcome]) -> None:
        try:
            outcomes[side] = await work
        except P2PMoEError as error:
            outcomes[side] = error

    async with trio.open_nursery() as sides:
        sides.start_soon(run, 0, first)
        sides.start_soon(run, 1, second)
    return outcomes[0], outcomes[1]


def proved(alice: Tls, stream: trio.abc.Stream, *, dials: bool) -> Awaitable[Channel]:
    """The handshake of one side."""
    return alice.dialled(stream, ADDRESS, None) if dials else alice.accepted(stream, ADDRESS)


async def strange(stream: trio.abc.Stream, stranger: Stranger, *, server: bool) -> Outcome:
    """Speak TLS as a stranger does: finish, send at once, then read what comes."""
    protocol = ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT
    secured = trio.SSLStream(
        stream, stranger.context(protocol), server_side=server, https_compatible=True
    )
    try:
        await secured.do_handshake()
        await secured.send_all(bytes(1000))
        return await secured.receive_some()
    except trio.BrokenResourceError as error:
        await _say_why(secured, QuotaParams())
        return explain(error, address=ADDRESS)
    finally:
        await trio.aclose_forcefully(stream)

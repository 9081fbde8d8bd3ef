"""TLS 1.3 both ways: each side proves its identity key, by a leaf of the network's authority.

Rules: a context is made here with everything explicit. A channel comes into being only after the
checks of `Tls._examine`, which OpenSSL does not make, and before any byte of ours is sent. A side
that refuses says why, as far as TLS has a word for it; `explain` turns that word into our error.
"""

from __future__ import annotations

import os
import ssl
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime

import trio
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from p2pmoe.errors import (
    ConfigurationError,
    NotAllowed,
    P2PMoEError,
    PeerUnreachable,
    VersionMismatch,
)
from p2pmoe.identity import KeyPair, PeerId, network_id, open_network_seed
from p2pmoe.net.certificates import issue, make_authority, read_leaf
from p2pmoe.net.quota import QuotaParams
from p2pmoe.net.secure import SecureStream
from p2pmoe.net.transport import Channel, failure
from p2pmoe.wire.address import Address

ALPN = "p2pmoe/1"
TLS_VERSION = "TLSv1.3"
OPEN_FROM = datetime(2000, 1, 1, tzinfo=UTC)  # earlier than any clock that is nearly right
OPEN_UNTIL = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)  # "no end"; RFC 5280, section 4.1.2.5

_STRANGER = "it is of another network"
_NOT_TLS = "it does not speak TLS"
_BY_A_PEER = "its certificate is signed by a peer, and not by the network's authority"
_Verdict = tuple[type[P2PMoEError], str]

# What OpenSSL says when a handshake fails here, and what the other side's alert says when it failed
# there (RFC 8446, section 6.2).
_VERDICTS: dict[str, _Verdict] = {
    "WRONG_VERSION_NUMBER": (PeerUnreachable, _NOT_TLS),
    "HTTP_REQUEST": (PeerUnreachable, _NOT_TLS),
    "HTTPS_PROXY_REQUEST": (PeerUnreachable, _NOT_TLS),
    "UNEXPECTED_EOF_WHILE_READING": (PeerUnreachable, "it closed the connection"),
    "UNSUPPORTED_PROTOCOL": (VersionMismatch, "it does not speak TLS 1.3"),
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": (NotAllowed, "it shows no certificate"),
    "ALERT_PROTOCOL_VERSION": (VersionMismatch, "it does not speak TLS 1.3"),
    "ALERT_NO_APPLICATION_PROTOCOL": (VersionMismatch, f"it does not speak {ALPN}"),
    "ALERT_CERTIFICATE_REQUIRED": (NotAllowed, "it asks for a certificate, and got none"),
    "ALERT_CERTIFICATE_EXPIRED": (NotAllowed, "it finds this peer's certificate expired"),
    "ALERT_UNKNOWN_CA": (NotAllowed, _STRANGER),
    "ALERT_DECRYPT_ERROR": (NotAllowed, _STRANGER),
}
# The same for a certificate that OpenSSL refuses here; openssl-verification-options(1).
_CERTIFICATE_VERDICTS = {
    7: _STRANGER,  # the signature fails
    9: "its certificate is not valid yet: check both clocks",
    10: "its certificate has expired",
    18: _STRANGER,  # signed by itself
    19: _STRANGER,  # below an authority that is not ours
    20: _STRANGER,  # the issuer is not known
    21: _STRANGER,  # nothing leads to an issuer
    25: _BY_A_PEER,  # the path is longer than the authority allows
    79: _BY_A_PEER,  # what stands above it is no authority
}


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a peer shows, and the authority by which it judges what others show.

    `network` is the 32-byte id of the authority's network; `expires_at` in seconds since 1970.
    """

    keys: KeyPair
    authority: x509.Certificate
    leaf: x509.Certificate
    network: bytes
    expires_at: float

    @classmethod
    def of(cls, keys: KeyPair, authority: x509.Certificate, leaf: x509.Certificate) -> Credentials:
        """Credentials by an issued leaf. Raises `ConfigurationError` when the three do not fit."""
        authority_key = authority.public_key()
        if not isinstance(authority_key, Ed25519PublicKey):
            raise ConfigurationError("the authority's certificate holds no Ed25519 key")
        try:
            read = read_leaf(leaf.public_bytes(Encoding.DER), authority)
        except ValueError as error:
            raise ConfigurationError(f"the certificate of this peer {error}") from None
        if read.public_key != keys.public_key:
            raise ConfigurationError("the certificate of this peer is for another key")
        network = network_id(authority_key.public_bytes_raw())
        expires_at = min(read.expires_at, authority.not_valid_after_utc.timestamp())
        return cls(keys, authority, leaf, network, expires_at)

    @classmethod
    def for_open_network(cls, keys: KeyPair, name: str) -> Credentials:
        """Credentials that anybody can make who knows the network's name: it keeps nobody out."""
        authority_key = KeyPair.from_seed(open_network_seed(name))
        authority = make_authority(authority_key, OPEN_FROM, OPEN_UNTIL)
        leaf = issue(authority_key, keys.public_key, OPEN_FROM, OPEN_UNTIL)
        return cls.of(keys, authority, leaf)


def make_context(credentials: Credentials, protocol: int) -> ssl.SSLContext:
    """A context for `ssl.PROTOCOL_TLS_CLIENT` or `ssl.PROTOCOL_TLS_SERVER`."""
    context = ssl.SSLContext(protocol)
    context.check_hostname = False  # the key is the identity; an address proves nothing
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags = ssl.VERIFY_X509_STRICT
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.maximum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols([ALPN])
    if protocol == ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0  # no resumption: every connection proves both keys anew
    context.load_verify_locations(cadata=credentials.authority.public_bytes(Encoding.DER))
    key = credentials.keys.private_key.private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
    )
    with _as_file(key + credentials.leaf.public_bytes(Encoding.PEM)) as path:
        context.load_cert_chain(path)
    return context


class Tls:
    """The handshakes of one peer. `wall_clock` gives seconds since 1970."""

    def __init__(
        self,
        credentials: Credentials,
        quota: QuotaParams | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._credentials = credentials
        self._quota = quota or QuotaParams()
        self._wall_clock = wall_clock
        self._client = make_context(credentials, ssl.PROTOCOL_TLS_CLIENT)
        self._server = make_context(credentials, ssl.PROTOCOL_TLS_SERVER)

    async def dialled(
        self, stream: trio.abc.Stream, address: Address, expect: PeerId | None
    ) -> Channel:
        """Prove both sides on a stream that this peer opened; the stream is closed on failure.

        Raises `NotAllowed`, `VersionMismatch` or `PeerUnreachable`, with stage `tls`. The server's
        verdict on this peer is not in yet: it comes with the first read (see `explain`).
        """
        return await self._prove(stream, self._client, address, expect)

    async def accepted(self, stream: trio.abc.Stream, remote: Address) -> Channel:
        """Prove both sides on a stream that came in; as `dialled`."""
        return await self._prove(stream, self._server, remote, None)

    async def _prove(
        self,
        stream: trio.abc.Stream,
        context: ssl.SSLContext,
        remote: Address,
        expect: PeerId | None,
    ) -> Channel:
        try:
            self._check_own_expiry(remote)
            secured = trio.SSLStream(
                stream,
                context,
                server_side=context is self._server,
                # Close without close_notify: sending it could wait for a peer that does not read,
                # and a lost end is noticed anyway, by the lengths of frames and by our goodbye.
                https_compatible=True,
            )
            await self._shake_hands(secured, remote)
            return self._examine(secured, remote, expect)
        except BaseException:  # cancelled, too: nobody else owns the stream
            await trio.aclose_forcefully(stream)
            raise

    def _check_own_expiry(self, remote: Address) -> None:
        if self._wall_clock() >= self._credentials.expires_at:
            reason = "the certificate of this peer has expired: get a new one"
            raise failure(NotAllowed, "tls", remote, reason)

    async def _shake_hands(self, secured: trio.SSLStream[trio.abc.Stream], remote: Address) -> None:
        try:
            with trio.fail_after(self._quota.handshake):
                await secured.do_handshake()
        except trio.TooSlowError:
            reason = f"no handshake within {self._quota.handshake:g} s"
            raise failure(PeerUnreachable, "tls", remote, reason) from None
        except trio.BrokenResourceError as error:
            await _say_why(secured, self._quota)
            raise explain(error, address=remote, network=self._credentials.network) from error
        finally:
            # Trio keeps a bound method here that it needs no more: a circle around OpenSSL's state,
            # tens of KiB that the garbage collector would take for a few small objects.
            secured._handshook._afn = trio.lowlevel.checkpoint  # type: ignore[assignment]  # takes nothing

    def _examine(
        self,
        secured: trio.SSLStream[trio.abc.Stream],
        remote: Address,
        expect: PeerId | None,
    ) -> Channel:
        """The channel, if the other side is one to talk to; what OpenSSL leaves to us."""
        spoken = secured.version(), secured.selected_alpn_protocol()
        if spoken != (TLS_VERSION, ALPN):
            reason = f"it speaks {spoken[0]} and {spoken[1]}, this peer {TLS_VERSION} and {ALPN}"
            raise failure(VersionMismatch, "tls", remote, reason)
        try:
            leaf = read_leaf(secured.getpeercert(binary_form=True), self._credentials.authority)
        except ValueError as error:
            raise failure(NotAllowed, "tls", remote, f"its certificate {error}") from None
        peer = PeerId.of(leaf.public_key)
        if reason := self._wrong_peer(peer, remote, expect):
            refusal = failure(NotAllowed, "tls", remote, reason)
            refusal.peer = peer.short
            raise refusal
        expires_at = min(leaf.expires_at, self._credentials.expires_at)
        return Channel(SecureStream(secured), peer, leaf.public_key, remote, expires_at)

    def _wrong_peer(self, peer: PeerId, remote: Address, expect: PeerId | None) -> str:
        """Why this is not the one to talk to; empty if it is."""
        if peer == self._credentials.keys.peer_id:
            return "it is this peer itself"
        if expect is not None and peer != expect:
            return f"peer {peer} answers there, and not {expect}"
        if not remote.matches(peer):
            return f"peer {peer} answers there, and not {remote.peer_prefix}"
        return ""


def explain(
    error: trio.BrokenResourceError | ssl.SSLError,
    *,
    address: Address | None = None,
    network: bytes | None = None,
) -> P2PMoEError:
    """Why the other side, or OpenSSL here, ended a handshake; the result has stage `tls`.

    In TLS 1.3 the client is done before the server has judged it: a refused client learns of it
    when its first read fails. `network` is the own network's id, for the message.
    """
    kind, reason = _judge(error if isinstance(error, ssl.SSLError) else error.__cause__)
    if reason is _STRANGER and network is not None:
        reason += f": this peer's is {network.hex()[:8]}, the other cannot be known"
    return failure(kind, "tls", address, reason)


def _judge(cause: BaseException | None) -> _Verdict:
    if isinstance(cause, ssl.SSLCertVerificationError):
        refused = f"its certificate is refused: {cause.verify_message}"
        return NotAllowed, _CERTIFICATE_VERDICTS.get(cause.verify_code, refused)
    if isinstance(cause, ssl.SSLError):
        return _verdict(cause.reason or "")
    if isinstance(cause, OSError) and cause.strerror:
        return PeerUnreachable, cause.strerror.lower()
    return PeerUnreachable, "the connection broke"


def _verdict(reason: str) -> _Verdict:
    """What an OpenSSL reason means, such as `TLSV1_ALERT_UNKNOWN_CA`."""
    _, alert, name = reason.rpartition("ALERT_")
    if known := _VERDICTS.get(alert + name):
        return known
    words = name.lower().replace("_", " ") or "no reason given"
    if alert and "CERTIFICATE" in name:
        return NotAllowed, f"it refuses the certificate of this peer: {words}"
    return PeerUnreachable, f"the handshake failed: {words}"


async def _say_why(secured: trio.SSLStream[trio.abc.Stream], quota: QuotaParams) -> None:
    """Send the alert that OpenSSL has ready, and give a client the time to read it.

    Trio raises before it sends the alert. A server that closed now, with unread bytes before it,
    would reset the connection, and the alert could be lost on the way.
    """
    stream = secured.transport_stream
    with trio.move_on_after(quota.linger), suppress(trio.BrokenResourceError):
        await stream.send_all(secured._outgoing.read())
        if secured.server_side and isinstance(stream, trio.abc.HalfCloseableStream):
            await stream.send_eof()
            left = quota.linger_bytes
            while left > 0 and (data := await stream.receive_some(left)):
                left -= len(data)


@contextmanager
def _as_file(content: bytes) -> Iterator[str]:
    """A path that leads to `content` inside the block; in memory where the platform can."""
    if hasattr(os, "memfd_create"):
        with os.fdopen(os.memfd_create("p2pmoe", os.MFD_CLOEXEC), "wb") as file:
            file.write(content)
            file.flush()
            yield f"/proc/self/fd/{file.fileno()}"
    else:
        with tempfile.NamedTemporaryFile() as named:  # mode 0600
            named.write(content)
            named.flush()
            yield named.name

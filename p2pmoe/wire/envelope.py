"""Signed envelopes: `[v, kind, pub, payload, sig]` in deterministic CBOR.

    sig = Ed25519(sk, "p2pmoe/v1/" + kind + 0x00 + network id + u32be(len(payload)) + payload)

The domain in front is not on the wire. The signature is checked over the received bytes, the
received bytes are stored and relayed, and the payload is decoded only after it verified. Who
holds a `Signed[T]` need not ask whether it was checked: only `seal` and `open_envelope` make one.
"""

from __future__ import annotations

import enum
import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, TypeVar

from p2pmoe.errors import LocalProtocolError, MalformedMessage
from p2pmoe.identity import SIGNATURE_BYTES, KeyPair, PeerId, check_public_key, verify
from p2pmoe.wire import cbor, schema
from p2pmoe.wire.schema import MAX_ENVELOPE_BYTES, SignedPayload

VERSION = 1

T = TypeVar("T", bound=SignedPayload)


class Kind(enum.StrEnum):
    """The closed set of things that a peer signs. A reader names the one it expects."""

    PEER = "peer"
    SUSPECT = "suspect"
    LEAVE = "leave"
    LEASE = "lease"
    PREFIX = "prefix"
    TRANSFER = "transfer"
    MANIFEST = "manifest"
    SNAPSHOT = "snapshot"
    REVOKE = "revoke"


@dataclass(frozen=True)
class Signed(Generic[T]):
    """A payload whose signature was checked, with the bytes that it came in."""

    signer: PeerId
    public_key: bytes
    kind: Kind
    body: T
    raw: bytes

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the envelope's bytes."""
        return hashlib.sha256(self.raw).digest()


class VerifiedCache:
    """Digests of envelopes that were verified before, least recently used dropped first.

    A signature costs fifty times the decoding of a message, and the same envelopes come again and
    again. A digest covers the kind, the key and the network, so a hit proves the same fact.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._digests: OrderedDict[bytes, None] = OrderedDict()
        self.checked = 0  # signatures, so far

    def __len__(self) -> int:
        return len(self._digests)

    def knows(self, digest: bytes) -> bool:
        """Whether an envelope with this digest was verified and is still remembered."""
        if digest not in self._digests:
            return False
        self._digests.move_to_end(digest)
        return True

    def add(self, digest: bytes) -> None:
        """Remember a verified envelope."""
        self.checked += 1
        self._digests[digest] = None
        if len(self._digests) > self._size:
            self._digests.popitem(last=False)


def seal(keys: KeyPair, body: T, *, kind: Kind, network: bytes) -> Signed[T]:
    """Sign `body` for the network with this 32-byte id; `LocalProtocolError` if it is too long."""
    payload = schema.encode(body)
    signature = keys.sign(_signed_bytes(kind, network, payload))
    raw = cbor.dumps([VERSION, kind.value, keys.public_key, payload, signature])
    if len(raw) > MAX_ENVELOPE_BYTES:
        raise LocalProtocolError(f"an envelope of {len(raw)} bytes: at most {MAX_ENVELOPE_BYTES}")
    return Signed(keys.peer_id, keys.public_key, kind, body, raw)


def open_envelope(
    raw: bytes,
    body_type: type[T],
    *,
    kind: Kind,
    network: bytes,
    cache: VerifiedCache | None = None,
) -> Signed[T]:
    """Check an envelope of the expected kind and decode its payload.

    Raises `MalformedMessage` with why `envelope.*`, `key.*`, `cbor.*` or `schema.mismatch`.
    """
    public_key, payload, signature = _fields(raw, kind)
    digest = hashlib.sha256(network + raw).digest() if cache is not None else b""
    if cache is None or not cache.knows(digest):
        check_public_key(public_key)
        if not verify(public_key, signature, _signed_bytes(kind, network, payload)):
            raise MalformedMessage("envelope.signature")
        if cache is not None:
            cache.add(digest)
    body = schema.decode(payload, body_type)
    return Signed(PeerId.of(public_key), public_key, kind, body, raw)


def _fields(raw: bytes, expected: Kind) -> tuple[bytes, bytes, bytes]:
    if len(raw) > MAX_ENVELOPE_BYTES:
        raise MalformedMessage("envelope.too_long", f"{len(raw)} bytes")
    fields = cbor.loads(raw)
    if not isinstance(fields, list) or len(fields) != 5:
        raise MalformedMessage("envelope.shape", "an envelope has five fields")
    version, kind, public_key, payload, signature = fields
    if type(version) is not int or version != VERSION:
        raise MalformedMessage("envelope.version")
    if kind != expected.value:
        raise MalformedMessage("envelope.kind", f"{expected.value} was expected")
    if not (type(public_key) is type(payload) is type(signature) is bytes):
        raise MalformedMessage("envelope.shape", "key, payload and signature are bytes")
    if len(signature) != SIGNATURE_BYTES:
        raise MalformedMessage("envelope.signature", "wrong length")
    return public_key, payload, signature


def _signed_bytes(kind: Kind, network: bytes, payload: bytes) -> bytes:
    domain = b"p2pmoe/v1/" + kind.value.encode() + b"\0"
    return domain + network + len(payload).to_bytes(4, "big") + payload

"""Keys and ids: an Ed25519 key pair is a peer, and SHA-256 of its public key is the peer's id.

Rule: a public key enters the program through `check_public_key` alone. It refuses the points of
small order, for some of which one signature verifies for every message, and every encoding that
is not canonical, whatever the library underneath accepts.
"""

from __future__ import annotations

import hashlib
import os
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from p2pmoe.errors import ConfigurationError, KeyFileError, MalformedMessage

ID_BYTES = 32  # SHA-256
KEY_BYTES = 32  # RFC 8032, section 5.1.5
SIGNATURE_BYTES = 64  # RFC 8032, section 5.1.6
FIELD_PRIME = 2**255 - 19  # RFC 8032, section 5.1
NETWORK_DOMAIN = b"p2pmoe/v1/network\0"
OPEN_NETWORK_DOMAIN = b"p2pmoe/v1/open-network\0"

# The y coordinates of the eight points whose order divides eight. The two long ones are the
# roots of d*y^4 + 2*y^2 - 1 = 0, found by doubling a point of order eight down to (0, -1).
_Y8 = 0x05FC536D880238B13933C6D305ACDFD5F098EFF289F4C345B027B2C28F95E826
SMALL_ORDER_Y = frozenset({0, 1, FIELD_PRIME - 1, _Y8, FIELD_PRIME - _Y8})


@dataclass(frozen=True, slots=True, order=True)
class PeerId:
    """SHA-256 of a peer's raw public key: 256 bits, and the peer's place in the key space."""

    raw: bytes
    number: int = field(init=False, repr=False, compare=False)  # big-endian; lookups compare it

    def __post_init__(self) -> None:
        if len(self.raw) != ID_BYTES:
            raise ValueError(f"a peer id has {ID_BYTES} bytes, not {len(self.raw)}")
        object.__setattr__(self, "number", int.from_bytes(self.raw, "big"))

    def __hash__(self) -> int:
        return hash(self.raw)  # a third of what the generated one costs, and every table asks

    @classmethod
    def of(cls, public_key: bytes) -> PeerId:
        """The id of the peer that holds this raw public key."""
        return cls(hashlib.sha256(public_key).digest())

    @property
    def hex(self) -> str:
        """All 64 hex digits."""
        return self.raw.hex()

    @property
    def short(self) -> str:
        """Eight hex digits, for display only."""
        return self.raw[:4].hex()

    def __str__(self) -> str:
        return self.short


def distance(a: bytes, b: bytes) -> int:
    """XOR distance between two places in the key space (Kademlia, section 2.1)."""
    return int.from_bytes(a, "big") ^ int.from_bytes(b, "big")


def check_public_key(raw: bytes) -> bytes:
    """The key itself, if an identity may have it; else `MalformedMessage` with why `key.*`."""
    if len(raw) != KEY_BYTES:
        raise MalformedMessage("key.length", f"{len(raw)} bytes, not {KEY_BYTES}")
    y = int.from_bytes(raw, "little") & ((1 << 255) - 1)
    if y >= FIELD_PRIME:
        raise MalformedMessage("key.not_canonical")
    if y in SMALL_ORDER_Y:
        raise MalformedMessage("key.small_order")
    return raw


def verify(public_key: bytes, signature: bytes, data: bytes) -> bool:
    """Whether `signature` over `data` is by the holder of a checked `public_key`."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True


class KeyPair:
    """A peer's identity. The private half never leaves the process but by `save`."""

    __slots__ = ("peer_id", "private_key", "public_key")

    def __init__(self, private_key: Ed25519PrivateKey) -> None:
        self.private_key = private_key
        self.public_key = private_key.public_key().public_bytes_raw()
        self.peer_id = PeerId.of(self.public_key)

    def __repr__(self) -> str:
        return f"KeyPair({self.peer_id.short})"

    @classmethod
    def generate(cls) -> KeyPair:
        """A new identity from the system's randomness."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_seed(cls, seed: bytes) -> KeyPair:
        """The identity of a 32-byte seed (RFC 8032, section 5.1.5)."""
        return cls(Ed25519PrivateKey.from_private_bytes(seed))

    def sign(self, data: bytes) -> bytes:
        """An Ed25519 signature, 64 bytes."""
        return self.private_key.sign(data)

    @classmethod
    def load(cls, path: Path) -> KeyPair:
        """Read a PEM (PKCS #8) key file; `KeyFileError` says what is wrong with it."""
        try:
            key = serialization.load_pem_private_key(path.read_bytes(), password=None)
        except OSError as error:
            raise KeyFileError(f"cannot read the key {path}: {error.strerror}") from None
        except UnsupportedAlgorithm:
            key = None
        except (ValueError, TypeError):
            raise KeyFileError(f"{path} is not a key: delete it to get a new identity") from None
        if not isinstance(key, Ed25519PrivateKey):
            raise KeyFileError(f"{path} is a key of another kind: Ed25519 is needed")
        return cls(key)

    def save(self, path: Path) -> None:
        """Write a new key file that only its owner may read; an existing one is never replaced."""
        pem = self.private_key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError as error:
            raise KeyFileError(f"cannot create the key {path}: {error.strerror}") from None
        with os.fdopen(descriptor, "wb") as file:
            file.write(pem)


def network_id(authority_public_key: bytes) -> bytes:
    """The 32-byte id of the network whose certificate authority has this public key."""
    return hashlib.sha256(NETWORK_DOMAIN + authority_public_key).digest()


def open_network_seed(name: str) -> bytes:
    """The seed of an open network's authority. Anybody can derive it: it keeps nobody out.

    Raises `ConfigurationError` for a name that is no Unicode text.
    """
    try:
        normal = unicodedata.normalize("NFC", name).encode()
    except UnicodeEncodeError:
        raise ConfigurationError(f"network name {name!r} is no Unicode text") from None
    return hashlib.sha256(OPEN_NETWORK_DOMAIN + normal).digest()

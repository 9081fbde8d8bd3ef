"""The signed record of a peer: what it says of itself, and where it can be dialled.

It holds only what changes by a restart or by its operator. Load and free slots travel in answers,
never here. Records of one peer are ordered by (epoch, incarnation): the epoch is the process's
start in milliseconds since 1970, the incarnation grows with each signing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import msgspec

from p2pmoe.errors import ConfigurationError, MalformedMessage, printable
from p2pmoe.identity import KeyPair, PeerId
from p2pmoe.wire.address import Address
from p2pmoe.wire.envelope import Kind, Signed, VerifiedCache, open_envelope, seal
from p2pmoe.wire.schema import U16, U64, SignedPayload, Text24, Text64

MAX_RECORD_BYTES = 600  # a sealed record; fits beside a ping
MAX_ADDRESSES = 4

AddressText = Annotated[str, msgspec.Meta(max_length=128)]


class PeerRecord(SignedPayload, frozen=True, kw_only=True):
    """What a peer that can be dialled says of itself."""

    v: U16 = 1
    epoch: U64
    incarnation: U64
    addresses: Annotated[tuple[AddressText, ...], msgspec.Meta(max_length=MAX_ADDRESSES)] = ()
    version_min: U16 = 1
    version_max: U16 = 1
    capabilities: Annotated[tuple[Text24, ...], msgspec.Meta(max_length=8)] = ()
    grids: Annotated[tuple[Text64, ...], msgspec.Meta(max_length=8)] = ()
    meta: Annotated[bytes, msgspec.Meta(max_length=64)] = b""

    @property
    def order(self) -> tuple[int, int]:
        """(epoch, incarnation): the higher one of two records of one peer holds."""
        return self.epoch, self.incarnation


@dataclass(frozen=True, slots=True)
class Contact:
    """A peer and where it can be dialled."""

    peer: PeerId
    addresses: tuple[Address, ...]


def seal_record(keys: KeyPair, record: PeerRecord, network: bytes) -> Signed[PeerRecord]:
    """Sign one's own record; `ConfigurationError` when others would refuse it."""
    for text in record.addresses:
        _address(text, keys.peer_id)
    signed = seal(keys, record, kind=Kind.PEER, network=network)
    if len(signed.raw) > MAX_RECORD_BYTES:
        raise ConfigurationError(
            f"the peer record has {len(signed.raw)} bytes of at most {MAX_RECORD_BYTES}:"
            " announce fewer addresses or grids"
        )
    return signed


def open_record(
    raw: bytes, network: bytes, cache: VerifiedCache | None = None
) -> Signed[PeerRecord]:
    """Check a sealed record; `MalformedMessage` with why `record.*` or as `open_envelope`."""
    if len(raw) > MAX_RECORD_BYTES:
        raise MalformedMessage("record.too_long", f"{len(raw)} bytes")
    signed = open_envelope(raw, PeerRecord, kind=Kind.PEER, network=network, cache=cache)
    if signed.body.version_min > signed.body.version_max:
        raise MalformedMessage("record.versions")
    contact_of(signed)
    return signed


def contact_of(record: Signed[PeerRecord]) -> Contact:
    """The peer and its addresses; `MalformedMessage` with why `record.address`."""
    try:
        addresses = tuple(_address(text, record.signer) for text in record.body.addresses)
    except ConfigurationError as error:
        raise MalformedMessage("record.address", str(error)) from None
    return Contact(record.signer, addresses)


def _address(text: str, peer: PeerId) -> Address:
    """An address as a record may name it: in its one spelling, with a port, of this peer."""
    address = Address.parse(text)
    if str(address) != text or "%" in text or not (address.port and address.matches(peer)):
        raise ConfigurationError(f"address '{printable(text)}' cannot stand in a peer record")
    return address

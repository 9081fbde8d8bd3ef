"""What members say to one another, as bytes and as values whose signatures were checked.

A message has a body (probe, answer, digest...) and news: sealed peer records, accusations and
leaves that are passed on as they came. `GossipMessage` is the checked value that the core takes
and gives; `encode_message` and `Opening` are the border to bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec

from p2pmoe.wire import schema
from p2pmoe.wire.envelope import Kind, Signed, VerifiedCache, open_envelope
from p2pmoe.wire.peer_record import MAX_RECORD_BYTES, PeerRecord, open_record
from p2pmoe.wire.schema import U16, U32, U64, Bytes32, Message, SignedPayload

MAX_CLAIMS = 64  # of a kind in one message: 64 signatures take 15 ms to check
MAX_CLAIM_BYTES = 400  # a sealed accusation or leave; those of today have 270 and 150
BUCKETS = 32  # parts into which a view is cut by the first five bits of a peer's id
ROW_BYTES = 33  # of a digest: id prefix 8, epoch 8, incarnation 8, hash 8, standing 1
MAX_ROWS = 1024  # of one digest: 33 KiB
STEP = 16  # signatures between two checkpoints of an event loop: 4 ms

SealedRecord = Annotated[bytes, msgspec.Meta(max_length=MAX_RECORD_BYTES)]
SealedClaim = Annotated[bytes, msgspec.Meta(max_length=MAX_CLAIM_BYTES)]
Evidence = Literal["silent", "refused", "hearsay"]


# --------------------------------------------------------------------------------- what is signed
class Suspect(SignedPayload, frozen=True, kw_only=True):
    """The signer found `subject` not answering, under the version whose envelope has this hash.

    `silent`: no answer, nor by others; `refused`: its address refused a fresh connection;
    `hearsay`: the signer concluded long ago that this version is dead, and met a member that has
    not. Hearsay begins a suspicion but never confirms one.
    """

    v: U16 = 1
    subject: Bytes32
    epoch: U64
    incarnation: U64
    record: Bytes32
    evidence: Evidence = "silent"

    @property
    def order(self) -> tuple[int, int]:
        """(epoch, incarnation) of the accused version."""
        return self.epoch, self.incarnation


class Leave(SignedPayload, frozen=True, kw_only=True):
    """The signer leaves: its versions up to this one are gone."""

    v: U16 = 1
    epoch: U64
    incarnation: U64

    @property
    def order(self) -> tuple[int, int]:
        """(epoch, incarnation) of the last version."""
        return self.epoch, self.incarnation


Claim = Signed[PeerRecord] | Signed[Suspect] | Signed[Leave]


# ---------------------------------------------------------------------------------- what is asked
class Ping(Message, frozen=True, kw_only=True, tag_field="t", tag="ping"):
    """Are you there? The answer is an `Ack` with this number."""

    seq: U32


class Ack(Message, frozen=True, kw_only=True, tag_field="t", tag="ack"):
    """Yes; or of a relay: it is. `load` in thousandths, `free_slots` for further experts."""

    seq: U32
    load: U16 = 0
    free_slots: U16 = 0


class PingReq(Message, frozen=True, kw_only=True, tag_field="t", tag="ping-req"):
    """Ask `target` for me; answer within `left_ms`, with a nack if it does not."""

    seq: U32
    target: Bytes32
    left_ms: U16


class Nack(Message, frozen=True, kw_only=True, tag_field="t", tag="nack"):
    """The target did not answer me either; `refused`: its address refuses connections."""

    seq: U32
    refused: bool = False


class News(Message, frozen=True, kw_only=True, tag_field="t", tag="news"):
    """Nothing is asked: the message was sent for its news."""


class Summary(Message, frozen=True, kw_only=True, tag_field="t", tag="summary"):
    """One hash of 8 bytes a bucket, over the members that the sender holds for live."""

    buckets: Annotated[bytes, msgspec.Meta(min_length=8 * BUCKETS, max_length=8 * BUCKETS)]


class Digest(Message, frozen=True, kw_only=True, tag_field="t", tag="digest"):
    """Rows of `ROW_BYTES` about members. `covers`: bit i says that all of bucket i is here.

    `answer` asks for the receiver's rows of the same buckets. The receiver pushes what is newer.
    """

    covers: U32
    rows: Annotated[bytes, msgspec.Meta(max_length=ROW_BYTES * MAX_ROWS)] = b""
    answer: bool = False


Body = Ping | Ack | PingReq | Nack | News | Summary | Digest


class Tell(Message, frozen=True, kw_only=True):
    """A message as it is sent: a body, and sealed envelopes that need not belong to it."""

    body: Body
    records: Annotated[tuple[SealedRecord, ...], msgspec.Meta(max_length=MAX_CLAIMS)] = ()
    leaves: Annotated[tuple[SealedClaim, ...], msgspec.Meta(max_length=MAX_CLAIMS)] = ()
    suspects: Annotated[tuple[SealedClaim, ...], msgspec.Meta(max_length=MAX_CLAIMS)] = ()


# ------------------------------------------------------------------------------------- the border
@dataclass(frozen=True, slots=True)
class GossipMessage:
    """A message past the border: all claims in it are verified."""

    body: Body
    claims: tuple[Claim, ...] = ()


def encode_message(message: GossipMessage) -> bytes:
    """The bytes of a message."""
    sealed: dict[Kind, list[bytes]] = {Kind.PEER: [], Kind.LEAVE: [], Kind.SUSPECT: []}
    for claim in message.claims:
        sealed[claim.kind].append(claim.raw)
    records, leaves, suspects = (tuple(raws) for raws in sealed.values())
    return schema.encode(Tell(body=message.body, records=records, leaves=leaves, suspects=suspects))


class Opening:
    """Checks a message's signatures a few at a time, so that an event loop may breathe between.

    Reading the shape and every step raise `MalformedMessage`: the sender passes on what it should
    have refused. While `step()` is true there is more to check; then `message` is the value.
    """

    def __init__(self, data: bytes, network: bytes, cache: VerifiedCache | None) -> None:
        tell = schema.decode(data, Tell)
        self._body = tell.body
        self._claims: list[Claim] = []
        self._rest = self._verified(tell, network, cache)

    def step(self, limit: int = STEP) -> bool:
        """Check up to `limit` envelopes; whether there may be more."""
        for _ in range(limit):
            claim = next(self._rest, None)
            if claim is None:
                return False
            self._claims.append(claim)
        return True

    @property
    def message(self) -> GossipMessage:
        """The value, once `step()` was false. Records stand before what is said of them."""
        return GossipMessage(self._body, tuple(self._claims))

    @staticmethod
    def _verified(tell: Tell, network: bytes, cache: VerifiedCache | None) -> Iterator[Claim]:
        for raw in tell.records:
            yield open_record(raw, network, cache)
        for raw in tell.leaves:
            yield open_envelope(raw, Leave, kind=Kind.LEAVE, network=network, cache=cache)
        for raw in tell.suspects:
            yield open_envelope(raw, Suspect, kind=Kind.SUSPECT, network=network, cache=cache)


def open_message(data: bytes, network: bytes, cache: VerifiedCache | None) -> GossipMessage:
    """A message from its bytes, all signatures checked in one go; raises as `Opening`."""
    opening = Opening(data, network, cache)
    while opening.step():
        pass
    return opening.message

"""What peers store in the DHT, and how they ask each other for it.

Five signed payloads: a `Lease` says who serves an expert, a `Transfer` that its owner hands it
over, a `SnapshotRecord` what of it was saved and where; a `PrefixRecord` says which coordinates one
publisher serves below a prefix, a `Manifest` what a grid is. Four calls: `dht.find` asks for
contacts closer to a place, `dht.get` for the records under a key as well, `dht.put` hands records
over, `dht.mend` says that other holders have more. All are batched: one call carries the questions
for one peer that came up together.

Text of a uid is `ffn.3.7`, of a prefix `ffn` or `ffn.3`. A grid is named by the SHA-256 of its
manifest's envelope, and that is part of every key below it.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal

import msgspec

from p2pmoe.wire.envelope import Kind
from p2pmoe.wire.schema import (
    U16,
    U64,
    Bytes8,
    Bytes32,
    Envelope,
    Message,
    SignedPayload,
    Text24,
    Text64,
    Text256,
)
from p2pmoe.wire.tensor import MAX_DIMENSIONS, Dimension

FIND, GET, PUT, MEND = "dht.find", "dht.get", "dht.put", "dht.mend"  # method names

MAX_BATCH = 32  # questions one call carries; a guess: 32 leases are 10 kB
MAX_CLOSER = 16  # contacts one answer names for one place; twice k
MAX_CONTACTS = 128  # sealed peer records in one answer; at 600 B each they would not all fit
MAX_RECORDS = 256  # records under one key in one answer
MAX_COORDINATES = 1024  # of one publisher below one prefix; about 3 kB
MAX_TTL_MS = 600_000  # longest lifetime that a record may ask for; holders cap it further
MAX_LEFT_MS = 86_400_000  # longest that any record has left: a day, of a snapshot's
MAX_NAMED = 8  # holders that one put names; r is 5
MAX_KEEPERS = 4  # peers that one statement names for copies of a snapshot; a guess
GRID_DIMENSIONS = 4
GRID_SIZE = 65_536  # cells along one dimension
NO_GRID = bytes(32)  # where a grid's own name is looked up, before its manifest is known

_NAME = r"[a-z][a-z0-9_]{0,31}"
_COORDINATE = r"(0|[1-9][0-9]{0,4})"
GridName = Annotated[str, msgspec.Meta(pattern=rf"\A{_NAME}\Z")]
UidText = Annotated[
    str, msgspec.Meta(pattern=rf"\A{_NAME}(\.{_COORDINATE}){{1,{GRID_DIMENSIONS}}}\Z")
]
PrefixText = Annotated[
    str, msgspec.Meta(pattern=rf"\A{_NAME}(\.{_COORDINATE}){{0,{GRID_DIMENSIONS - 1}}}\Z")
]
TtlMs = Annotated[int, msgspec.Meta(ge=0, le=MAX_TTL_MS)]
LeftMs = Annotated[int, msgspec.Meta(ge=0, le=MAX_LEFT_MS)]
LeaseNumber = Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]
Coordinate = Annotated[int, msgspec.Meta(ge=0, lt=GRID_SIZE)]


# ------------------------------------------------------------------------------ what is signed
class Lease(SignedPayload, frozen=True, kw_only=True):
    """The signer serves the expert `uid`; calls name `number`. `ttl_ms` 0 withdraws it."""

    v: U16 = 1
    grid: Bytes32
    uid: UidText
    number: LeaseNumber
    epoch: U64
    incarnation: U64
    ttl_ms: TtlMs

    @property
    def key(self) -> bytes:
        """Where it is stored."""
        return key_of(Kind.LEASE, self.grid, self.uid)


class Transfer(SignedPayload, frozen=True, kw_only=True):
    """The signer, owner of the expert under `number` - 1, hands it to the peer `to` as `number`."""

    v: U16 = 1
    grid: Bytes32
    uid: UidText
    to: Bytes32
    number: LeaseNumber

    @property
    def key(self) -> bytes:
        """Where the lease is."""
        return key_of(Kind.LEASE, self.grid, self.uid)


class SnapshotRecord(SignedPayload, frozen=True, kw_only=True):
    """The signer saved the expert while it owned it under `lease`: `bytes` long, of SHA-256 `hash`.

    `step` counts the updates applied, `saved_ms` is since 1970. `keepers` are ids of other peers
    that have a copy; a later statement about the same file may name more of them.
    """

    v: U16 = 1
    grid: Bytes32
    uid: UidText
    lease: LeaseNumber
    step: U64
    saved_ms: U64
    hash: Bytes32
    bytes: U64
    keepers: Annotated[tuple[Bytes32, ...], msgspec.Meta(max_length=MAX_KEEPERS)] = ()

    @property
    def key(self) -> Bytes32:
        """Where it is stored: beside the lease, whose holders know who may say it."""
        return key_of(Kind.LEASE, self.grid, self.uid)


class PrefixRecord(SignedPayload, frozen=True, kw_only=True):
    """The coordinates that the signer serves next below `prefix`, ascending. 0 ms withdraws."""

    v: U16 = 1
    grid: Bytes32
    prefix: PrefixText
    coordinates: Annotated[tuple[Coordinate, ...], msgspec.Meta(max_length=MAX_COORDINATES)]
    epoch: U64
    incarnation: U64
    ttl_ms: TtlMs

    def __post_init__(self) -> None:
        """Refuse coordinates that do not ascend: equal sets have equal bytes."""
        pairs = zip(self.coordinates, self.coordinates[1:], strict=False)
        if any(after <= before for before, after in pairs):
            raise ValueError("coordinates ascend")

    @property
    def key(self) -> bytes:
        """Where it is stored."""
        return key_of(Kind.PREFIX, self.grid, self.prefix)


class TensorSchema(SignedPayload, frozen=True, kw_only=True):
    """One input or output of every expert of a grid: `shape` leaves the rows of the batch out."""

    dtype: Text24
    shape: Annotated[tuple[Dimension, ...], msgspec.Meta(max_length=MAX_DIMENSIONS - 1)]


class Manifest(SignedPayload, frozen=True, kw_only=True):
    """What a grid is: its cells, and what every expert in it takes and gives."""

    v: U16 = 1
    name: GridName
    cells: Annotated[
        tuple[Annotated[int, msgspec.Meta(ge=1, le=GRID_SIZE)], ...],
        msgspec.Meta(min_length=1, max_length=GRID_DIMENSIONS),
    ]
    expert_class: Text64
    dtype: Text24
    hidden_dim: Annotated[int, msgspec.Meta(ge=1, le=2**24)]
    inputs: Annotated[tuple[TensorSchema, ...], msgspec.Meta(min_length=1, max_length=8)]
    outputs: Annotated[tuple[TensorSchema, ...], msgspec.Meta(min_length=1, max_length=8)]
    options: Annotated[dict[Text64, Text256], msgspec.Meta(max_length=32)] = {}  # noqa: RUF012  msgspec copies it
    created_ms: U64

    @property
    def key(self) -> bytes:
        """Where it is stored: the name alone, because readers do not know more."""
        return key_of(Kind.MANIFEST, NO_GRID, self.name)


Record = Lease | SnapshotRecord | PrefixRecord | Manifest
BODY_TYPES: dict[Kind, type[Record | Transfer]] = {
    Kind.LEASE: Lease,
    Kind.TRANSFER: Transfer,
    Kind.SNAPSHOT: SnapshotRecord,
    Kind.PREFIX: PrefixRecord,
    Kind.MANIFEST: Manifest,
}
StoredKind = Literal["lease", "snapshot", "prefix", "manifest"]
HandedKind = Literal["lease", "transfer", "snapshot", "prefix", "manifest"]


def key_of(kind: Kind, grid: bytes, name: str) -> bytes:
    """The 256-bit place of a record: SHA-256(domain, kind, 0, grid, name)."""
    domain = b"p2pmoe/v1/dht/" + kind.value.encode() + b"\0"
    return hashlib.sha256(domain + grid + name.encode()).digest()


# --------------------------------------------------------------------------------- what is asked
class FindRequest(Message, frozen=True, kw_only=True):
    """Which peers that you know are closest to these places."""

    targets: Annotated[tuple[Bytes32, ...], msgspec.Meta(min_length=1, max_length=MAX_BATCH)]


class KeyQuery(Message, frozen=True, kw_only=True):
    """One key, and which kind of record is wanted; none for whatever is there.

    `after` goes on behind that publisher when an answer had `more`. Peers whose ids begin as those
    `known` are not named in the answer.
    """

    key: Bytes32
    kind: StoredKind | None = None
    after: Annotated[bytes, msgspec.Meta(max_length=32)] = b""
    known: Annotated[tuple[Bytes8, ...], msgspec.Meta(max_length=MAX_NAMED)] = ()


class GetRequest(Message, frozen=True, kw_only=True):
    """Which records you hold under these keys, and who is closer to them."""

    keys: Annotated[tuple[KeyQuery, ...], msgspec.Meta(min_length=1, max_length=MAX_BATCH)]


class RecordPut(Message, frozen=True, kw_only=True):
    """A record to hold. Only a manifest may come from another peer than its signer.

    With a lease comes, where it was handed over, the sealed `transfer` of the owner before. A
    transfer by itself is for the peer that it names, and an offer. Who names the `holders` that a
    record goes to, by the first bytes of their ids, wants to hear of closer ones.
    """

    kind: HandedKind
    record: Envelope
    transfer: Envelope = b""
    holders: Annotated[tuple[Bytes8, ...], msgspec.Meta(max_length=MAX_NAMED)] = ()


class PutRequest(Message, frozen=True, kw_only=True):
    """Hold these records."""

    records: Annotated[tuple[RecordPut, ...], msgspec.Meta(min_length=1, max_length=MAX_BATCH)]


class MendKey(Message, frozen=True, kw_only=True):
    """Records of this kind lie under this key at other holders."""

    kind: StoredKind
    key: Bytes32


class MendRequest(Message, frozen=True, kw_only=True):
    """Others hold more under these keys than you do: ask them, if you like."""

    keys: Annotated[tuple[MendKey, ...], msgspec.Meta(min_length=1, max_length=MAX_BATCH)]


# ------------------------------------------------------------------------------ what is answered
class Copy(Message, frozen=True, kw_only=True):
    """A record as its holder has it: `left_ms` of its lifetime are left."""

    record: Envelope
    left_ms: LeftMs


class Found(Message, frozen=True, kw_only=True):
    """The answer to one question. `closer` are places in the reply's `contacts`, closest first.

    `number` is the highest lease number that the holder remembers for the key, 0 for none. `more`
    says that records behind the last one were left out.
    """

    closer: Annotated[tuple[U16, ...], msgspec.Meta(max_length=MAX_CLOSER)] = ()
    records: Annotated[tuple[Copy, ...], msgspec.Meta(max_length=MAX_RECORDS)] = ()
    number: U64 = 0
    more: bool = False


class FoundReply(Message, frozen=True, kw_only=True):
    """Answers to a find or a get in the order of the questions; those that did not fit are cut.

    `contacts` are sealed peer records: of closer peers, and of the publishers of the records.
    """

    answers: Annotated[tuple[Found, ...], msgspec.Meta(min_length=1, max_length=MAX_BATCH)]
    contacts: Annotated[tuple[Envelope, ...], msgspec.Meta(max_length=MAX_CONTACTS)] = ()


class Verdict(Message, frozen=True, kw_only=True):
    """What became of one record.

    `stored`; `stale`: a newer one of the same publisher is held; `refused`: `why` says the rule;
    `full`: no room, which is no error; `abstained`: this holder may not grant yet. A refusal
    because of another owner carries the `owner`'s lease; `number` is the highest one remembered.
    A manifest that is `stored` behind another of its name says why: `later`. `closer` are places in
    the reply's `contacts` of peers that should hold the record and were not named.
    """

    outcome: Literal["stored", "stale", "refused", "full", "abstained"]
    why: Text24 = ""
    number: U64 = 0
    owner: Copy | None = None
    closer: Annotated[tuple[U16, ...], msgspec.Meta(max_length=MAX_NAMED)] = ()


class PutReply(Message, frozen=True, kw_only=True):
    """Verdicts in the order of the records, and sealed peer records of closer peers."""

    verdicts: Annotated[tuple[Verdict, ...], msgspec.Meta(min_length=1, max_length=MAX_BATCH)]
    contacts: Annotated[tuple[Envelope, ...], msgspec.Meta(max_length=MAX_CONTACTS)] = ()


class MendReply(Message, frozen=True, kw_only=True):
    """Heard."""

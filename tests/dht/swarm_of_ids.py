"""What the tests of the DHT share: ids anywhere in the key space, sealed records, short names."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import strategies as st

from p2pmoe.dht.messages import (
    Lease,
    Manifest,
    PrefixRecord,
    SnapshotRecord,
    TensorSchema,
    Transfer,
)
from p2pmoe.identity import KeyPair, PeerId
from p2pmoe.wire.envelope import Kind, Signed, seal
from p2pmoe.wire.peer_record import PeerRecord, seal_record

NETWORK = bytes(range(32))
GRID = bytes(reversed(range(32)))
PEOPLE = [KeyPair.from_seed(bytes([number]) * 32) for number in range(1, 9)]

ids = st.integers(0, 2**256 - 1).map(lambda number: peer(number))
# Few different bits, at both ends: ids that fall on the borders of buckets.
edge_ids = st.tuples(st.integers(0, 255), st.integers(0, 7)).map(
    lambda pair: peer(((1 << pair[0]) - 1) ^ pair[1])
)


def dice(seed: int) -> random.Random:
    return random.Random(seed)


def peer(number: int) -> PeerId:
    return PeerId(number.to_bytes(32, "big"))


def place(number: int) -> bytes:
    return number.to_bytes(32, "big")


def nearest(peers: list[PeerId], target: bytes, count: int) -> list[PeerId]:
    """By brute force."""
    return sorted(peers, key=lambda each: each.number ^ int.from_bytes(target, "big"))[:count]


def lease(
    keys: KeyPair, uid: str = "ffn.1.2", *, number: int = 1, version: int = 1, ttl_ms: int = 30_000,
    grid: bytes = GRID,
) -> Signed[Lease]:  # fmt: skip
    body = Lease(
        grid=grid, uid=uid, number=number, epoch=1, incarnation=version, ttl_ms=ttl_ms
    )  # fmt: skip
    return seal(keys, body, kind=Kind.LEASE, network=NETWORK)


def transfer(
    keys: KeyPair, to: KeyPair, uid: str = "ffn.1.2", *, number: int = 2, grid: bytes = GRID
) -> Signed[Transfer]:
    body = Transfer(grid=grid, uid=uid, to=to.peer_id.raw, number=number)
    return seal(keys, body, kind=Kind.TRANSFER, network=NETWORK)


def snapshot(
    keys: KeyPair, uid: str = "ffn.1.2", *, number: int = 1, step: int = 1, saved_ms: int = 1,
    keepers: int = 0,
) -> Signed[SnapshotRecord]:  # fmt: skip
    body = SnapshotRecord(
        grid=GRID, uid=uid, lease=number, step=step, saved_ms=saved_ms, hash=place(step), bytes=9,
        keepers=tuple(place(at) for at in range(keepers)),
    )  # fmt: skip
    return seal(keys, body, kind=Kind.SNAPSHOT, network=NETWORK)


def dictionary(
    keys: KeyPair, *coordinates: int, prefix: str = "ffn", version: int = 1, ttl_ms: int = 60_000
) -> Signed[PrefixRecord]:
    body = PrefixRecord(
        grid=GRID,
        prefix=prefix,
        coordinates=coordinates,
        epoch=1,
        incarnation=version,
        ttl_ms=ttl_ms,
    )
    return seal(keys, body, kind=Kind.PREFIX, network=NETWORK)


def manifest(keys: KeyPair, name: str = "ffn", **changes: Any) -> Signed[Manifest]:
    tensor = TensorSchema(dtype="float32", shape=(8,))
    fields: dict[str, Any] = {
        "name": name,
        "cells": (4, 4),
        "expert_class": "ffn",
        "dtype": "float32",
        "hidden_dim": 8,
        "inputs": (tensor,),
        "outputs": (tensor,),
        "created_ms": 1,
    }
    return seal(keys, Manifest(**fields | changes), kind=Kind.MANIFEST, network=NETWORK)


def card(keys: KeyPair, *addresses: str, incarnation: int = 1) -> Signed[PeerRecord]:
    record = PeerRecord(epoch=1, incarnation=incarnation, addresses=addresses)
    return seal_record(keys, record, NETWORK)

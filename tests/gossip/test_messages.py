"""The border: what goes out comes in again, and nothing else does."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pmoe.errors import MalformedMessage
from p2pmoe.gossip.messages import (
    BUCKETS,
    MAX_CLAIMS,
    MAX_ROWS,
    ROW_BYTES,
    STEP,
    Ack,
    Digest,
    GossipMessage,
    Nack,
    News,
    Opening,
    Ping,
    PingReq,
    Summary,
    Tell,
    encode_message,
    open_message,
)
from p2pmoe.wire import schema
from p2pmoe.wire.cbor import MAX_BYTES
from p2pmoe.wire.envelope import VerifiedCache
from p2pmoe.wire.peer_record import MAX_RECORD_BYTES
from tests.gossip.people import NETWORK, RealPerson

A, B = RealPerson(1), RealPerson(2)
BODIES = [
    Ping(seq=7),
    Ack(seq=7, load=950, free_slots=3),
    PingReq(seq=8, target=bytes(32), left_ms=750),
    Nack(seq=8, refused=True),
    News(),
    Summary(buckets=bytes(8 * BUCKETS)),
    Digest(covers=2**32 - 1, rows=bytes(ROW_BYTES), answer=True),
]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: type(body).__name__)
def test_a_message_comes_in_as_it_went_out(body: object) -> None:
    claims = (A.record(), B.record(), A.leave(), B.accuse(A.record(), "refused"))
    message = GossipMessage(body, claims)
    assert open_message(encode_message(message), NETWORK, None) == message


def test_records_stand_before_what_is_said_of_them() -> None:
    message = GossipMessage(News(), (B.accuse(A.record()), A.leave(), A.record()))
    kinds = [
        claim.kind.value for claim in open_message(encode_message(message), NETWORK, None).claims
    ]
    assert kinds == ["peer", "leave", "suspect"]


def test_signatures_are_checked_a_few_at_a_time() -> None:
    records = tuple(RealPerson(number).record() for number in range(STEP + 3))
    opening = Opening(encode_message(GossipMessage(News(), records)), NETWORK, None)
    assert opening.step()
    assert len(opening.message.claims) == STEP
    assert not opening.step()
    assert opening.message.claims == records


def test_what_was_verified_before_is_not_verified_again() -> None:
    cache = VerifiedCache(8)
    data = encode_message(GossipMessage(News(), (A.record(), A.leave())))
    open_message(data, NETWORK, cache)
    assert len(cache) == 2
    assert open_message(data, NETWORK, cache).claims == (A.record(), A.leave())
    assert len(cache) == 2


@pytest.mark.parametrize(
    "claim", [A.record(), A.leave(), B.accuse(A.record())], ids=lambda c: c.kind
)
def test_every_single_bit_flip_of_a_valid_claim_is_refused(claim) -> None:
    raw, field = bytearray(claim.raw), {"peer": "records", "leave": "leaves", "suspect": "suspects"}
    for bit in range(8 * len(raw)):
        raw[bit // 8] ^= 1 << bit % 8
        tell = Tell(body=News(), **{field[claim.kind]: (bytes(raw),)})
        with pytest.raises(MalformedMessage):
            open_message(schema.encode(tell), NETWORK, None)
        raw[bit // 8] ^= 1 << bit % 8


def test_a_claim_of_another_kind_or_network_is_refused() -> None:
    for tell in (
        Tell(body=News(), records=(A.leave().raw,)),
        Tell(body=News(), leaves=(A.record().raw,)),
        Tell(body=News(), suspects=(A.leave().raw,)),
    ):
        with pytest.raises(MalformedMessage):
            open_message(schema.encode(tell), NETWORK, None)
    data = encode_message(GossipMessage(News(), (A.record(),)))
    with pytest.raises(MalformedMessage):
        open_message(data, hashlib.sha256(NETWORK).digest(), None)


def test_the_largest_messages_fit_a_control_frame() -> None:
    """63 KiB is what a call may carry: 64 of the largest records, or 1,024 rows."""
    full = Tell(
        body=PingReq(seq=2**32 - 1, target=bytes(32), left_ms=2**16 - 1),
        records=(bytes(MAX_RECORD_BYTES),) * MAX_CLAIMS,
    )
    assert len(schema.encode(full)) < MAX_BYTES - 1024
    rows = Tell(body=Digest(covers=2**32 - 1, rows=bytes(ROW_BYTES * MAX_ROWS)))
    assert len(schema.encode(rows)) < MAX_BYTES - 1024


@given(st.binary(max_size=200))
@settings(max_examples=100)
def test_any_bytes_are_a_message_or_a_typed_error(data: bytes) -> None:
    try:
        message = open_message(data, NETWORK, None)
    except MalformedMessage:
        return
    assert encode_message(message) == data

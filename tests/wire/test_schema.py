"""Typed messages: strict in what they are, and in what they may say."""

from typing import Annotated

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmoe.errors import MalformedMessage
from p2pmoe.net.messages import Reply
from p2pmoe.wire import cbor, schema
from p2pmoe.wire.peer_record import PeerRecord
from p2pmoe.wire.schema import U16, U32, U64, Bytes16, Bytes32, Message, SignedPayload, Text24
from p2pmoe.wire.tensor import TensorDescriptor
from tests.strategies import descriptors, records


class Point(Message, frozen=True, kw_only=True):
    x: U16
    label: Text24 = ""


class Line(Message, frozen=True, kw_only=True):
    points: Annotated[tuple[Point, ...], msgspec.Meta(max_length=2)]
    closed: bool = False
    note: bytes | None = None


class Claim(SignedPayload, frozen=True, kw_only=True):
    epoch: U64
    grid: Bytes32


class Ask(Message, frozen=True, kw_only=True, tag_field="t", tag="ask"):
    n: U32


class Tell(Message, frozen=True, kw_only=True, tag_field="t", tag="tell"):
    token: Bytes16


def refusal(data, message):
    with pytest.raises(MalformedMessage) as caught:
        schema.decode(data, message)
    return caught.value


@given(records | descriptors)
def test_a_message_comes_back_as_it_was(message):
    data = schema.encode(message)
    assert schema.decode(data, type(message)) == message
    assert schema.encode(schema.decode(data, type(message))) == data


def test_a_message_is_a_map_with_all_its_fields():
    assert cbor.loads(schema.encode(Line(points=(Point(x=1),)))) == {
        "points": [{"x": 1, "label": ""}],
        "closed": False,
        "note": None,
    }


def test_a_field_with_a_default_may_be_absent_and_no_other():
    assert schema.decode(cbor.dumps({"x": 1}), Point) == Point(x=1)
    error = refusal(cbor.dumps({"label": "a"}), Point)
    assert error.why == "schema.mismatch"
    assert "`x`" in error.detail


def test_an_unknown_key_is_refused_in_a_message_and_ignored_in_a_signed_payload():
    assert "`y`" in refusal(cbor.dumps({"x": 1, "y": 2}), Point).detail
    assert "$.points[0]" in refusal(cbor.dumps({"points": [{"x": 1, "y": 2}]}), Line).detail
    claim = {"epoch": 1, "grid": bytes(32)}
    newer = schema.decode(cbor.dumps(claim | {"colour": ["red"]}), Claim)
    assert newer == schema.decode(cbor.dumps(claim), Claim)


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, 1, "x", b"x", [], [{"x": 1}]),
        *({"x": value} for value in (None, True, "1", b"1", [], {}, -1, 2**16, 2**64 - 1)),
        *({"x": 1, "label": value} for value in (None, 1, b"label", "a" * 25)),
    ],
    ids=repr,
)
def test_a_value_of_another_type_or_size_is_refused(value):
    assert refusal(cbor.dumps(value), Point).why == "schema.mismatch"


@pytest.mark.parametrize(
    "value",
    [
        {"points": {}},
        {"points": [{"x": 1}] * 3},
        {"points": [1]},
        {"points": [], "closed": 0},
        {"points": [], "note": "aGk="},
        {"points": [], "note": [104]},
    ],
    ids=repr,
)
def test_nothing_is_converted_on_the_way(value):
    assert refusal(cbor.dumps(value), Line).why == "schema.mismatch"


@pytest.mark.parametrize("epoch", [-1, -(2**63) - 1, -(2**64), 2**63, 2**64 - 1])
def test_a_number_beyond_its_bounds_is_refused_at_64_bits_too(epoch):
    assert refusal(cbor.dumps({"epoch": epoch, "grid": bytes(32)}), Claim).why == "schema.mismatch"


@pytest.mark.parametrize("grid", [b"", bytes(31), bytes(33), "a" * 32, [0] * 32])
def test_an_id_is_32_bytes(grid):
    assert refusal(cbor.dumps({"epoch": 2**63 - 1, "grid": grid}), Claim).why == "schema.mismatch"


def test_a_tag_chooses_among_messages():
    for message in (Ask(n=2**32 - 1), Tell(token=bytes(16))):
        assert schema.decode(schema.encode(message), Ask | Tell) == message
    assert "'shout'" in refusal(cbor.dumps({"t": "shout", "n": 1}), Ask | Tell).detail
    assert refusal(cbor.dumps({"n": 1}), Ask | Tell).why == "schema.mismatch"
    assert refusal(cbor.dumps({"t": "ask", "token": bytes(16)}), Ask | Tell).why == (
        "schema.mismatch"
    )


def test_what_a_peer_wrote_is_printable_in_the_error():
    error = refusal(cbor.dumps({"x": 1, "\n\x1b[2J" + "a" * 500: 1}), Point)
    assert str(error).isprintable()
    assert len(str(error)) < 300


def test_bytes_that_are_no_cbor_are_refused_as_such():
    assert refusal(b"\xff", Point).why == "cbor.simple"


@given(st.binary(max_size=80))
def test_any_bytes_are_a_message_or_a_typed_error(data):
    for message in (TensorDescriptor, PeerRecord, Ask | Tell):
        try:
            schema.decode(data, message)
        except MalformedMessage as error:
            assert error.why.startswith(("cbor.", "schema."))


def test_what_is_said_again_is_written_and_read_as_the_first_time():
    short = Reply(id=1, body=b"x")
    long = Reply(id=1, body=bytes(2 * schema.REMEMBERED_BYTES))
    for message in (short, short, long):
        data = schema.encode_again(message)
        assert data == schema.encode(message)
        assert schema.decode_again(data, Reply) == message
    for _ in range(2):
        with pytest.raises(MalformedMessage, match=r"cbor\.truncated"):
            schema.decode_again(data[:5], Reply)

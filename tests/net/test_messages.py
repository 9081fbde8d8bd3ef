"""Frame headers: what each carries, and what is refused."""

from __future__ import annotations

import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmoe.errors import MalformedMessage
from p2pmoe.net.messages import (
    MAX_BODY_BYTES,
    MAX_PAYLOAD_BYTES,
    MAX_WINDOW_BYTES,
    Cancel,
    Chunk,
    Credit,
    End,
    Goodbye,
    Hello,
    Ping,
    Pong,
    Refuse,
    Reply,
    Request,
    decode_header,
    encode_header,
)
from p2pmoe.wire import cbor, schema
from p2pmoe.wire.framing import MAX_HEADER_BYTES

u16, u32, u63 = st.integers(0, 2**16 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**63 - 1)
ids = st.integers(1, 2**63 - 1)
sizes = st.integers(0, MAX_PAYLOAD_BYTES)
bodies = st.binary(max_size=60)

headers = st.one_of(
    st.builds(
        Hello,
        version_min=u16,
        version_max=u16,
        network=st.binary(min_size=32, max_size=32),
        channel=st.sampled_from(["control", "bulk"]),
        record=st.binary(max_size=600),
        features=u63,
        agent=st.text(max_size=64),
    ),
    st.builds(Refuse, code=st.text(max_size=24), detail=st.text(max_size=256)),
    st.builds(Request, id=ids, method=st.text(max_size=64), budget_ms=u32, body=bodies, size=sizes),
    st.builds(Reply, id=ids, body=bodies, size=sizes, last=st.booleans()),
    st.builds(Chunk, id=ids),
    st.builds(Credit, id=u63, size=st.integers(1, MAX_WINDOW_BYTES)),
    st.builds(Cancel, id=ids),
    st.builds(
        End, id=ids, code=st.text(max_size=24), detail=st.text(max_size=256), retry_after_ms=u32
    ),
    st.builds(Goodbye, last_id=u63),
    st.builds(Ping, n=u63),
    st.builds(Pong, n=u63),
)


@given(headers)
def test_a_header_is_the_same_after_the_wire(header):
    assert encode_header(header) == schema.encode(header)
    assert decode_header(schema.encode(header)) == header


@given(st.dictionaries(st.text(max_size=8), st.integers(0, 9) | st.binary(max_size=8), max_size=6))
def test_a_map_that_is_no_header_is_refused_by_its_shape(value):
    with pytest.raises(MalformedMessage, match=r"schema\.mismatch"):
        decode_header(cbor.dumps(value))


def test_the_largest_request_and_reply_fit_one_control_frame():
    body, text = bytes(MAX_BODY_BYTES), "\U0010ffff"
    request = Request(
        id=2**63 - 1,
        method=text * 64,
        budget_ms=2**32 - 1,
        body=body,
        size=MAX_PAYLOAD_BYTES,
    )
    reply = Reply(id=2**63 - 1, body=body, size=MAX_PAYLOAD_BYTES)
    assert len(schema.encode(request)) <= MAX_HEADER_BYTES
    assert len(schema.encode(reply)) <= MAX_HEADER_BYTES


def test_a_call_has_an_id_above_zero_because_zero_is_the_connection():
    assert decode_header(schema.encode(Credit(id=0, size=1))) == Credit(id=0, size=1)
    with pytest.raises(MalformedMessage, match=r"schema\.mismatch"):
        decode_header(cbor.dumps({"t": "chunk", "id": 0}))


IDS = [1, 2, 23, 24, 255, 256, 65_535, 65_536, 2**32 - 1, 2**32, 2**63 - 1]


EACH = [
    Chunk(id=1),
    End(id=1),
    Reply(id=1, body=bytes(300), size=70_000, last=True),
    Request(id=1, method="expert.forward", budget_ms=2**32 - 1, body=b"x", size=9),
]


@pytest.mark.parametrize("call", IDS)
@pytest.mark.parametrize("message", EACH)
def test_a_header_put_together_from_parts_is_the_one_of_the_schema(call, message):
    message = msgspec.structs.replace(message, id=call)
    data = encode_header(message)
    assert data == schema.encode(message)
    assert decode_header(data) == message


@given(st.sampled_from(EACH), st.integers(0, 400), st.binary(max_size=3), st.integers(0, 3))
def test_a_header_that_differs_in_a_few_bytes_means_what_its_map_means(message, at, put, taken):
    """Whether it is read by its usual form or as any message."""
    data = bytearray(encode_header(message))
    data[at % len(data) : at % len(data) + taken] = put
    try:
        wanted = schema.convert(cbor.loads(data), type(message))
    except MalformedMessage:
        with contextlib.suppress(MalformedMessage):
            assert type(decode_header(bytes(data))) is not type(message)
    else:
        assert decode_header(bytes(data)) == wanted


MOST = [
    ({"id": 0}, "id"),
    ({"body": bytes(MAX_BODY_BYTES + 1)}, "body"),
    ({"size": MAX_PAYLOAD_BYTES + 1}, "size"),
]


@pytest.mark.parametrize(("field", "name"), MOST)
@pytest.mark.parametrize("message", EACH[2:])
def test_a_header_beyond_its_bounds_is_refused_in_its_usual_form_too(message, field, name):
    with pytest.raises(MalformedMessage, match=rf"schema\.mismatch.*{name}"):
        decode_header(encode_header(msgspec.structs.replace(message, **field)))


def test_a_method_of_any_length_and_letters_comes_as_it_was_said():
    for method in ("", "x" * 23, "x" * 24, "x" * 64, "gr\u00fc\u00dfe", "ibudget_ms", "a\nb"):
        asked = Request(id=5, method=method, budget_ms=7)
        assert decode_header(encode_header(asked)) == asked


def test_a_method_that_is_shorter_than_it_says_is_refused():
    data = encode_header(Request(id=5, method="echo", budget_ms=7))
    with pytest.raises(MalformedMessage):
        decode_header(data.replace(b"\x64echo", b"\x65echo"))


def test_an_end_that_says_more_is_encoded_as_any_message():
    for end in (End(id=3, code="busy"), End(id=3, detail="x"), End(id=3, retry_after_ms=5)):
        assert encode_header(end) == schema.encode(end)
        assert decode_header(encode_header(end)) == end


@pytest.mark.parametrize("message", EACH)
@pytest.mark.parametrize(
    "written",
    [
        *(b"\x00", b"\x18\x17", b"\x19\x00\xff", b"\x1a\x00\x00\xff\xff", b"\x20", b"\x41\x05"),
        *(b"\x1b\x00\x00\x00\x00\xff\xff\xff\xff", b"\x1b\x80" + bytes(7), b"", b"\x01\x01"),
        b"\x1b" + bytes(8) + b"\x01",
    ],
)
def test_an_id_that_is_none_is_refused_however_it_is_written(message, written):
    data = encode_header(message).replace(b"bid\x01", b"bid" + written)
    with pytest.raises(MalformedMessage):
        decode_header(data)

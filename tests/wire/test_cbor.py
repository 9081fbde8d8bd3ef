"""The CBOR profile: one spelling for every value, and no input that costs more than its length."""

import enum
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmoe.errors import LocalProtocolError, MalformedMessage
from p2pmoe.wire import cbor
from tests.strategies import values


def refusal(data):
    with pytest.raises(MalformedMessage) as caught:
        cbor.loads(data)
    return caught.value.why


def head(major, argument):
    """The shortest head, written from RFC 8949, section 3, without the library."""
    if argument < 24:
        return bytes([major << 5 | argument])
    info = next(i for i in range(4) if argument < 1 << (8 << i))
    return bytes([major << 5 | 24 + info]) + argument.to_bytes(1 << info, "big")


def reference(value):
    """RFC 8949, section 4.2.1, as plainly as it can be written."""
    match value:
        case None | bool():
            return bytes([{False: 0xF4, True: 0xF5, None: 0xF6}[value]])
        case int():
            return head(0, value) if value >= 0 else head(1, -1 - value)
        case bytes():
            return head(2, len(value)) + value
        case str():
            return head(3, len(value.encode())) + value.encode()
        case list():
            return head(4, len(value)) + b"".join(map(reference, value))
        case dict():
            entries = sorted((reference(key), reference(item)) for key, item in value.items())
            return head(5, len(value)) + b"".join(key + item for key, item in entries)


@given(values)
def test_a_value_has_the_bytes_of_the_rfc_and_comes_back(value):
    data = cbor.dumps(value)
    assert data == reference(value)
    for form in (data, bytearray(data), memoryview(data)):
        assert cbor.loads(form) == value


@given(values, st.binary(min_size=1, max_size=3))
def test_exactly_one_item_is_taken(value, more):
    data = cbor.dumps(value)
    assert refusal(data + more) == "cbor.trailing"
    for cut in range(len(data)):
        assert refusal(data[:cut]) == "cbor.truncated"


def check_spelling(data):
    """A value whose only spelling this is, or a typed error."""
    try:
        value = cbor.loads(data)
    except MalformedMessage as error:
        assert error.why.startswith("cbor.")
    else:
        assert cbor.dumps(value) == data


@given(st.binary(max_size=60))
def test_any_bytes_are_a_value_with_this_one_spelling_or_a_typed_error(data):
    check_spelling(data)


@given(values, st.data())
def test_a_changed_byte_never_makes_a_second_spelling(value, data):
    raw = bytearray(cbor.dumps(value))
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    check_spelling(bytes(raw))


# ------------------------------------------------------------------ what may not be received
def test_every_tag_is_refused_in_every_place():
    for tag in range(2**16 + 1):
        tagged = head(6, tag) + b"\x00"
        assert refusal(tagged) == "cbor.tag"
    for tag in (0, 2, 4, 28, 29, 35, 36, 256, 258, 2**32, 2**64 - 1):
        tagged = head(6, tag) + b"\x00"
        for around in (b"\x81", b"\xa1\x61a", b"\x82\xa1\x61a\x80"):
            assert refusal(around + tagged) == "cbor.tag"
        assert refusal(b"\xa1" + tagged + b"\x00") == "cbor.tag"


def test_a_big_number_is_refused_whatever_its_length():
    assert refusal(head(6, 2) + head(2, 60_000) + b"\xff" * 60_000) == "cbor.tag"
    assert refusal(head(6, 2) + head(2, 10**6) + b"\xff" * 10**6) == "cbor.too_long"


@pytest.mark.parametrize("data", ["5f40ff", "7f60ff", "9fff", "bfff", "1f", "3f", "df00"])
def test_indefinite_lengths_are_refused(data):
    why = refusal(bytes.fromhex(data))
    assert why == ("cbor.tag" if data == "df00" else "cbor.indefinite")


@pytest.mark.parametrize("major", range(6))
def test_a_length_or_number_has_its_shortest_form(major):
    content = {2: b"\x00" * 23, 3: b"a" * 23, 4: b"\x00" * 23, 5: b""}.get(major, b"")
    argument = 0 if major == 5 else 23
    for size in (1, 2, 4, 8):
        long = bytes([major << 5 | 23 + size.bit_length()]) + argument.to_bytes(size, "big")
        assert refusal(long + content) == "cbor.not_shortest"
    for info, argument in ((25, 0xFF), (26, 0xFFFF), (27, 0xFFFFFFFF)):
        long = bytes([major << 5 | info]) + argument.to_bytes(1 << info - 24, "big")
        assert refusal(long) == "cbor.not_shortest"
    for info in (28, 29, 30):
        assert refusal(bytes([major << 5 | info])) == "cbor.reserved"


def test_of_the_simple_values_only_three_are_allowed():
    for info in range(32):
        data = bytes([7 << 5 | info]) + bytes(8)
        if info in (20, 21, 22):
            assert cbor.loads(data[:1]) is {20: False, 21: True, 22: None}[info]
        else:
            assert refusal(data) == ("cbor.float" if info in (25, 26, 27) else "cbor.simple")


@pytest.mark.parametrize("key", ["00", "20", "40", "80", "a0", "f4", "f6"])
def test_a_key_is_text(key):
    assert refusal(bytes.fromhex("a1" + key + "00")) == "cbor.key"
    assert refusal(bytes.fromhex("a2616100" + key + "00")) == "cbor.key"
    assert cbor.loads(bytes.fromhex("a16161" + key)) is not None


def test_keys_are_in_order_and_come_once():
    assert cbor.loads(bytes.fromhex("a3616100616200626161 00".replace(" ", ""))) == {
        "a": 0,
        "b": 0,
        "aa": 0,
    }
    assert refusal(bytes.fromhex("a2616200616100")) == "cbor.not_deterministic"
    assert refusal(bytes.fromhex("a262616100616200")) == "cbor.not_deterministic"
    assert refusal(bytes.fromhex("a2616100616100")) == "cbor.invalid"


@pytest.mark.parametrize("text", ["ff", "c080", "eda080", "f4908080", "e282"])
def test_text_is_utf_8(text):
    assert refusal(head(3, len(text) // 2) + bytes.fromhex(text)) == "cbor.invalid"


# ------------------------------------------------------------------ input that would cost
def nested(depth):
    value = []
    for _ in range(depth - 1):
        value = [value]
    return value


def colliding_keys(count):
    """A map whose keys are big numbers with one hash value: multiples of 2**61 - 1."""
    keys = ((2**64 + i * (2**61 - 1)).to_bytes(10, "big") for i in range(count))
    return head(5, count) + b"".join(head(6, 2) + head(2, 10) + key + b"\x00" for key in keys)


ATTACKS = {
    "nested arrays": (b"\x81" * 65_000 + b"\x80", "cbor.too_deep"),
    "100,000 nested arrays": (b"\x81" * 100_000, "cbor.too_long"),
    "nested maps": (b"\xa1\x60" * 30_000, "cbor.too_deep"),
    "64 KiB of empty arrays": (head(4, 65_533) + b"\x80" * 65_533, "cbor.too_many_items"),
    "empty arrays in arrays": (
        head(4, 16) + 16 * (head(4, 256) + b"\x80" * 256),
        "cbor.too_many_items",
    ),
    "4,000 colliding keys": (colliding_keys(4_000), "cbor.too_many_entries"),
    "16,000 colliding keys": (colliding_keys(16_000), "cbor.too_long"),
    "a few colliding keys": (colliding_keys(200), "cbor.tag"),
    "257 keys": (
        head(5, 257) + b"".join(head(3, 3) + b"%03d" % i + b"\x00" for i in range(257)),
        "cbor.too_many_entries",
    ),
    "an array of 2**64 - 1": (head(4, 2**64 - 1), "cbor.too_many_items"),
    "a map of 2**64 - 1": (head(5, 2**64 - 1), "cbor.too_many_entries"),
    "a map of 2**63": (head(5, 2**63), "cbor.too_many_entries"),
    "bytes of 4 GiB": (head(2, 2**32 - 1), "cbor.truncated"),
    "text of 2**64 - 1": (head(3, 2**64 - 1) + b"a", "cbor.truncated"),
    "nothing": (b"", "cbor.truncated"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_refused_without_building_it(name):
    data, why = ATTACKS[name]
    tracemalloc.start()
    try:
        assert refusal(data) == why
        assert tracemalloc.get_traced_memory()[1] < 200_000
    finally:
        tracemalloc.stop()


def test_the_largest_things_allowed_are_allowed():
    assert cbor.loads(head(4, 4095) + b"\x80" * 4095) == [[]] * 4095
    assert len(cbor.loads(cbor.dumps({f"{i:03}": 0 for i in range(256)}))) == 256
    assert cbor.loads(b"\x81" * 15 + b"\x80") == nested(16)
    assert refusal(b"\x81" * 16 + b"\x80") == "cbor.too_deep"
    assert len(cbor.loads(cbor.dumps(bytes(65_533)))) == 65_533
    assert refusal(head(2, 65_534) + bytes(65_534)) == "cbor.too_long"


# ------------------------------------------------------------------ what may not be sent
class Colour(enum.StrEnum):
    RED = "red"


def itself():
    value = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        (1.0, "a float"),
        ([float("nan")], "a float"),
        (memoryview(b"abc"), "a memoryview"),
        (bytearray(b"abc"), "a bytearray"),
        ({"a": {1}}, "a set"),
        (Colour.RED, "a Colour"),
        ({1: 2}, "a int as a key"),
        ({b"a": 2}, "a bytes as a key"),
        ({Colour.RED: 2}, "a Colour as a key"),
        (2**64, "beyond 64 bits"),
        (-(2**64) - 1, "beyond 64 bits"),
        (nested(17), "nested deeper than 16"),
        (nested(10_000), "nested deeper than 16"),
        (itself(), "nested deeper"),
        ([0] * 4096, "4097 items of at most 4096"),
        ({str(i): 0 for i in range(257)}, "a map of more than 256 entries"),
        ([[{"a": [0] * 4000}], [0] * 91], "4097 items of at most 4096"),
        (bytes(65_534), "65537 bytes of at most 65536"),
        ("\ud800", "surrogates not allowed"),
        ({"\ud800": 1}, "surrogates not allowed"),
    ],
    ids=lambda x: x if isinstance(x, str) and x.isascii() else "",
)
def test_what_is_outside_of_the_profile_is_never_written(value, complaint):
    with pytest.raises(LocalProtocolError, match="cannot be sent: ") as caught:
        cbor.dumps(value)
    assert complaint in str(caught.value)


def test_a_tuple_is_written_as_an_array():
    assert cbor.dumps((1, (2,))) == cbor.dumps([1, [2]])
    assert cbor.dumps(nested(16)) == b"\x81" * 15 + b"\x80"

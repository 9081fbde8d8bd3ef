"""A file is looked at before it is believed: its length, its header, and its owner's words."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmoe.errors import SnapshotRefused
from p2pmoe.experts.archive import (
    FORMAT,
    Facts,
    Layout,
    Slot,
    check_header,
    check_size,
    rank,
    read_statement,
    write_statement,
)
from tests.experts.saved import NETWORK, file_of, statement

LAYOUT = Layout({"b": Slot("F16", ()), "w": Slot("F32", (2,))}, frozenset({"w"}))
ADAM = Facts(3, "adam", 0.001, 0, 1.0)
SGD = Facts(3, "sgd", 0.001, 0, 1.0)
WEIGHTS = {"weights/w": Slot("F32", (2,), (0, 8)), "weights/b": Slot("F16", (), (8, 10))}
MEMORY = {
    "memory/exp_avg/w": Slot("F32", (2,), (10, 18)),
    "memory/exp_avg_sq/w": Slot("F32", (2,), (18, 26)),
    "memory/step/w": Slot("F32", (), (26, 30)),
}


def file(slots: object, metadata: object = None, tensors: int = 30) -> memoryview:
    """A file with this header, and so many bytes of tensors."""
    shown = ADAM.metadata() if metadata is None else metadata
    header = msgspec.json.encode({"__metadata__": shown, **slots})  # type: ignore[dict-item]  # what a test likes
    return memoryview(len(header).to_bytes(8, "little") + header + bytes(tensors))


def why(of: memoryview) -> str:
    with pytest.raises(SnapshotRefused) as caught:
        check_header(of, LAYOUT)
    assert str(caught.value).isprintable()
    return caught.value.why


def test_a_header_that_fits_the_expert_says_what_is_in_the_file() -> None:
    assert check_header(file(WEIGHTS | MEMORY), LAYOUT) == ADAM
    assert check_header(file(WEIGHTS, tensors=10), LAYOUT) == ADAM
    assert check_header(file(WEIGHTS, SGD.metadata(), 10), LAYOUT) == SGD


def test_tensors_may_lie_in_any_order() -> None:
    turned = {"weights/w": Slot("F32", (2,), (2, 10)), "weights/b": Slot("F16", (), (0, 2))}
    assert check_header(file(turned, tensors=10), LAYOUT) == ADAM


@pytest.mark.parametrize(
    "slots",
    [
        {},
        {"weights/w": WEIGHTS["weights/w"]},
        WEIGHTS | {"weights/x": Slot("F32", (), (10, 14))},
        WEIGHTS | {"memory/exp_avg/w": MEMORY["memory/exp_avg/w"]},
        WEIGHTS | {"memory/step/w": Slot("F32", (), (10, 14))},
        WEIGHTS | {"memory/exp_avg/b": Slot("F16", (), (10, 12))},
        WEIGHTS | {"weights/w": Slot("F32", (1, 2), (0, 8))},
        WEIGHTS | {"weights/w": Slot("I32", (2,), (0, 8))},
        WEIGHTS | {"weights/w": Slot("F32", (2**40,), (0, 8))},
        WEIGHTS | {"weights/w": Slot("COMPLEX", (2,), (0, 8))},
    ],
)
def test_tensors_other_than_the_experts_are_refused(slots: dict[str, Slot]) -> None:
    assert why(file(slots)) == "tensors"


@pytest.mark.parametrize(
    ("slots", "tensors"),
    [
        (WEIGHTS, 11),
        (WEIGHTS, 9),
        (WEIGHTS | {"weights/w": Slot("F32", (2,), (0, 9))}, 11),
        (WEIGHTS | {"weights/b": Slot("F16", (), (9, 11))}, 11),
        (WEIGHTS | {"weights/b": Slot("F16", (), (7, 9))}, 9),
        (WEIGHTS | {"weights/w": Slot("F32", (2,), (-8, 0))}, 10),
    ],
)
def test_gaps_overlaps_and_wrong_ends_are_refused(slots: dict[str, Slot], tensors: int) -> None:
    assert why(file(slots, tensors=tensors)) == "header"


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"format": "pt"},
        {FORMAT: "no json"},
        {FORMAT: '{"step":-1,"optimizer":"adam","lr":1,"warmup":0,"clip_grad_norm":null}'},
        {FORMAT: '{"step":1,"optimizer":"lion","lr":1,"warmup":0,"clip_grad_norm":null}'},
        {FORMAT: 7},
        7,
    ],
)
def test_a_file_that_does_not_say_what_it_is_is_refused(metadata: object) -> None:
    assert why(file(WEIGHTS, metadata, 10)) == "header"


@pytest.mark.parametrize(
    "header",
    [b"", b"[]", b"{}", b'{"weights/w":7}', b'{"a', b"\xff\xff", b"[" * 5000, b'{"a":' * 5000],
)
def test_a_header_that_is_no_json_of_tensors_is_refused(header: bytes) -> None:
    assert why(memoryview(len(header).to_bytes(8, "little") + header)) == "header"


def test_a_header_longer_than_its_file_is_refused() -> None:
    assert why(memoryview((2**63).to_bytes(8, "little") + b"{}")) == "header"
    assert why(memoryview(b"")) == "header"


@given(st.binary(max_size=64))
def test_any_bytes_are_a_header_or_a_refusal(data: bytes) -> None:
    assert why(memoryview(len(data).to_bytes(8, "little") + data)) in {"header", "tensors"}


def test_a_file_longer_than_the_expert_can_fill_is_not_fetched() -> None:
    check_size(len(file(WEIGHTS | MEMORY)), LAYOUT)
    check_size(LAYOUT.most_bytes, LAYOUT)
    for size in (0, 8, LAYOUT.most_bytes + 1, 2**62):
        with pytest.raises(SnapshotRefused, match="size"):
            check_size(size, LAYOUT)


# ------------------------------------------------------------------ statements
def test_a_statement_is_read_back_as_it_was_signed() -> None:
    signed = statement(file_of())
    assert read_statement(write_statement(signed), NETWORK) == signed


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"\xff", b"[" * 5000, b'{"expert":"ffn.0","step":1,"record":"oA=="}']
)
def test_what_is_no_statement_is_refused(data: bytes) -> None:
    with pytest.raises(SnapshotRefused, match="statement"):
        read_statement(data, NETWORK)


def test_a_statement_with_any_bit_of_its_record_flipped_is_refused() -> None:
    signed = statement(file_of())
    data = write_statement(signed)
    begin = data.index(b'"record":"') + 10
    for at in range(8 * begin, 8 * (len(data) - 2)):
        flipped = bytearray(data)
        flipped[at // 8] ^= 1 << at % 8
        try:
            read = read_statement(bytes(flipped), NETWORK)
        except SnapshotRefused as error:
            assert error.why == "statement"
        else:  # bits that base64 leaves over
            assert read == signed


def test_a_statement_of_another_network_is_refused() -> None:
    with pytest.raises(SnapshotRefused, match="statement"):
        read_statement(write_statement(statement(file_of())), bytes([1]) * 32)


def test_the_newer_one_has_the_later_owner_then_more_updates_then_the_later_time() -> None:
    packed = file_of()
    facts = [
        {"lease": 1, "step": 9, "saved_ms": 9},
        {"lease": 2, "step": 1, "saved_ms": 9},
        {"lease": 2, "step": 2, "saved_ms": 1},
        {"lease": 2, "step": 2, "saved_ms": 2},
    ]
    ranks = [rank(statement(packed, **each).body) for each in facts]
    assert ranks == sorted(ranks)

"""Any bytes are a value with this one spelling, within the bounds, or a typed error."""

from typing import Any

from p2pmoe.errors import MalformedMessage
from p2pmoe.wire import cbor

MAX_INPUT = 4200  # bytes; one item more than is allowed
SEEDS = [b"\x99\x10\x00" + bytes(4096), b"\x99\x0f\xff" + bytes(4095)]


def items(value: Any, depth: int = 0) -> int:
    """How many data items a value has."""
    if isinstance(value, dict | list):
        assert depth < cbor.MAX_DEPTH
    if isinstance(value, dict):
        assert len(value) <= cbor.MAX_MAP_ENTRIES
        assert all(type(key) is str for key in value)
        return 1 + len(value) + sum(items(item, depth + 1) for item in value.values())
    if isinstance(value, list):
        return 1 + sum(items(item, depth + 1) for item in value)
    assert value is None or type(value) in {bool, int, str, bytes}
    return 1


def fuzz_one(data: bytes) -> None:
    try:
        value = cbor.loads(data)
    except MalformedMessage as error:
        why = error.why
        assert why.startswith("cbor.")
        return
    assert items(value) <= min(cbor.MAX_ITEMS, len(data))
    assert cbor.dumps(value) == data
    assert cbor.loads(memoryview(data)) == value

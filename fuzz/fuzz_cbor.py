"""Any bytes are a value with this one spelling, within the bounds, or a typed error."""

from typing import Any

from p2pmoe.errors import MalformedMessage
from p2pmoe.wire import cbor


def items(value: Any) -> int:
    """How many data items a value has."""
    if isinstance(value, dict):
        assert len(value) <= cbor.MAX_MAP_ENTRIES
        assert all(type(key) is str for key in value)
        return 1 + len(value) + sum(map(items, value.values()))
    if isinstance(value, list):
        return 1 + sum(map(items, value))
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

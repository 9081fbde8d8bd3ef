"""Deterministic CBOR (RFC 8949, section 4.2.1), the strict profile that peers speak.

Text keys only, no floats, no tags, no bignums, definite lengths, shortest forms, bounded depth and
counts. cbor2 alone is not strict, so three steps guard it: `_scan` walks the bytes once, in time
linear in their length, and refuses what may not appear at all; cbor2 builds the value; encoding
the value again must give the same bytes. On the way out a walk over the value does the same: cbor2
would write a memoryview or a float without a word. Nothing else in the package imports cbor2.
"""

from __future__ import annotations

from typing import Any

import cbor2

from p2pmoe.errors import LocalProtocolError, MalformedMessage

MAX_BYTES = 64 * 1024  # bytes of one item: a control frame
MAX_DEPTH = 16  # containers inside each other
MAX_ITEMS = 4096  # data items in one message
MAX_MAP_ENTRIES = 256  # entries of one map; a bound on colliding keys

_UINT, _NEGATIVE, _BYTES, _TEXT, _ARRAY, _MAP, _TAG, _OTHER = range(8)  # major types, section 3.1
_ALWAYS_PLAIN = frozenset({str, bytes, bool, type(None)})  # what cbor2 writes as it should
_FALSE, _TRUE, _NULL = 20, 21, 22  # simple values, section 3.3


def dumps(value: Any) -> bytes:
    """Encode plain data: dict with str keys, list, tuple, str, bytes, int, bool, None.

    Raises `LocalProtocolError` when the value is outside of the profile or its bounds.
    """
    items = _count(value, 0)
    if items > MAX_ITEMS:
        raise LocalProtocolError(f"cannot be sent: {items} items of at most {MAX_ITEMS}")
    try:
        data: bytes = cbor2.dumps(value, canonical=True)
    except UnicodeError as error:
        raise LocalProtocolError(f"cannot be sent: {error}") from error
    if len(data) > MAX_BYTES:
        raise LocalProtocolError(f"cannot be sent: {len(data)} bytes of at most {MAX_BYTES}")
    return data


def loads(data: bytes | bytearray | memoryview) -> Any:
    """Decode exactly one item; `MalformedMessage` with why `cbor.*` for anything else."""
    if len(data) > MAX_BYTES:
        raise MalformedMessage("cbor.too_long", f"{len(data)} bytes")
    raw = bytes(data)
    _scan(raw)
    try:
        value = cbor2.loads(
            raw, allow_indefinite=False, allow_duplicate_keys=False, max_depth=MAX_DEPTH + 1
        )
        again = cbor2.dumps(value, canonical=True)
    except cbor2.CBORError as error:  # text that is no UTF-8, or a key that comes twice
        raise MalformedMessage("cbor.invalid", type(error).__name__) from None
    if again != raw:
        raise MalformedMessage("cbor.not_deterministic")
    return value


def plain(value: int | bytes) -> bytes:
    """The bytes of an integer of up to 64 bits, a byte string, or a truth: no check is needed."""
    data: bytes = cbor2.dumps(value)
    return data


def _count(value: Any, depth: int) -> int:
    """How many items a value has. It must be of the profile's own types: cbor2 knows others."""
    kind = type(value)
    if kind is dict or kind is list or kind is tuple:
        if depth == MAX_DEPTH:
            raise LocalProtocolError(f"cannot be sent: nested deeper than {MAX_DEPTH}")
        items = 1 + len(value)
        if kind is dict:
            _check_keys(value)
            items, value = items + len(value), value.values()
        for item in value:
            if type(item) not in _ALWAYS_PLAIN:
                items += _count(item, depth + 1) - 1
        return items
    if kind is int:
        if not -(2**64) <= value < 2**64:
            raise LocalProtocolError("cannot be sent: an integer beyond 64 bits")
    elif kind not in _ALWAYS_PLAIN:
        raise LocalProtocolError(f"cannot be sent: a {kind.__name__}")
    return 1


def _check_keys(value: dict[Any, Any]) -> None:
    if len(value) > MAX_MAP_ENTRIES:
        raise LocalProtocolError(f"cannot be sent: a map of more than {MAX_MAP_ENTRIES} entries")
    for key in value:
        if type(key) is not str:
            raise LocalProtocolError(f"cannot be sent: a {type(key).__name__} as a key")


def _scan(data: bytes) -> None:
    """One pass over the heads of all items; refuses what the profile does not have."""
    size, at = len(data), 0
    left, pairs = 1, 0  # of the innermost container: items to come, and whether they are pairs
    outer: list[tuple[int, int]] = []  # the same of the containers around it
    for _ in range(MAX_ITEMS):
        if at >= size:
            raise MalformedMessage("cbor.truncated")
        major, argument = data[at] >> 5, data[at] & 0x1F
        at += 1
        if argument > 23 or major > _MAP:
            argument, at = _argument(data, at, major, argument)
        left -= 1
        if left & pairs and major != _TEXT:
            raise MalformedMessage("cbor.key", "a key is text")
        if _BYTES <= major <= _TEXT:
            at += argument
            if at > size:
                raise MalformedMessage("cbor.truncated")
        elif _ARRAY <= major <= _MAP:
            _check_container(major, argument, len(outer))
            outer.append((left, pairs))
            left, pairs = (argument, 0) if major == _ARRAY else (2 * argument, 1)
        while not left:
            if not outer:
                if at != size:
                    raise MalformedMessage("cbor.trailing", f"{size - at} bytes")
                return
            left, pairs = outer.pop()
    raise MalformedMessage("cbor.too_many_items")


def _check_container(major: int, argument: int, depth: int) -> None:
    """Whether a container may be as long as it says, so many containers deep."""
    if depth == MAX_DEPTH:
        raise MalformedMessage("cbor.too_deep")
    if major == _ARRAY and argument > MAX_ITEMS:
        raise MalformedMessage("cbor.too_many_items")
    if major == _MAP and argument > MAX_MAP_ENTRIES:
        raise MalformedMessage("cbor.too_many_entries")


def _argument(data: bytes, at: int, major: int, info: int) -> tuple[int, int]:
    """The argument of a head that is no short one, and where the rest begins."""
    if major == _TAG:
        raise MalformedMessage("cbor.tag")
    if major == _OTHER:
        if info not in (_FALSE, _TRUE, _NULL):
            raise MalformedMessage("cbor.float" if 25 <= info <= 27 else "cbor.simple")
        return 0, at
    if info > 27:
        raise MalformedMessage("cbor.indefinite" if info == 31 else "cbor.reserved")
    size = 1 << (info - 24)
    if at + size > len(data):
        raise MalformedMessage("cbor.truncated")
    argument = int.from_bytes(data[at : at + size], "big")
    if argument < (24 if size == 1 else 1 << (4 * size)):
        raise MalformedMessage("cbor.not_shortest")
    return argument, at + size

"""Deterministic CBOR (RFC 8949, section 4.2.1), the strict profile that peers speak.

Text keys only, no floats, no tags, no bignums, definite lengths, shortest forms, bounded depth and
counts. cbor2 alone is not strict, so three steps guard it: `_scan` walks the bytes once, in time
linear in their length, and refuses what may not appear at all; cbor2 builds the value; encoding
the value again must give the same bytes. Nothing else in the package imports cbor2.
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
_FALSE, _TRUE, _NULL = 20, 21, 22  # simple values, section 3.3


def dumps(value: Any) -> bytes:
    """Encode plain data: dict with str keys, list, tuple, str, bytes, int, bool, None.

    Raises `LocalProtocolError` when the value is outside of the profile or its bounds.
    """
    _check_plain(value, 0)
    try:
        data: bytes = cbor2.dumps(value, canonical=True)
        if len(data) <= MAX_BYTES:
            _scan(data)
            return data
    except (MalformedMessage, UnicodeError) as error:
        raise LocalProtocolError(f"cannot be sent: {error}") from error
    raise LocalProtocolError(f"cannot be sent: {len(data)} bytes of at most {MAX_BYTES}")


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


def _check_plain(value: Any, depth: int) -> None:
    """Only the profile's own types: cbor2 would write a memoryview or a float without a word."""
    if depth > MAX_DEPTH:
        raise LocalProtocolError(f"cannot be sent: nested deeper than {MAX_DEPTH}")
    kind = type(value)
    if kind is dict:
        for key, item in value.items():
            if type(key) is not str:
                raise LocalProtocolError(f"cannot be sent: a {type(key).__name__} as a key")
            _check_plain(item, depth + 1)
    elif kind is list or kind is tuple:
        for item in value:
            _check_plain(item, depth + 1)
    elif kind is int:
        if not -(2**64) <= value < 2**64:
            raise LocalProtocolError("cannot be sent: an integer beyond 64 bits")
    elif kind is not str and kind is not bytes and kind is not bool and value is not None:
        raise LocalProtocolError(f"cannot be sent: a {kind.__name__}")


def _scan(data: bytes) -> None:
    """One pass over the heads of all items; refuses what the profile does not have."""
    open_containers: list[list[int]] = []  # of each: items still to come, 1 if it is a map
    at = items = 0
    while True:
        items += 1
        if items > MAX_ITEMS:
            raise MalformedMessage("cbor.too_many_items")
        major, argument, at = _head(data, at)
        if open_containers:
            inner = open_containers[-1]
            if inner[1] and inner[0] % 2 == 0 and major != _TEXT:
                raise MalformedMessage("cbor.key", "a key is text")
            inner[0] -= 1
        if major in (_BYTES, _TEXT):
            at += argument
            if at > len(data):
                raise MalformedMessage("cbor.truncated")
        elif major in (_ARRAY, _MAP):
            open_containers.append(_contents(major, argument, len(open_containers)))
        while open_containers and not open_containers[-1][0]:
            open_containers.pop()
        if not open_containers:
            break
    if at != len(data):
        raise MalformedMessage("cbor.trailing", f"{len(data) - at} bytes")


def _contents(major: int, argument: int, depth: int) -> list[int]:
    """How many items a container announces, once its size and depth are allowed."""
    if depth == MAX_DEPTH:
        raise MalformedMessage("cbor.too_deep")
    if major == _ARRAY:
        if argument > MAX_ITEMS:
            raise MalformedMessage("cbor.too_many_items")
        return [argument, 0]
    if argument > MAX_MAP_ENTRIES:
        raise MalformedMessage("cbor.too_many_entries")
    return [2 * argument, 1]


def _head(data: bytes, at: int) -> tuple[int, int, int]:
    """Read one item's head at `at`: its major type, its argument, and where the rest begins."""
    if at >= len(data):
        raise MalformedMessage("cbor.truncated")
    major, info = data[at] >> 5, data[at] & 0x1F
    at += 1
    if major == _TAG:
        raise MalformedMessage("cbor.tag")
    if major == _OTHER and info not in (_FALSE, _TRUE, _NULL):
        raise MalformedMessage("cbor.float" if 25 <= info <= 27 else "cbor.simple")
    if info < 24:
        return major, info, at
    if info > 27:
        raise MalformedMessage("cbor.indefinite" if info == 31 else "cbor.reserved")
    size = 1 << (info - 24)
    if at + size > len(data):
        raise MalformedMessage("cbor.truncated")
    argument = int.from_bytes(data[at : at + size], "big")
    if argument < (24 if size == 1 else 1 << (4 * size)):
        raise MalformedMessage("cbor.not_shortest")
    return major, argument, at + size

"""Whatever value is to be written: bytes that are read as the same value, or a typed refusal.

The input is a little program that builds a value: a byte chooses a kind, and its contents follow.
"""

from collections.abc import Iterator
from typing import Any

from p2pmoe.errors import LocalProtocolError
from p2pmoe.wire import cbor

MAX_INPUT = 256  # bytes
CONTAINERS = (list, tuple, dict)
OUTSIDE = (float, bytearray, set, complex)  # what the profile does not have
SEEDS = [
    bytes([0x03, 0x61, 5, 0x71, 5, 0xB2, 65, 66, 0xC2, 1, 2]),  # lists, numbers, text, bytes
    bytes([0x13, 0xF0, 0xF1, 0xF2]),
    bytes([0x22, 1, 0x61, 7, 2, 0xB1, 65]),  # a map
    bytes([0x21, 240, 0]),  # a key that is a number
    bytes([0x21, 210, 0]),  # and one that is no Unicode
    bytes([0x51, *(n % 200 for n in range(240))]),  # 300 entries
    bytes([0x4E]),  # more than are allowed
    bytes([0x01] * 18),  # deeper than is allowed
    bytes([0x69, *[255] * 9]),  # longer than 64 bits
    bytes([0xA2, 248, 248]),
    bytes([0xDF, *range(16)]),  # longer than a message
    bytes([0xE0]),
    bytes([0x3F, *[0x3F] * 15]),
    bytes([0x0E, *[0x3F] * 14]),
]


def built(program: Iterator[int], depth: int = 0) -> Any:
    """The next value; `None` once the program has ended."""
    kind, size = divmod(next(program, 0), 16)
    if kind < 6 and depth < 20:
        count = size if kind < 4 else size * 300
        if kind % 3 == 2:
            keys = (key(program, at) for at in range(count))
            return {one: built(program, depth + 1) for one in keys}
        return CONTAINERS[kind % 3](built(program, depth + 1) for _ in range(count))
    if kind < 10:
        number = int.from_bytes(bytes(next(program, 0) for _ in range(size)), "big")
        return -number if kind % 2 else number
    if kind < 12:
        return "".join(chr(next(program, 0) * (223 if kind == 10 else 1)) for _ in range(size))
    if kind < 14:
        return bytes(next(program, 0) for _ in range(size)) * (1 if kind == 12 else 4500)
    return OUTSIDE[size % 4]() if kind == 14 else (None, False, True)[size % 3]


def key(program: Iterator[int], at: int) -> Any:
    kind = next(program, 0)
    return f"{kind}{at}" if kind < 200 else chr(kind * 223) if kind < 230 else kind


def as_read(value: Any) -> Any:
    """The value with arrays as lists, which is how they are read."""
    if isinstance(value, dict):
        return {name: as_read(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_read(item) for item in value]
    return value


def fuzz_one(data: bytes) -> None:
    value = built(iter(data))
    try:
        written = cbor.dumps(value)
    except LocalProtocolError as error:
        assert str(error).startswith("cannot be sent: ")
        return
    assert cbor.loads(written) == as_read(value)

"""What the harnesses of messages have in common: any bytes are a message, or one typed error."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any

import msgspec

from p2pmoe.errors import MalformedMessage
from p2pmoe.wire import cbor, schema
from p2pmoe.wire.envelope import VerifiedCache

NETWORK = bytes(range(32))


class Trusting(VerifiedCache):
    """Knows every envelope: what is left of opening one is to parse it."""

    def knows(self, digest: bytes) -> bool:
        assert len(digest) == 32
        return True


def sealed(kind: str, public_key: bytes, payload: bytes, signature: bytes = bytes(64)) -> bytes:
    """An envelope, written without the code that is tested."""
    return cbor.dumps([1, kind, public_key, payload, signature])


def read(data: bytes, messages: Sequence[Any]) -> Any:
    """The message in `data`, `None` if it is refused. Byte 0 says which message is expected."""
    message = messages[data[0] % len(messages)] if data else messages[0]
    try:
        value = schema.decode(data[1:], message)
    except MalformedMessage as error:
        why, said = error.why, str(error)
        assert why == "schema.mismatch" or why.startswith("cbor.")
        assert said.isprintable()
        assert len(said) < 300
        return None
    assert schema.decode(schema.encode(value), message) == value
    check_bounds(value)
    if isinstance(value, schema.Message):  # whereas what is signed may say more than is known
        assert set(cbor.loads(data[1:])) <= {"t", *value.__struct_fields__}
    return value


def check_bounds(value: Any) -> None:
    """What holds of every field of every message: plain types, and numbers of at most 64 bits."""
    if isinstance(value, msgspec.Struct):
        value = [getattr(value, name) for name in value.__struct_fields__]
    elif isinstance(value, Enum):
        value = value.value
    elif isinstance(value, dict):
        assert len(value) <= cbor.MAX_MAP_ENTRIES
        value = list(value.values())
    if isinstance(value, tuple | list):
        for item in value:
            check_bounds(item)
    else:
        assert value is None or type(value) in {bool, int, str, bytes}
        assert type(value) is not int or -(2**64) <= value < 2**64

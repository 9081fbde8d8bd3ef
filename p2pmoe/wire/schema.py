"""Typed messages and their bytes: a struct is a CBOR map whose keys are the field names.

Requests, answers and frame headers are `Message`: a key that the struct does not have is refused.
What a peer signs is a `SignedPayload`: unknown keys are ignored, because such bytes are relayed as
they came and a newer peer may say more in them. A subclass repeats `frozen=True, kw_only=True`:
type checkers do not inherit the one, msgspec not the other.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated, Any, TypeVar

import msgspec

from p2pmoe.errors import MalformedMessage, printable
from p2pmoe.wire import cbor

U16 = Annotated[int, msgspec.Meta(ge=0, lt=2**16)]
U32 = Annotated[int, msgspec.Meta(ge=0, lt=2**32)]
U64 = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]  # msgspec bounds integers by int64
Bytes8 = Annotated[bytes, msgspec.Meta(min_length=8, max_length=8)]
Bytes16 = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
Bytes32 = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
Text24 = Annotated[str, msgspec.Meta(max_length=24)]
Text64 = Annotated[str, msgspec.Meta(max_length=64)]
Text256 = Annotated[str, msgspec.Meta(max_length=256)]
MAX_ENVELOPE_BYTES = 32 * 1024  # a value in the DHT
Envelope = Annotated[bytes, msgspec.Meta(max_length=MAX_ENVELOPE_BYTES)]  # sealed, unopened


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A request, an answer, or a frame's header. Unknown keys are refused."""


class SignedPayload(msgspec.Struct, frozen=True, kw_only=True):
    """What an envelope carries. Unknown keys are ignored."""


T = TypeVar("T")

REMEMBERED = 256  # messages said again and again, either way; a guess
REMEMBERED_BYTES = 1024  # of the longest of them; a guess


def encode(value: msgspec.Struct) -> bytes:
    """The CBOR bytes of a message."""
    return cbor.dumps(msgspec.to_builtins(value, builtin_types=(bytes,)))


def decode(data: bytes | bytearray | memoryview, message: type[T]) -> T:
    """A value of the struct (or tagged union) `message` from its bytes.

    Raises `MalformedMessage` with why `cbor.*`, or `schema.mismatch` and the path of the field.
    """
    return convert(cbor.loads(data), message)


def encode_again(value: msgspec.Struct) -> bytes:
    """As `encode`, for hashable messages that are often said in the same words."""
    return _encoded(value)


def decode_again(data: bytes, message: type[T]) -> T:
    """As `decode`, for messages that are often heard in the same words, if they are short."""
    return _decoded(data, message) if len(data) <= REMEMBERED_BYTES else decode(data, message)


_encoded = lru_cache(REMEMBERED)(encode)
_decoded: Any = lru_cache(REMEMBERED)(decode)


def convert(value: Any, message: type[T]) -> T:
    """The same for a value that is decoded already."""
    try:
        return msgspec.convert(value, message, builtin_types=(bytes,), strict=True)
    except (msgspec.ValidationError, OverflowError) as error:
        raise MalformedMessage("schema.mismatch", printable(str(error))) from None

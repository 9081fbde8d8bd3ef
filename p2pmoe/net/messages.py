"""The headers of frames: what two peers say about a connection and the calls on it.

A header is a CBOR map with a tag `t`. A payload stands behind the header of a `Chunk`, and behind
that of a `Request` or `Reply` when it is short. Whoever dialled gives its calls odd ids, the other
side even ones; ids grow and are never used again.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, cast, get_args

import msgspec

from p2pmoe.wire import cbor, schema
from p2pmoe.wire.peer_record import MAX_RECORD_BYTES
from p2pmoe.wire.schema import U16, U32, U64, Bytes32, Message, Text24, Text64
from p2pmoe.wire.tensor import MAX_TENSOR_BYTES

VERSION_MIN = 1  # the protocol versions that this package speaks
VERSION_MAX = 1
FEATURES = 0  # feature bits that this package knows; the two sides use what both have
MAX_BODY_BYTES = 63 * 1024  # leaves the header's other fields 1 KiB of a 64 KiB frame
MAX_PAYLOAD_BYTES = MAX_TENSOR_BYTES  # of one request, or of one part of an answer
INLINE_BYTES = 16 * 1024  # of payload that go with a header; a guess, the longest TLS record
MAX_PARTS = 256  # parts of one answer; a guess, four times what one expert call has
MAX_DETAIL = 256  # characters of a failure's text
MAX_WINDOW_BYTES = 8 * 1024 * 1024  # credit that may be open at once, for a call or a connection

MOST_CALLS = 2**63 - 1  # the largest id; msgspec bounds integers by int64
CallId = Annotated[int, msgspec.Meta(ge=1, le=MOST_CALLS)]
Body = Annotated[bytes, msgspec.Meta(max_length=MAX_BODY_BYTES)]
Size = Annotated[int, msgspec.Meta(ge=0, le=MAX_PAYLOAD_BYTES)]
Detail = Annotated[str, msgspec.Meta(max_length=MAX_DETAIL)]
ChannelClass = Literal["control", "bulk"]


class Hello(Message, frozen=True, kw_only=True, tag_field="t", tag="hello"):
    """The first frame of each side; the dialler's comes first.

    `record` is the sender's sealed peer record, empty when nobody can dial it.
    """

    version_min: U16
    version_max: U16
    network: Bytes32
    channel: ChannelClass
    record: Annotated[bytes, msgspec.Meta(max_length=MAX_RECORD_BYTES)] = b""
    features: U64 = 0
    agent: Text64 = ""


class Refuse(Message, frozen=True, kw_only=True, tag_field="t", tag="refuse"):
    """Why the sender closes this connection now."""

    code: Text24
    detail: Detail = ""


class Request(Message, frozen=True, kw_only=True, tag_field="t", tag="request"):
    """A call. `budget_ms` is left of its deadline.

    A payload of at most 16 KiB stands in the same frame; a longer one, of `size` bytes, follows in
    chunks.
    """

    id: CallId
    method: Text64
    budget_ms: U32
    body: Body = b""
    size: Size = 0


class Reply(Message, frozen=True, kw_only=True, tag_field="t", tag="reply"):
    """A part of the answer, with a payload as a request's. The call is over after the `last`."""

    id: CallId
    body: Body = b""
    size: Size = 0
    last: bool = False


class Chunk(Message, frozen=True, kw_only=True, tag_field="t", tag="chunk"):
    """The next bytes of a request's or a part's payload."""

    id: CallId


class Credit(Message, frozen=True, kw_only=True, tag_field="t", tag="credit"):
    """So many more bytes of payload may be sent for a call, or (id 0) on the connection."""

    id: U64
    size: Annotated[int, msgspec.Meta(ge=1, le=MAX_WINDOW_BYTES)]


class Cancel(Message, frozen=True, kw_only=True, tag_field="t", tag="cancel"):
    """The caller wants no answer any more."""

    id: CallId


class End(Message, frozen=True, kw_only=True, tag_field="t", tag="end"):
    """The end of an answer that failed, or whose last part did not say that it is the last.

    `code` is empty when all went well.
    """

    id: CallId
    code: Text24 = ""
    detail: Detail = ""
    retry_after_ms: U32 = 0


class Goodbye(Message, frozen=True, kw_only=True, tag_field="t", tag="goodbye"):
    """No further calls: those up to `last_id` are answered, later ones were not begun."""

    last_id: U64


class Ping(Message, frozen=True, kw_only=True, tag_field="t", tag="ping"):
    """Are you there? `n` grows."""

    n: U64


class Pong(Message, frozen=True, kw_only=True, tag_field="t", tag="pong"):
    """Yes, with the `n` of the ping."""

    n: U64


Header = (
    Hello | Refuse | Request | Reply | Chunk | Credit | Cancel | End | Goodbye | Ping | Pong
)  # what a frame may begin with
_KINDS: dict[object, type[Message]] = {
    kind.__struct_config__.tag: kind for kind in get_args(Header)
}


# The headers that each call has are put together, and taken apart, from these pieces around what
# differs; any other form of theirs is read as all messages are.
_BODY, _LAST, _SIZE = (cbor.dumps(key) for key in ("body", "last", "size"))
_METHOD, _BUDGET = cbor.dumps("method"), cbor.dumps("budget_ms")
_ID = cbor.dumps("id")
_REQUEST, _REPLY, _CHUNK, _END = (
    schema.encode(message).partition(_ID)[0] + _ID
    for message in (Request(id=1, method="", budget_ms=0), Reply(id=1), Chunk(id=1), End(id=1))
)
_ENDED = schema.encode(End(id=1))[len(_END) + 1 :]
_TRUE = cbor.plain(True)
# Heads of items in their shortest form, of RFC 8949, section 4.2.1
_UINT32 = rb"[\0-\x17]|\x18[\x18-\xff]|\x19(?!\0)..|\x1a(?!\0\0)...."
_UINT63 = _UINT32 + rb"|\x1b(?!\0{4})[\0-\x7f].{7}"
_LENGTH = rb"[\x40-\x57]|\x58[\x18-\xff]|\x59(?!\0).."


def _pattern(*parts: bytes) -> re.Pattern[bytes]:
    return re.compile(b"".join(parts), re.DOTALL)


_BEGINS = _pattern(b"(%b|%b)(%b)" % (_REQUEST, _REPLY, _UINT63), _BODY, b"(%b)" % _LENGTH)
_REPLY_ENDS = _pattern(_LAST, rb"(?P<last>[\xf4\xf5])", _SIZE, b"(?P<size>%b)" % _UINT32)
_REQUEST_ENDS = _pattern(
    *(_SIZE, b"(?P<size>%b)" % _UINT32, _METHOD, rb"(?P<length>[\x60-\x77])(?P<method>[ -~]*)"),
    *(_BUDGET, b"(?P<budget>%b)" % _UINT32),
)


def encode_header(message: Message) -> bytes:
    """The bytes of a frame's header."""
    plain = cbor.plain
    if isinstance(message, Request):
        start = _REQUEST, plain(message.id), _BODY, plain(message.body), _SIZE, plain(message.size)
        method = cbor.dumps(message.method)
        return b"".join((*start, _METHOD, method, _BUDGET, plain(message.budget_ms)))
    if isinstance(message, Reply):
        start = _REPLY, plain(message.id), _BODY, plain(message.body), _LAST, plain(message.last)
        return b"".join((*start, _SIZE, plain(message.size)))
    if isinstance(message, Chunk):
        return _CHUNK + plain(message.id)
    if isinstance(message, End) and message == End(id=message.id):
        return _END + plain(message.id) + _ENDED
    return schema.encode(message)


def decode_header(data: bytes) -> Header:
    """A frame's header from its bytes; raises as `schema.decode`."""
    if message := _message(data):
        return message
    if data.startswith(_CHUNK) and (call := _call_id(data[len(_CHUNK) :])):
        return Chunk(id=call)
    ended = data.startswith(_END) and data.endswith(_ENDED)
    if ended and (call := _call_id(data[len(_END) : -len(_ENDED)])):
        return End(id=call)
    value = cbor.loads(data)
    tag = value.get("t") if type(value) is dict else None
    # One kind is converted in a tenth of the time that msgspec takes to look into a union.
    kind = _KINDS.get(tag) if type(tag) is str else None
    return cast("Header", schema.convert(value, kind or cast("Any", Header)))


def _message(data: bytes) -> Request | Reply | None:
    """The request or reply that these bytes are, if they have its usual form."""
    if not (begin := _BEGINS.match(data)):
        return None
    call, at = _number(begin[2]), begin.end()
    end = at + _number(begin[3])
    is_reply = begin[1] == _REPLY
    rest = (_REPLY_ENDS if is_reply else _REQUEST_ENDS).fullmatch(data, end)
    if not (rest and call) or end - at > MAX_BODY_BYTES:
        return None
    body, size = data[at:end], _number(rest["size"])
    if size > MAX_PAYLOAD_BYTES:
        return None
    if is_reply:
        return Reply(id=call, body=body, last=rest["last"] == _TRUE, size=size)
    method, budget_ms = rest["method"], _number(rest["budget"])
    if _number(rest["length"]) != len(method):
        return None
    return Request(id=call, method=method.decode(), budget_ms=budget_ms, body=body, size=size)


def _number(head: bytes) -> int:
    """The argument of an item's head."""
    return int.from_bytes(head[1:], "big") if len(head) > 1 else head[0] & 0x1F


def _call_id(data: bytes) -> int:
    """The id that these bytes are; 0 for anything else, which is looked at more closely."""
    value = int.from_bytes(data[1:] or data, "big")
    return value if value <= MOST_CALLS and cbor.plain(value) == data else 0

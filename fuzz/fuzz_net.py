"""The header of a frame, whichever it is."""

from fuzz.checks import check_bounds
from p2pmoe.errors import MalformedMessage
from p2pmoe.net.messages import (
    Cancel,
    Chunk,
    Credit,
    End,
    Goodbye,
    Hello,
    Ping,
    Pong,
    Refuse,
    Reply,
    Request,
    decode_header,
)
from p2pmoe.wire import cbor, schema

MAX_INPUT = 512  # bytes; a HELLO with a short record
MIB = 2**20


def fuzz_one(data: bytes) -> None:
    try:
        header = decode_header(data)
        assert schema.convert(cbor.loads(data), type(header)) == header
    except MalformedMessage as error:
        why, said = error.why, str(error)
        assert why == "schema.mismatch" or why.startswith("cbor.")
        assert said.isprintable()
        return
    assert decode_header(schema.encode(header)) == header
    check_bounds(header)
    assert set(cbor.loads(data)) <= {"t", *header.__struct_fields__}
    match header:
        case Hello():
            assert len(header.network) == 32
            assert header.channel in {"control", "bulk"}
            assert len(header.record) <= 600
            assert len(header.agent) <= 64
            assert min(header.version_min, header.version_max) >= 0
            assert max(header.version_min, header.version_max) < 2**16
        case Refuse():
            assert len(header.code) <= 24
            assert len(header.detail) <= 256
        case Request() | Reply():
            assert 1 <= header.id < 2**63
            assert 0 <= header.size <= 64 * MIB
            assert len(header.body) <= 63 * 1024
            assert isinstance(getattr(header, "last", False), bool)
        case Chunk() | Cancel():
            assert 1 <= header.id < 2**63
        case End():
            assert 1 <= header.id < 2**63
            assert 0 <= header.retry_after_ms < 2**32
        case Credit():
            assert 0 <= header.id < 2**63
            assert 1 <= header.size <= 8 * MIB
        case Goodbye(last_id=number) | Ping(n=number) | Pong(n=number):
            assert 0 <= number < 2**63

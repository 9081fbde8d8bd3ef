"""What owners, keepers and heirs of saved experts say to each other. Byte 0 chooses which."""

from fuzz.checks import read
from p2pmoe.experts.copies import (
    MAX_COPY_CHUNK,
    CellsReply,
    CellsRequest,
    CopyChunk,
    CopyGet,
    CopyOffer,
    CopyPut,
    CopyTaken,
    CopyVerdict,
)

MAX_INPUT = 512  # bytes; a sealed statement has 300
MESSAGES = (
    CopyOffer,
    CopyVerdict,
    CopyPut,
    CopyTaken,
    CopyGet,
    CopyChunk,
    CellsRequest,
    CellsReply,
)


def fuzz_one(data: bytes) -> None:
    match read(data, MESSAGES):
        case CopyOffer(record=record):
            assert len(record) <= 2**15
        case CopyVerdict() as said:
            assert said.verdict in {"send", "have", "refused"}
            assert len(said.why) <= 24
        case CopyPut(hash=named, offset=offset):
            assert len(named) == 32
            assert 0 <= offset < 2**63
        case CopyTaken(received=received, whole=whole):
            assert 0 <= received < 2**63
            assert whole in {True, False}
        case CopyGet(hash=named, offset=offset, length=length):
            assert len(named) == 32
            assert 0 <= offset < 2**63
            assert 1 <= length <= MAX_COPY_CHUNK
        case CopyChunk(size=size):
            assert 0 <= size < 2**63
        case CellsRequest(grid=grid):
            assert len(grid) == 32
        case CellsReply(free=free):
            assert 0 <= free < 2**16

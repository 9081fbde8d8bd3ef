"""A stream gives the same frames, and the same error, however it is cut. Byte 0 cuts it."""

from p2pmoe.errors import MalformedMessage
from p2pmoe.wire.framing import PREFIX, FrameLimits, FrameReader, frame_prefix

LIMITS = FrameLimits(header_bytes=16, payload_bytes=32)


def read(stream: bytes, size: int) -> tuple[list[tuple[bytes, bytes]], str | None, bool]:
    """The frames of a stream fed in pieces of `size`, the error, and whether a frame is begun."""
    reader, frames = FrameReader(LIMITS), []
    for at in range(0, len(stream), size):
        try:
            got = reader.receive_data(stream[at : at + size])
        except MalformedMessage as error:
            return frames, error.why, False
        frames += [(frame.header, bytes(frame.payload)) for frame in got]
    return frames, None, reader.inside_frame


def fuzz_one(data: bytes) -> None:
    stream = data[1:]
    frames, why, inside = read(stream, 1)
    for size in (len(stream) or 1, data[0] % 61 + 1 if data else 1):
        assert read(stream, size)[1:] == (why, inside)
        if why is None:
            assert read(stream, size)[0] == frames
    again = b"".join(frame_prefix(len(head), len(body)) + head + body for head, body in frames)
    assert stream.startswith(again)
    if why is None:
        assert inside == (again != stream)
    else:
        assert why.startswith("frame.")
        assert len(stream) >= len(again) + PREFIX.size

"""A stream gives the same frames, and the same error, however it is cut. Byte 0 cuts it."""

from p2pmoe.errors import MalformedMessage
from p2pmoe.wire.framing import PREFIX, FrameLimits, FrameReader, frame_prefix

MAX_INPUT = 256  # bytes; five of the longest frames
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
    frames, why, inside = read(stream, len(stream) or 1)
    pieces = read(stream, data[0] % 16 + 1 if data else 1)
    assert pieces[1:] == (why, inside)
    if why is None:  # frames in front of an error are given out when they came before it
        assert pieces[0] == frames
    frames = pieces[0]
    for head, body in frames:
        assert 0 < len(head) <= LIMITS.header_bytes
        assert len(body) <= LIMITS.payload_bytes
    again = b"".join(frame_prefix(len(head), len(body)) + head + body for head, body in frames)
    assert stream.startswith(again)
    if why is None:
        assert inside == (again != stream)
        assert len(stream) - len(again) < PREFIX.size + LIMITS.header_bytes + LIMITS.payload_bytes
    else:
        assert why.startswith("frame.")
        assert len(stream) >= len(again) + PREFIX.size

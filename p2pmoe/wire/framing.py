"""Length-prefixed frames out of a byte stream: a CBOR header and a raw payload, kept apart.

    u32be header length | u32be payload length | header | payload

Lengths are compared with the stream's limits as soon as they are read, before anything is
buffered for them; the buffer never holds more than what has arrived. The reader is fed whole or
byte by byte with the same result.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from p2pmoe.errors import MalformedMessage

PREFIX = struct.Struct(">II")
MAX_HEADER_BYTES = 64 * 1024  # a control message
MAX_CHUNK_BYTES = 256 * 1024  # a piece of a tensor


@dataclass(frozen=True, slots=True)
class FrameLimits:
    """What a stream may announce. Bytes."""

    header_bytes: int = MAX_HEADER_BYTES
    payload_bytes: int = MAX_CHUNK_BYTES


HELLO_LIMITS = FrameLimits(header_bytes=1024, payload_bytes=0)  # before the greeting is done
CONTROL_LIMITS = FrameLimits(payload_bytes=MAX_HEADER_BYTES)  # small calls may carry small tensors
BULK_LIMITS = FrameLimits()


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame as it came. `payload` is a view of what was received: copy what must last."""

    header: bytes
    payload: memoryview


def frame_prefix(header_bytes: int, payload_bytes: int) -> bytes:
    """The eight bytes in front of a header and a payload of these lengths."""
    return PREFIX.pack(header_bytes, payload_bytes)


class FrameReader:
    """Cuts a byte stream into frames. After an error it must not be fed again.

    A frame that lies whole in what was received is not copied; one that comes in pieces is copied
    once, into a buffer that grows with the bytes that have come.
    """

    def __init__(self, limits: FrameLimits) -> None:
        self.limits = limits
        self._lengths: tuple[int, int] | None = None
        self._partial = bytearray()

    @property
    def inside_frame(self) -> bool:
        """Whether a part of a frame has come and the rest has not."""
        return self._lengths is not None or len(self._partial) > 0

    def receive_data(self, data: bytes | bytearray) -> list[Frame]:
        """Take the next bytes; return the frames that are complete now.

        Raises `MalformedMessage` with why `frame.*` when a length is beyond the limits.
        """
        frames: list[Frame] = []
        rest = memoryview(data)
        while True:
            size = PREFIX.size if self._lengths is None else sum(self._lengths)
            piece, rest = self._take(rest, size)
            if piece is None:
                return frames
            if self._lengths is None:
                self._lengths = self._check(*PREFIX.unpack(piece))
            else:
                header_bytes, self._lengths = self._lengths[0], None
                frames.append(Frame(bytes(piece[:header_bytes]), piece[header_bytes:]))

    def _take(self, rest: memoryview, size: int) -> tuple[memoryview | None, memoryview]:
        """The next `size` bytes if they have all come, and what is left of `rest`."""
        if not self._partial and len(rest) >= size:
            return rest[:size], rest[size:]
        missing = size - len(self._partial)
        self._partial += rest[:missing]
        if len(self._partial) < size:
            return None, rest[missing:]
        piece, self._partial = memoryview(self._partial), bytearray()
        return piece, rest[missing:]

    def _check(self, header_bytes: int, payload_bytes: int) -> tuple[int, int]:
        if header_bytes == 0:
            raise MalformedMessage("frame.empty_header")
        if header_bytes > self.limits.header_bytes:
            raise MalformedMessage("frame.header_too_long", f"{header_bytes} bytes")
        if payload_bytes > self.limits.payload_bytes:
            raise MalformedMessage("frame.payload_too_long", f"{payload_bytes} bytes")
        return header_bytes, payload_bytes

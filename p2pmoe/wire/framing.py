"""Length-prefixed frames out of a byte stream: a CBOR header and a raw payload, kept apart.

    u32be header length | u32be payload length | header | payload

Lengths are compared with the stream's limits as soon as they are read, before anything is
buffered for them; the buffer never holds more than what has arrived. The reader is fed whole or
byte by byte with the same result.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

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


class Frame(NamedTuple):
    """One frame as it came. `payload` is a view of what was received: copy what must last."""

    header: bytes
    payload: memoryview


def frame_prefix(header_bytes: int, payload_bytes: int) -> bytes:
    """The eight bytes in front of a header and a payload of these lengths."""
    return PREFIX.pack(header_bytes, payload_bytes)


class FrameReader:
    """Cuts a byte stream into frames. After an error it must not be fed again.

    A payload that lies whole in what was received is not copied; a frame that comes in pieces is
    copied once, into a buffer that grows with the bytes that have come.
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
        return list(self.frames(data))

    def frames(self, data: bytes | bytearray) -> Iterator[Frame]:
        """The same, one by one, each cut out when it is asked for.

        All have to be taken before the next bytes, and before `inside_frame` means anything.
        """
        view, size, at = memoryview(data), len(data), 0
        if self._partial or self._lengths:
            whole: list[Frame] = []
            at = self._finish(view, whole)
            yield from whole
        while at + PREFIX.size <= size:
            lengths = PREFIX.unpack_from(view, at)
            self._check(*lengths)
            at += PREFIX.size
            middle = at + lengths[0]
            end = middle + lengths[1]
            if end > size:
                self._lengths = lengths
                break
            yield Frame(bytes(view[at:middle]), view[middle:end])
            at = end
        if at < size:
            self._partial += view[at:]

    def _finish(self, view: memoryview, frames: list[Frame]) -> int:
        """Complete the frame that has begun; how much of `view` that took."""
        at, size = 0, len(view)
        while True:
            begun, lengths = self._partial, self._lengths
            missing = (lengths[0] + lengths[1] if lengths else PREFIX.size) - len(begun)
            begun += view[at : at + missing]
            at += missing
            if at > size:
                return size
            self._partial = bytearray()
            if lengths:
                self._lengths = None
                frames.append(Frame(bytes(begun[: lengths[0]]), memoryview(begun)[lengths[0] :]))
                return at
            self._lengths = PREFIX.unpack(begun)
            self._check(*self._lengths)

    def _check(self, header_bytes: int, payload_bytes: int) -> None:
        if header_bytes == 0:
            raise MalformedMessage("frame.empty_header")
        if header_bytes > self.limits.header_bytes:
            raise MalformedMessage("frame.header_too_long", f"{header_bytes} bytes")
        if payload_bytes > self.limits.payload_bytes:
            raise MalformedMessage("frame.payload_too_long", f"{payload_bytes} bytes")

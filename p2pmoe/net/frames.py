"""Frames on a channel: what the writer sends and the reader receives, and when the stream is lost.

Rules: one task reads and one writes. A send that was cancelled has perhaps left half a frame:
nothing may be sent after it.
"""

from __future__ import annotations

from collections.abc import Iterable

import trio

from p2pmoe.errors import ConnectionLost
from p2pmoe.net.outbox import OutFrame
from p2pmoe.net.transport import Channel
from p2pmoe.wire.framing import Frame, FrameLimits, FrameReader, frame_prefix

READ_BYTES = 1024 * 1024  # asked for in one read; a guess, measured with SSLStream
AT_ONCE = 32  # frames taken before others have their turn, about 1 ms; a guess
END_OF_STREAM = "the other side closed the connection"


class FrameStream:
    """A channel as a stream of frames."""

    def __init__(self, channel: Channel, limits: FrameLimits) -> None:
        self.channel = channel
        self._stream = channel.stream
        self._reader = FrameReader(limits)
        self._ready: list[Frame] = []
        self.whole = True  # whether all that was to be sent has been, frame by frame
        self.received_bytes = 0

    @property
    def inside_frame(self) -> bool:
        """Whether the last read ended inside a frame."""
        return self._reader.inside_frame

    def widen(self, limits: FrameLimits) -> None:
        """What comes from now on may be as long as this."""
        self._reader.limits = limits

    async def first(self) -> Frame:
        """Wait for one frame; those that came behind it are received next."""
        while not (frames := await self.receive()):
            pass
        frame, *self._ready = frames
        return frame

    async def receive(self) -> list[Frame]:
        """Wait for frames; none when one has just begun, so that its progress can be watched.

        Raises `ConnectionLost` at the stream's end, and `MalformedMessage` with why `frame.*`.
        """
        if self._ready:
            await trio.lowlevel.checkpoint()
            return self._some(self._ready)
        while True:
            begun = self._reader.inside_frame
            try:
                data = await self._stream.receive_some(READ_BYTES)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise ConnectionLost(_reason(error)) from error
            if not data:
                raise ConnectionLost(END_OF_STREAM)
            self.received_bytes += len(data)
            frames = self._reader.receive_data(data)
            if frames or not begun:
                return self._some(frames)

    def _some(self, frames: list[Frame]) -> list[Frame]:
        """The first of these frames; the others are received next."""
        self._ready = frames[AT_ONCE:]
        return frames[:AT_ONCE]

    async def send(self, frames: Iterable[OutFrame]) -> None:
        """Send frames in one go; raises `ConnectionLost` when the stream is broken."""
        pieces: list[bytes | memoryview] = []
        for frame in frames:
            pieces += (frame_prefix(len(frame.header), frame.size), frame.header, *frame.payload)
        if not self.whole:
            raise ConnectionLost("a send was cut short")
        self.whole = False
        try:
            await self._stream.send_all(b"".join(pieces))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise ConnectionLost(_reason(error)) from error
        self.whole = True

    async def close(self) -> None:
        """Close the stream at once."""
        await trio.aclose_forcefully(self._stream)


def _reason(error: Exception) -> str:
    cause = error.__cause__
    if isinstance(cause, OSError) and cause.strerror:
        return f"the connection broke: {cause.strerror.lower()}"
    return "the connection broke"

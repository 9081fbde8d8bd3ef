"""Frames on a channel: what the writer sends and the reader receives, and when the stream is lost.

Rules: one task reads and one writes. A send that was cancelled has perhaps left half a frame:
nothing may be sent after it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import trio

from p2pmoe.errors import ConnectionLost
from p2pmoe.net.outbox import OutFrame
from p2pmoe.net.secure import READ_BYTES, SecureStream
from p2pmoe.net.transport import Channel
from p2pmoe.wire.framing import Frame, FrameLimits, FrameReader, frame_prefix

AT_ONCE = 4  # frames taken before others have their turn, about 0.1 ms; measured under attack
END_OF_STREAM = "the other side closed the connection"


class FrameStream:
    """A channel as a stream of frames."""

    def __init__(self, channel: Channel, limits: FrameLimits) -> None:
        self.channel = channel
        self._stream = channel.stream
        self._reader = FrameReader(limits)
        self._cut: Iterator[Frame] = iter(())  # out of what was read
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
        while not (frames := await self.receive(1)):
            pass
        return frames[0]

    async def receive(self, most: int = AT_ONCE) -> list[Frame]:
        """Wait for frames, `most` at once; none when one has begun: its progress is to be watched.

        Raises `ConnectionLost` at the stream's end, and `MalformedMessage` with why `frame.*`.
        """
        if frames := list(islice(self._cut, most)):
            await trio.lowlevel.checkpoint()
            return frames
        while True:
            begun = self._reader.inside_frame
            with _lost_if_broken:
                data = await self._stream.receive_some(READ_BYTES)
            if not data:
                raise ConnectionLost(END_OF_STREAM)
            self.received_bytes += len(data)
            self._cut = self._reader.frames(data)
            frames = list(islice(self._cut, most))
            if frames or not begun:
                return frames

    async def send(self, frames: Iterable[OutFrame]) -> None:
        """Send frames in one go; raises `ConnectionLost` when the stream is broken."""
        if self.start(frames):
            await trio.lowlevel.checkpoint()
        else:
            await self.finish()

    def start(self, frames: Iterable[OutFrame]) -> bool:
        """Send frames as far as the stream takes them now; whether that was all.

        If not, `finish` must follow. Raises as `send`.
        """
        pieces: list[bytes | memoryview] = []
        for frame in frames:
            pieces += (frame_prefix(len(frame.header), frame.size), frame.header, *frame.payload)
        if not self.whole:
            raise ConnectionLost("a send was cut short")
        self.whole = False
        if isinstance(self._stream, SecureStream):
            with _lost_if_broken:
                self.whole = self._stream.start(pieces)
        else:
            self._unsent = b"".join(pieces)
        return self.whole

    async def finish(self) -> None:
        """Send what `start` has left; raises as `send`."""
        with _lost_if_broken:
            if isinstance(self._stream, SecureStream):
                await self._stream.finish()
            else:
                await self._stream.send_all(self._unsent)
        self.whole = True

    async def close(self) -> None:
        """Close the stream at once."""
        await trio.aclose_forcefully(self._stream)


class _LostIfBroken:
    """What the stream raises inside is a `ConnectionLost`. A third of a generator's cost."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, trio.BrokenResourceError | trio.ClosedResourceError):
            raise ConnectionLost(_reason(error)) from error


_lost_if_broken = _LostIfBroken()


def _reason(error: Exception) -> str:
    cause = error.__cause__
    if isinstance(cause, OSError) and cause.strerror:
        return f"the connection broke: {cause.strerror.lower()}"
    return "the connection broke"

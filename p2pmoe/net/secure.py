"""A byte stream inside TLS, after the handshake: few turns of the loop, and full records.

`trio.SSLStream` shakes hands; then its OpenSSL object is worked here. What differs: a read takes
all records that have come and not one, what the socket takes at once is not waited for, and no
lock is taken.

Rules: one task reads and one sends. A send that was cancelled has perhaps sent a part. Reading
sends nothing: what OpenSSL has to say by itself (its answer to a key update) goes in front of the
next send, and a peer that makes it say too much is cut.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterable, Iterator

import trio

Buffer = bytes | bytearray | memoryview

READ_BYTES = 256 * 1024  # asked of the socket at once; a guess, a chunk of payload
RECORD_BYTES = 16 * 1024  # the longest record; RFC 8446, section 5.1
UNASKED_BYTES = 16 * 1024  # that OpenSSL may have to say by itself; a guess, 500 key updates


class SecureStream(trio.abc.Stream):
    """What a `trio.SSLStream` has secured. `tls` tells of its version and certificates."""

    def __init__(self, secured: trio.SSLStream[trio.abc.Stream]) -> None:
        self.tls: ssl.SSLObject = secured._ssl_object
        self.transport_stream = secured.transport_stream
        self._incoming, self._outgoing = secured._incoming, secured._outgoing
        # What a server says at the end of its handshake Trio keeps for the first data.
        self._outgoing.write(secured._delayed_outgoing or b"")
        self._socket: trio.socket.SocketType | None = None  # worked directly where that can be done
        if isinstance(self.transport_stream, trio.SocketStream) and hasattr(os, "readv"):
            self._socket = self.transport_stream.socket
        self._unsent = memoryview(b"")
        self._failed: ssl.SSLError | None = None
        self._closed = self._broken = False

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """All that has come, but `max_bytes` at most; empty at the stream's end."""
        if (data := self._decrypted(max_bytes or READ_BYTES)) is not None:
            await trio.lowlevel.checkpoint()
            return data
        while data is None:
            if received := await self._receive():
                self._incoming.write(received)
            else:
                self._incoming.write_eof()
            data = self._decrypted(max_bytes or READ_BYTES)
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send these bytes."""
        await trio.lowlevel.checkpoint_if_cancelled()
        if self.start([data]):
            await trio.lowlevel.cancel_shielded_checkpoint()
        else:
            await self.finish()

    def start(self, pieces: Iterable[Buffer]) -> bool:
        """Send pieces one behind the other, in full records, as far as the socket takes them now.

        Returns whether that was all; `finish` sends the rest.
        """
        self._check()
        try:
            for part in full_records(pieces):
                self.tls.write(part)
        except ssl.SSLError as error:
            raise self._break() from error
        self._unsent = memoryview(self._outgoing.read())
        return self._socket is not None and self._send_now(self._socket)

    async def finish(self) -> None:
        """Send what `start` has left."""
        if self._socket is None:
            await self.transport_stream.send_all(self._unsent)
            return
        while not self._send_now(self._socket):
            await trio.lowlevel.wait_writable(self._socket)

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until the transport takes bytes."""
        self._check()
        await self.transport_stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        """Close the transport. TLS says no goodbye: frames have their own."""
        self._closed = True
        await self.transport_stream.aclose()

    # -------------------------------------------------------------- in steps
    def _decrypted(self, most: int) -> bytes | None:
        """What has come of the other side's data; `None` for nothing yet, empty at its end."""
        self._check()
        incoming, tls, parts = self._incoming, self.tls, list[bytes]()
        try:
            while most > 0 and (incoming.pending or incoming.eof or tls.pending()):
                parts.append(tls.read(min(most, RECORD_BYTES)))
                most -= len(parts[-1])
                if not parts[-1]:
                    break
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLEOFError:
            parts.append(b"")
        except ssl.SSLError as error:
            self._failed = error
        if self._failed and not parts:  # what came before it is taken first
            raise self._break() from self._failed
        if self._outgoing.pending > UNASKED_BYTES:
            raise self._break()
        return b"".join(parts) if parts else None

    async def _receive(self) -> bytes | bytearray:
        """More of what the transport carries; empty at its end."""
        if self._socket is None:
            return await self.transport_stream.receive_some(READ_BYTES)
        while True:
            await trio.lowlevel.wait_readable(self._socket)
            try:
                return os.read(self._socket.fileno(), READ_BYTES)
            except BlockingIOError:
                continue
            except OSError as error:
                raise trio.BrokenResourceError from error

    def _send_now(self, socket: trio.socket.SocketType) -> bool:
        """Send what the socket takes; whether that was all."""
        try:
            while self._unsent:
                self._unsent = self._unsent[os.write(socket.fileno(), self._unsent) :]
        except BlockingIOError:
            return False
        except OSError as error:
            raise trio.BrokenResourceError from error
        return True

    def _check(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError
        if self._broken:
            raise trio.BrokenResourceError

    def _break(self) -> trio.BrokenResourceError:
        self._broken = True
        return trio.BrokenResourceError()


def full_records(pieces: Iterable[Buffer]) -> Iterator[Buffer]:
    """The same bytes, cut so that each record but the last is full; long pieces are not copied."""
    short: list[Buffer] = []
    size = 0
    for piece in pieces:
        missing = RECORD_BYTES - size
        if len(piece) >= missing:
            yield b"".join([*short, piece[:missing]])
            end = len(piece) - (len(piece) - missing) % RECORD_BYTES
            if end > missing:
                yield piece[missing:end]
            short, size, piece = [], 0, piece[end:]
        short.append(piece)
        size += len(piece)
    if size:
        yield b"".join(short)

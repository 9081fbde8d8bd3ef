"""Bytes through TLS after the handshake: all that came in one read, full records, no wait."""

from __future__ import annotations

import os
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from p2pmoe.net.secure import RECORD_BYTES, UNASKED_BYTES, SecureStream, full_records
from p2pmoe.net.tls import Tls
from p2pmoe.net.transport import Channel
from p2pmoe.wire.address import Address
from tests.net.loopback import WITHIN, bob, dialled, echoed
from tests.net.strangers import ALICE, BOB, credentials, met

ADDRESS = Address("bob", 4747)
HEADER = 5  # bytes before each record; RFC 8446, section 5.1


async def secured() -> tuple[SecureStream, SecureStream]:
    """Two ends in memory."""
    here, there = trio.testing.memory_stream_pair()
    ends = await met(
        Tls(credentials(ALICE)).dialled(here, ADDRESS, None),
        Tls(credentials(BOB)).accepted(there, ADDRESS),
    )
    streams = [end.stream for end in ends if isinstance(end, Channel)]
    assert all(isinstance(stream, SecureStream) for stream in streams)
    return streams[0], streams[1]


async def read(stream: SecureStream, size: int) -> bytes:
    got = b""
    while len(got) < size:
        got += await stream.receive_some()
    return got


# ------------------------------------------------------------------ in memory
@given(st.lists(st.sampled_from([0, 1, 100, RECORD_BYTES - 1, RECORD_BYTES, 50_000]), max_size=6))
def test_pieces_are_cut_into_full_records_and_nothing_is_lost(sizes: list[int]) -> None:
    pieces = [bytes([at]) * size for at, size in enumerate(sizes, 1)]
    parts = [bytes(part) for part in full_records(map(memoryview, pieces))]
    assert b"".join(parts) == b"".join(pieces)
    assert all(parts)
    assert all(len(part) % RECORD_BYTES == 0 for part in parts[:-1])


def test_a_long_piece_is_sent_from_where_it_lies() -> None:
    tensor = memoryview(bytes(20 * RECORD_BYTES))
    parts = list(full_records([b"header", tensor]))
    assert len(parts[1]) == 19 * RECORD_BYTES
    assert isinstance(parts[1], memoryview)
    assert parts[1].obj is tensor.obj


async def test_one_read_takes_all_records_that_have_come() -> None:
    mine, theirs = await secured()
    for byte in b"abc":
        await mine.send_all(bytes([byte]) * RECORD_BYTES)
    data = await theirs.receive_some()
    assert data == b"a" * RECORD_BYTES + b"b" * RECORD_BYTES + b"c" * RECORD_BYTES


async def test_a_read_may_ask_for_less_and_the_rest_is_read_next() -> None:
    mine, theirs = await secured()
    await mine.send_all(b"0123456789")
    assert await theirs.receive_some(4) == b"0123"
    assert await theirs.receive_some(100) == b"456789"


async def test_small_pieces_travel_in_one_record() -> None:
    mine, theirs = await secured()
    assert not mine.start([b"prefix", b"header", b"payload"])
    sent = bytes(mine._unsent)
    await mine.finish()
    assert await theirs.receive_some() == b"prefixheaderpayload"
    assert len(sent) == HEADER + int.from_bytes(sent[3:HEADER], "big")


async def test_nothing_is_sent_for_nothing() -> None:
    mine, theirs = await secured()
    await mine.send_all(b"")
    await mine.wait_send_all_might_not_block()
    await mine.send_all(b"x")
    assert await theirs.receive_some() == b"x"


async def test_the_end_is_empty_again_and_again_and_after_what_came_before_it() -> None:
    mine, theirs = await secured()
    await mine.send_all(b"last words")
    await mine.aclose()
    assert await theirs.receive_some() == b"last words"
    assert await theirs.receive_some() == b""
    assert await theirs.receive_some() == b""


async def test_what_no_key_has_sealed_breaks_the_stream_after_what_came_before_it() -> None:
    mine, theirs = await secured()
    await mine.send_all(b"honest")
    await mine.transport_stream.send_all(b"\x17\x03\x03\x00\x20" + bytes(32))
    assert await theirs.receive_some() == b"honest"
    with pytest.raises(trio.BrokenResourceError) as caught:
        await theirs.receive_some()
    assert isinstance(caught.value.__cause__, ssl.SSLError)
    for _ in range(2):
        with pytest.raises(trio.BrokenResourceError):
            await theirs.receive_some()
        with pytest.raises(trio.BrokenResourceError):
            await theirs.send_all(b"x")


async def test_who_makes_the_other_side_say_too_much_by_itself_is_cut() -> None:
    mine, theirs = await secured()
    await mine.send_all(b"x")
    theirs._outgoing.write(bytes(UNASKED_BYTES))  # as answers to key updates would pile up
    assert await theirs.receive_some() == b"x"
    await mine.send_all(b"x")
    theirs._outgoing.write(b"y")
    with pytest.raises(trio.BrokenResourceError):
        await theirs.receive_some()


async def test_a_closed_stream_says_so() -> None:
    mine, _ = await secured()
    await mine.aclose()
    for use in (mine.receive_some(), mine.send_all(b"x"), mine.wait_send_all_might_not_block()):
        with pytest.raises(trio.ClosedResourceError):
            await use


async def test_a_read_that_is_cancelled_loses_nothing() -> None:
    mine, theirs = await secured()
    with trio.move_on_after(0.0) as scope:
        await theirs.receive_some()
    assert scope.cancelled_caught
    await mine.send_all(b"later")
    with trio.move_on_after(0.0) as scope:
        await theirs.receive_some()
    assert await theirs.receive_some() == b"later"


# ------------------------------------------------------------------ on sockets
async def test_a_small_send_is_one_write_and_waits_for_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with bob() as server, dialled(server.address) as channel:
        stream = channel.stream
        assert isinstance(stream, SecureStream)
        writes, write = [], os.write
        monkeypatch.setattr(os, "write", lambda fd, data: writes.append(fd) or write(fd, data))
        assert stream.start([b"header", bytes(4096)])
        assert writes == [channel.stream.transport_stream.socket.fileno()]
        with trio.fail_after(WITHIN):
            assert await read(stream, 6 + 4096) == b"header" + bytes(4096)


async def test_what_the_socket_does_not_take_at_once_follows() -> None:
    data = os.urandom(1024) * 20_000  # 20 MB, more than the buffers of both sockets
    async with bob() as server, dialled(server.address) as channel:
        stream = channel.stream
        assert isinstance(stream, SecureStream)
        with trio.fail_after(WITHIN):
            async with trio.open_nursery() as both:
                assert not stream.start([data])
                both.start_soon(stream.finish)
                assert await read(stream, len(data)) == data


async def hear(stream: SecureStream) -> None:
    while True:
        await stream.receive_some()


async def speak(stream: SecureStream) -> None:
    while True:
        await stream.send_all(b"x")


@pytest.mark.parametrize("use", [hear, speak])
async def test_a_connection_that_was_reset_breaks_the_stream_and_says_why(
    use: Callable[[SecureStream], Awaitable[None]],
) -> None:
    async with bob() as server, dialled(server.address) as channel:
        await echoed(channel)
        far = server.channels[0].stream.transport_stream
        far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await far.aclose()
        with trio.fail_after(WITHIN), pytest.raises(trio.BrokenResourceError) as caught:
            await use(channel.stream)
        assert isinstance(caught.value.__cause__, OSError)

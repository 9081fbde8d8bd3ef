"""The fault proxy does what its faults say, in memory under a virtual clock, and over TCP."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

import pytest
import trio
from trio.testing import memory_stream_pair

from p2pmoe.testing.proxy import PIECE, PIECES, Fault, FaultProxy, open_proxy
from p2pmoe.wire.address import Address

NOWHERE = Address("127.0.0.1", 1)
Stream = trio.StapledStream
BROKEN = (trio.BrokenResourceError, trio.ClosedResourceError)


@dataclass
class Line:
    """A proxy between two ends in memory."""

    proxy: FaultProxy
    near: Stream
    far: Stream
    done: trio.Event


@asynccontextmanager
async def line(**there: float | bool) -> AsyncIterator[Line]:
    """One connection that is carried; faults are of the way there."""
    proxy = FaultProxy(NOWHERE, random.Random(1))
    proxy.set(there=Fault(**there))
    near, near_inside = memory_stream_pair()
    far, far_inside = memory_stream_pair()
    one = Line(proxy, near, far, trio.Event())

    async def carry() -> None:
        await proxy.carry(near_inside, far_inside)
        one.done.set()

    async with trio.open_nursery() as lines:
        lines.start_soon(carry)
        yield one
        lines.cancel_scope.cancel()


async def received(stream: Stream, size: int) -> bytes:
    """So many bytes, or what comes before the end."""
    data = b""
    while len(data) < size and (more := await stream.receive_some(size - len(data))):
        data += more
    return data


async def seconds_for(stream: Stream, size: int) -> float:
    began = trio.current_time()
    assert len(await received(stream, size)) == size
    return trio.current_time() - began


async def nothing_comes(stream: Stream, seconds: float) -> bool:
    with trio.move_on_after(seconds) as waiting:
        await stream.receive_some(1)
    return waiting.cancelled_caught


# ------------------------------------------------------------------ in memory
async def test_a_clear_line_carries_bytes_both_ways_and_both_ends(autojump_clock: object) -> None:
    async with line() as one:
        await one.near.send_all(b"there")
        assert await received(one.far, 5) == b"there"
        await one.far.send_all(b"back")
        assert await received(one.near, 4) == b"back"
        await one.near.send_eof()
        assert await one.far.receive_some(1) == b""
        await one.far.send_all(b"still")
        assert await received(one.near, 5) == b"still"
        await one.far.send_eof()
        await one.done.wait()
        assert one.proxy.carried == (5, 9)
        assert one.proxy.connections == 0


async def test_a_delay_holds_up_one_way_only_and_not_the_pieces_behind(
    autojump_clock: object,
) -> None:
    async with line(delay=0.5) as one:
        for _ in range(3):
            await one.near.send_all(b"x" * PIECE)
        assert await seconds_for(one.far, 3 * PIECE) == 0.5
        await one.far.send_all(b"y")
        assert await seconds_for(one.near, 1) == 0.0


async def test_jitter_varies_and_keeps_the_order(autojump_clock: object) -> None:
    async with line(delay=0.1, jitter=0.4) as one:
        sent = [bytes([n]) * PIECE for n in range(50)]
        arrived: list[float] = []

        async def send() -> None:
            for piece in sent:
                await one.near.send_all(piece)
                await trio.sleep(0.05)

        async with trio.open_nursery() as senders:
            senders.start_soon(send)
            for number, piece in enumerate(sent):
                assert await received(one.far, PIECE) == piece
                arrived.append(trio.current_time() - 0.05 * number)
        assert 0.1 <= min(arrived) < 0.2
        assert 0.3 < max(arrived) <= 0.5


async def test_bandwidth_is_shared_by_all_connections(autojump_clock: object) -> None:
    async with line(bandwidth=PIECE) as one:
        other, other_inside = memory_stream_pair()
        end, end_inside = memory_stream_pair()
        async with trio.open_nursery() as lines:
            lines.start_soon(one.proxy.carry, other_inside, end_inside)
            await one.near.send_all(bytes(5 * PIECE))
            await other.send_all(bytes(5 * PIECE))
            began = trio.current_time()
            async with trio.open_nursery() as readers:
                readers.start_soon(received, one.far, 5 * PIECE)
                readers.start_soon(received, end, 5 * PIECE)
            assert trio.current_time() - began == pytest.approx(10)
            lines.cancel_scope.cancel()


async def test_a_connection_is_cut_after_so_many_bytes(autojump_clock: object) -> None:
    async with line(cut_after=PIECE + 7) as one:
        await one.near.send_all(bytes(2 * PIECE))
        assert len(await received(one.far, 2 * PIECE)) == PIECE + 7
        await one.done.wait()
        assert await one.near.receive_some(1) == b""


async def test_cut_ends_what_is_carried_now(autojump_clock: object) -> None:
    async with line(delay=5.0) as one:
        await one.near.send_all(b"on its way")
        await trio.sleep(1)
        assert one.proxy.cut() == 1
        await one.done.wait()
        assert await one.far.receive_some(1) == b""
        assert one.proxy.cut() == 0


async def test_a_stalled_way_carries_nothing_and_goes_on_where_it_was(
    autojump_clock: object,
) -> None:
    async with line(stalled=True) as one:
        await one.near.send_all(b"patience")
        assert await nothing_comes(one.far, 1000)
        await one.far.send_all(b"y")  # the other way is not stalled
        assert await received(one.near, 1) == b"y"
        one.proxy.set()
        assert await received(one.far, 8) == b"patience"
        one.proxy.set(there=Fault(stalled=True))
        await one.near.send_all(b"more")
        assert await nothing_comes(one.far, 1000)


async def test_garbage_flips_bits_of_some_pieces_and_keeps_their_length(
    autojump_clock: object,
) -> None:
    async with line(garbage=0.5) as one:
        spoiled = 0
        for _ in range(200):
            await one.near.send_all(bytes(100))
            data = await received(one.far, 100)
            flipped = int.from_bytes(data, "big").bit_count()
            assert flipped in {0, 1}
            spoiled += flipped
        assert 70 < spoiled < 130


async def test_two_runs_of_one_seed_are_the_same(autojump_clock: object) -> None:
    async def run() -> list[tuple[float, bytes]]:
        seen = []
        async with line(jitter=1.0, garbage=0.3) as one:
            began = trio.current_time()
            for _ in range(20):
                await one.near.send_all(b"again")
                seen.append((round(trio.current_time() - began, 9), await received(one.far, 5)))
        return seen

    assert await run() == await run()


async def test_a_reader_that_stops_stops_the_writer(autojump_clock: object) -> None:
    proxy = FaultProxy(NOWHERE, random.Random(1))
    proxy.set(there=Fault(delay=1e6))
    taken = 0

    class Endless(trio.abc.HalfCloseableStream):
        """Always has more to say."""

        async def receive_some(self, max_bytes: int | None = None) -> bytes:
            nonlocal taken
            await trio.lowlevel.checkpoint()
            taken += PIECE
            return bytes(PIECE)

        async def send_all(self, data: bytes) -> None: ...
        async def send_eof(self) -> None: ...
        async def wait_send_all_might_not_block(self) -> None: ...
        async def aclose(self) -> None: ...

    quiet, quiet_inside = memory_stream_pair()
    with trio.move_on_after(1000):
        await proxy.carry(Endless(), quiet_inside)
    assert taken <= (PIECES + 3) * PIECE
    assert await quiet.receive_some(1) == b""


async def test_one_side_that_breaks_ends_the_other(autojump_clock: object) -> None:
    async with line() as one:
        await one.far.aclose()
        await one.near.send_all(b"x")
        await one.done.wait()
        with pytest.raises(BROKEN):
            await one.near.send_all(b"x")


# ------------------------------------------------------------------ over TCP
@asynccontextmanager
async def echo() -> AsyncIterator[Address]:
    """Something that says back what it hears."""

    async def answer(stream: trio.SocketStream) -> None:
        try:
            async for data in stream:
                await stream.send_all(data)
        except BROKEN:
            pass

    async with trio.open_nursery() as servers:
        serve = partial(trio.serve_tcp, answer, 0, host="127.0.0.1")
        [listener] = await servers.start(serve)
        yield Address("127.0.0.1", listener.socket.getsockname()[1])
        servers.cancel_scope.cancel()


async def dial(proxy: FaultProxy) -> trio.SocketStream:
    return await trio.open_tcp_stream(proxy.address.host, proxy.address.port)


async def test_real_connections_are_carried_cut_and_refused_on_one_address() -> None:
    with trio.fail_after(30):
        async with echo() as target, open_proxy(target) as proxy:
            address = proxy.address
            stream = await dial(proxy)
            await stream.send_all(b"hello")
            assert await received(stream, 5) == b"hello"
            assert proxy.cut() == 1
            with pytest.raises(trio.BrokenResourceError):
                await stream.receive_some(1)
            await stream.aclose()
            proxy.refuse()
            while True:  # until the listener is closed
                try:
                    await trio.aclose_forcefully(await dial(proxy))
                except OSError:
                    break
            proxy.refuse(refusing=False)
            while True:
                try:
                    stream = await dial(proxy)
                except OSError:
                    await trio.lowlevel.checkpoint()
                else:
                    break
            await stream.send_all(b"again")
            assert await received(stream, 5) == b"again"
            await stream.send_eof()
            assert await stream.receive_some(1) == b""
            await stream.aclose()
            assert proxy.address == address


async def test_where_nobody_listens_the_line_breaks_and_another_target_may_be_given() -> None:
    with trio.fail_after(30):
        async with echo() as target, open_proxy(NOWHERE) as proxy:
            async with await dial(proxy) as stream:
                with pytest.raises(trio.BrokenResourceError):
                    await stream.receive_some(1)
            proxy.target = target
            async with await dial(proxy) as stream:
                await stream.send_all(b"x")
                assert await received(stream, 1) == b"x"


async def test_nothing_is_left_when_the_block_ends() -> None:
    with trio.fail_after(30):
        async with echo() as target:
            async with open_proxy(target) as proxy:
                proxy.set(back=Fault(stalled=True))
                stream = await dial(proxy)
                await stream.send_all(b"x")
                while not proxy.connections:
                    await trio.lowlevel.checkpoint()
            with pytest.raises(trio.BrokenResourceError):
                await stream.receive_some(1)
            with pytest.raises(OSError, match="connect"):
                await dial(proxy)
            assert proxy.connections == 0
            await stream.aclose()


async def test_no_more_connections_are_carried_than_memory_is_meant_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("p2pmoe.testing.proxy.CONNECTIONS", 1)
    with trio.fail_after(30):
        async with echo() as target, open_proxy(target) as proxy, await dial(proxy) as stream:
            await stream.send_all(b"x")
            assert await received(stream, 1) == b"x"
            async with await dial(proxy) as other:
                with pytest.raises(trio.BrokenResourceError):
                    await other.receive_some(1)
            assert proxy.connections == 1

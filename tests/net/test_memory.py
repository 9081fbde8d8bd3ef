"""The network in memory: its lines, and what goes wrong on them, under a virtual clock."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from p2pmoe.errors import AddressInUse, ConfigurationError, NotAllowed, PeerUnreachable
from p2pmoe.net.transport import Channel, Transport
from p2pmoe.testing.memory import BACKLOG, BUFFER_BYTES, Line, MemoryNetwork
from p2pmoe.wire.address import Address
from tests.net.pools import KEYS

A, B = KEYS[0], KEYS[1]
AT_B = Address("b", 4747)


class Listener:
    """A peer that keeps the channels that come in."""

    def __init__(self) -> None:
        self._send, self._receive = trio.open_memory_channel[Channel](10)
        self.address: Address | None = None

    async def accepted(self, channel: Channel) -> None:
        await self._send.send(channel)
        await trio.sleep_forever()

    async def next(self) -> Channel:
        return await self._receive.receive()


@asynccontextmanager
async def listening(
    network: MemoryNetwork, *, address: Address = AT_B, keys=B
) -> AsyncIterator[Listener]:
    listener = Listener()
    async with trio.open_nursery() as serving:
        transport: Transport = network.transport(keys, "b")
        listener.address = await serving.start(transport.serve, address, listener.accepted)
        yield listener
        serving.cancel_scope.cancel()


@asynccontextmanager
async def connected(network: MemoryNetwork) -> AsyncIterator[tuple[Channel, Channel]]:
    """Both ends of a connection that a dialled."""
    async with listening(network) as listener:
        near = await network.transport(A, "a").dial(AT_B, None)
        yield near, await listener.next()


def network(line: Line | None = None, seed: int = 1) -> MemoryNetwork:
    return MemoryNetwork(random.Random(seed), line)


# ------------------------------------------------------------------ dialling
async def test_each_side_knows_who_the_other_is(autojump_clock):
    async with connected(network()) as (near, far):
        assert (near.peer, near.public_key) == (B.peer_id, B.public_key)
        assert (far.peer, far.public_key) == (A.peer_id, A.public_key)
        assert near.remote == AT_B
        assert far.remote.host == "a"


async def test_a_dial_takes_the_round_trips_of_tcp_and_tls(autojump_clock):
    async with connected(network(Line(latency=0.1))):
        assert trio.current_time() == pytest.approx(0.4)


async def test_a_port_that_nobody_listens_on_refuses(autojump_clock):
    with pytest.raises(PeerUnreachable, match="b:4747: connect: connection refused") as caught:
        await network().transport(A, "a").dial(AT_B, None)
    assert (caught.value.stage, caught.value.address) == ("connect", "b:4747")


async def test_another_peer_than_the_one_dialled_is_not_let_through(autojump_clock):
    net = network()
    dialler = net.transport(A, "a")
    async with listening(net):
        for address, expect in (
            (AT_B, A.peer_id),
            (AT_B, KEYS[5].peer_id),
            (Address("b", 4747, "00000000"), None),
        ):
            with pytest.raises(NotAllowed) as caught:
                await dialler.dial(address, expect)
            assert caught.value.stage == "tls"
        await dialler.dial(Address("b", 4747, B.peer_id.hex), B.peer_id)


async def test_a_peer_does_not_talk_to_itself(autojump_clock):
    net = network()
    async with listening(net, keys=A):
        with pytest.raises(NotAllowed, match="this peer itself"):
            await net.transport(A, "a").dial(AT_B, None)


async def test_an_address_is_listened_on_once(autojump_clock):
    net = network()
    async with listening(net):
        with pytest.raises(AddressInUse):
            await net.transport(A, "b").serve(AT_B, None)
    async with listening(net):
        pass
    with pytest.raises(ConfigurationError):
        await net.transport(A, "a").serve(AT_B, None)


async def test_port_zero_is_one_that_is_free(autojump_clock):
    net = network()
    any_port = Address("0.0.0.0", 0)
    async with (
        listening(net, address=any_port) as one,
        listening(net, address=any_port, keys=KEYS[2]) as two,
    ):
        assert one.address.host == two.address.host == "b"
        assert one.address.port != two.address.port
        assert (await net.transport(A, "a").dial(two.address, None)).peer == KEYS[2].peer_id


async def test_a_listener_that_takes_nobody_refuses_in_the_end(autojump_clock):
    net = network()
    dialler = net.transport(A, "a")
    with net.listening(B, AT_B):
        for _ in range(BACKLOG):
            await dialler.dial(AT_B, None)
        with pytest.raises(PeerUnreachable, match="refused"):
            await dialler.dial(AT_B, None)


# ------------------------------------------------------------------ bytes
async def test_bytes_come_in_order_however_they_are_read(autojump_clock):
    async with connected(network(Line(latency=0.1, jitter=0.3))) as (near, far):
        for n in range(50):
            await near.stream.send_all(bytes([n]) * 10)
        got = b""
        while len(got) < 500:
            got += await far.stream.receive_some(7)
        assert got == b"".join(bytes([n]) * 10 for n in range(50))


async def test_latency_delays_and_bandwidth_spreads(autojump_clock):
    async with connected(network(Line(latency=0.1, bandwidth=1000))) as (near, far):
        begun = trio.current_time()
        await near.stream.send_all(bytes(500))
        await near.stream.send_all(b"x")
        await far.stream.receive_some()
        assert trio.current_time() - begun == pytest.approx(0.6)
        await far.stream.receive_some()
        assert trio.current_time() - begun == pytest.approx(0.601)


async def test_a_line_may_be_unlike_the_others(autojump_clock):
    net = network()
    net.set_line("a", "b", Line(latency=1.0))
    assert net.line("b", "a").latency == 1.0
    assert net.line("a", "c").latency == 0.0


async def test_the_same_seed_gives_the_same_network(autojump_clock):
    times = []
    for _ in range(2):
        begun = trio.current_time()
        async with connected(network(Line(jitter=1.0), seed=7)) as (near, far):
            await near.stream.send_all(b"x")
            await far.stream.receive_some()
            times.append(trio.current_time() - begun)
    assert times[0] == pytest.approx(times[1])


async def test_a_reader_that_stops_stops_the_writer(autojump_clock):
    async with connected(network()) as (near, far):
        with trio.move_on_after(60) as sending:
            await near.stream.send_all(bytes(BUFFER_BYTES + 1))
        assert sending.cancelled_caught
        with trio.move_on_after(60) as waiting:
            await near.stream.wait_send_all_might_not_block()
        assert waiting.cancelled_caught
        assert len(await far.stream.receive_some()) == BUFFER_BYTES
        await near.stream.wait_send_all_might_not_block()
        await near.stream.send_all(b"")


async def test_a_stream_has_one_reader_and_one_writer(autojump_clock):
    async with connected(network()) as (near, _), trio.open_nursery() as both:
        both.start_soon(near.stream.receive_some)
        both.start_soon(near.stream.send_all, bytes(2 * BUFFER_BYTES))
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await near.stream.receive_some()
        with pytest.raises(trio.BusyResourceError):
            await near.stream.send_all(b"x")
        both.cancel_scope.cancel()


# ------------------------------------------------------------------ ends
async def test_closing_is_seen_behind_what_was_sent(autojump_clock):
    async with connected(network(Line(latency=0.1))) as (near, far):
        await near.stream.send_all(b"last words")
        await near.stream.aclose()
        await near.stream.aclose()
        assert await far.stream.receive_some() == b"last words"
        assert await far.stream.receive_some() == b""
        assert await far.stream.receive_some() == b""
        with pytest.raises(trio.BrokenResourceError):
            await far.stream.send_all(b"x")
        with pytest.raises(trio.ClosedResourceError):
            await near.stream.send_all(b"x")
        with pytest.raises(trio.ClosedResourceError):
            await near.stream.receive_some()
        await far.stream.aclose()


async def test_cutting_breaks_both_ends_of_what_is_between_two_hosts(autojump_clock):
    net = network()
    async with connected(net) as (near, far):
        await near.stream.send_all(b"lost")
        assert net.cut("a", "c") == 0
        assert net.cut("b", "a") == 1
        assert net.cut("a", "b") == 0
        for channel in (near, far):
            with pytest.raises(trio.BrokenResourceError):
                await channel.stream.receive_some()
            with pytest.raises(trio.BrokenResourceError):
                await channel.stream.send_all(b"x")


async def test_a_connection_can_break_at_a_byte(autojump_clock):
    net = network()
    net.break_after("a", "b", 10)
    async with connected(net) as (near, far):
        await near.stream.send_all(b"123456789")
        with pytest.raises(trio.BrokenResourceError):
            await near.stream.send_all(b"0abc")
        got = await far.stream.receive_some() + await far.stream.receive_some()
        assert got == b"1234567890"
        with pytest.raises(trio.BrokenResourceError):
            await far.stream.receive_some()
    net.break_after("a", "b", None)
    async with connected(net) as (near, far):
        await near.stream.send_all(bytes(100))


async def test_parted_hosts_hear_each_other_again_after_healing(autojump_clock):
    net = network()
    async with connected(net) as (near, far):
        net.partition(["a"], ["b", "c"])
        assert net.parted("a", "b")
        assert net.parted("a", "elsewhere")
        assert not net.parted("b", "c")
        await near.stream.send_all(b"later")
        with trio.move_on_after(100) as waiting:
            await far.stream.receive_some()
        assert waiting.cancelled_caught
        async with trio.open_nursery() as healing:
            healing.start_soon(_heal_in, 7.0, net)
            assert await far.stream.receive_some() == b"later"
        assert trio.current_time() == pytest.approx(107.0)


async def _heal_in(seconds: float, net: MemoryNetwork) -> None:
    await trio.sleep(seconds)
    net.heal()


async def test_a_dial_across_a_partition_waits_and_then_fails(autojump_clock):
    net = network()
    async with listening(net), trio.open_nursery() as healing:
        net.partition(["a"], ["b"])
        with pytest.raises(PeerUnreachable, match="no answer within 5 s"):
            await net.transport(A, "a").dial(AT_B, None)
        assert trio.current_time() == pytest.approx(5.0)
        healing.start_soon(_heal_in, 2.0, net)
        await net.transport(A, "a").dial(AT_B, None)
        assert trio.current_time() == pytest.approx(7.0)


async def test_a_killed_host_is_gone_until_it_is_revived(autojump_clock):
    net = network()
    dialler = net.transport(A, "a")
    async with connected(net) as (near, _):
        net.kill("b")
        with pytest.raises(trio.BrokenResourceError):
            await near.stream.receive_some()
        with pytest.raises(PeerUnreachable):
            await dialler.dial(AT_B, None)
        with pytest.raises(PeerUnreachable):
            await net.transport(B, "b").dial(Address("a", 1), None)
        net.revive("b")
        async with listening(net):
            await dialler.dial(AT_B, None)

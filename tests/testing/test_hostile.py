"""The hostile peer does what its script says, no more, and says how it ended."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from p2pmoe.identity import KeyPair
from p2pmoe.net.messages import Ping
from p2pmoe.net.pool import PoolParams
from p2pmoe.net.quota import QuotaParams
from p2pmoe.node import NodeConfig, open_node
from p2pmoe.testing import hostile
from p2pmoe.testing.hostile import (
    Call,
    Greet,
    Hear,
    HostilePeer,
    Outcome,
    Replay,
    Reset,
    Say,
    Script,
    Send,
    Shake,
    Wait,
    attack,
    crowd,
    trickle,
)
from p2pmoe.wire.address import Address

MALLORY = KeyPair.from_seed(b"m" * 32)
IMPATIENT = QuotaParams(handshake=0.3, linger=0.1)


@asynccontextmanager
async def node(quota: QuotaParams | None = None) -> AsyncIterator[Address]:
    config = NodeConfig(
        new_swarm=True,
        listen=Address("127.0.0.1", 0),
        pool=PoolParams(quota=quota or QuotaParams()),
        stop_within=1.0,
    )
    async with open_node(config) as opened:
        assert opened.address is not None
        yield opened.address


async def outcome(*script: hostile.Step, quota: QuotaParams | None = None) -> Outcome:
    async with node(quota) as address:
        with trio.fail_after(30):
            return await attack(address, script, keys=MALLORY)


async def test_a_script_that_breaks_no_rule_is_gone_through() -> None:
    done = await outcome(Shake(), Greet(), Call("node.status"), Hear(0.05), Say(Ping(n=1)))
    assert (done.ended_at, done.refusal) == (None, None)
    assert done.sent > 0
    assert done.received > 0


async def test_what_breaks_a_rule_is_answered_by_a_refusal_that_is_kept() -> None:
    done = await outcome(Shake(), Greet(), Send(b"\xff" * 8), Hear())
    assert done.ended_at == Hear()
    assert done.refusal is not None
    assert done.refusal.detail.startswith("frame.header_too_long")


async def test_a_peer_that_dawdles_in_plain_tcp_is_closed() -> None:
    done = await outcome(*trickle(b"\x16\x03\x01\x02\x00\x01", 0.01), Hear(), quota=IMPATIENT)
    assert done.ended_at == Hear()
    assert done.sent == 6
    assert done.seconds >= IMPATIENT.handshake / 2


async def test_what_was_said_is_said_again() -> None:
    done = await outcome(Shake(), Greet(), Replay(), Hear())
    assert done.refusal is not None
    assert done.refusal.detail.startswith("exchange.second_hello")


async def test_a_flood_ends_where_the_other_side_has_enough() -> None:
    done = await outcome(Shake(), Greet(), Call("node.status", times=5000, cancel=True), Hear())
    assert done.ended_at is not None


async def test_a_connection_is_broken_off() -> None:
    done = await outcome(Wait(0.0), Reset())
    assert (done.sent, done.ended_at) == (0, None)


async def test_a_crowd_has_an_outcome_for_each_that_could_dial() -> None:
    async with node() as address:
        outcomes = await crowd(address, [Shake(), Greet()], 5, at_once=2)
        assert [each.ended_at for each in outcomes] == [None] * 5
    assert await crowd(address, [Shake()], 3) == []


class Deaf(trio.abc.Stream):
    """A stream that takes everything and says nothing that makes sense."""

    def __init__(self) -> None:
        self.taken = bytearray()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        self.taken += data

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.sleep(1)
        return b"\0\0\0\1\0\0\0\0x"

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


async def performed(script: Script) -> tuple[Deaf, Outcome]:
    stream = Deaf()
    return stream, await HostilePeer(stream, MALLORY).perform(script)


async def test_repetitions_are_counted_and_spaced(autojump_clock: object) -> None:
    stream, done = await performed([Send(b"ab", times=250), Send(b"c", times=3, pause=2.0)])
    assert bytes(stream.taken) == b"ab" * 250 + b"ccc"
    assert done.seconds == pytest.approx(6.0)
    assert done.sent == 503


async def test_nonsense_that_is_heard_does_no_harm(autojump_clock: object) -> None:
    _, done = await performed([Send(b"x"), Hear(3.5), Reset()])
    assert (done.received, done.ended_at) == (27, None)


async def test_every_script_ends(autojump_clock: object) -> None:
    _, done = await performed([Wait(1e9)])
    assert done.seconds == pytest.approx(hostile.MAX_SECONDS)


@pytest.mark.parametrize("step", [Send(b"x", times=10**9), Call(times=10**9)])
async def test_a_step_has_a_bound(step: hostile.Step, autojump_clock: object) -> None:
    with pytest.raises(ValueError, match="times"):
        await performed([step])


async def test_it_attacks_nobody_but_the_addresses_of_tests() -> None:
    with pytest.raises(ValueError, match="not an address of a test"):
        await attack(Address("8.8.8.8", 4747), [Send(b"x")])

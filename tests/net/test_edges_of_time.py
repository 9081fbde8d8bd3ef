"""Each limit of time, at its edge: a little before it all is well, a little after it is over."""

from __future__ import annotations

import errno
import math
import socket
from collections.abc import Awaitable, Callable
from dataclasses import fields, replace
from functools import partial
from typing import Any

import pytest
import trio
import trio.testing

import tests.net.test_edges_of_counts
import tests.net.test_offenders  # noqa: F401  and these
from p2pmoe.errors import MalformedMessage, PeerUnreachable
from p2pmoe.net.connection import Connection, Terms
from p2pmoe.net.frames import FrameStream
from p2pmoe.net.greeting import Greeted, _refusing
from p2pmoe.net.lobby import Lobby
from p2pmoe.net.messages import End, Goodbye, Hello, Ping, Refuse
from p2pmoe.net.pool import PoolParams
from p2pmoe.net.quota import Quota, QuotaParams
from p2pmoe.net.tcp import TcpTransport, _Reception
from p2pmoe.net.tls import Tls
from p2pmoe.net.transport import Channel
from p2pmoe.wire.address import Address
from p2pmoe.wire.framing import BULK_LIMITS
from tests.net.edges import NEARLY, TESTED, edge
from tests.net.pools import dial, greet, hello, key, world
from tests.net.sides import Side, account, request
from tests.net.strangers import ADDRESS, ALICE, BOB, credentials

LIMITS = QuotaParams()
Clock = object  # the fixture of a virtual clock


async def ends_at(work: Callable[[], Awaitable[object]]) -> float:
    """How long something took, in seconds."""
    begun = trio.current_time()
    await work()
    return trio.current_time() - begun


# ------------------------------------------------------------------ strangers
@edge("strangers_stay")
def test_a_stranger_has_time_before_it_goes_for_others() -> None:
    lobby = Lobby(2)
    lobby.enter("127.0.0.1", 5.0, lambda: None)
    assert lobby.wait(LIMITS.strangers_stay, now=5.0) == 0
    lobby.enter("127.0.0.1", 6.0, lambda: None)
    almost = 5.0 + LIMITS.strangers_stay - NEARLY
    assert lobby.wait(LIMITS.strangers_stay, almost) == pytest.approx(NEARLY)
    assert lobby.wait(LIMITS.strangers_stay, 5.0 + LIMITS.strangers_stay) == 0


async def nobody(channel: Channel) -> None:
    raise AssertionError("nobody comes in")


@edge("handshakes")
async def test_handshakes_begin_by_their_rate(autojump_clock: Clock) -> None:
    reception = _Reception(Tls(credentials(BOB)), nobody, LIMITS)
    for _ in range(int(LIMITS.handshakes.burst)):
        assert await ends_at(partial(reception._await_turn, "127.0.0.1")) == 0
    for _ in range(3):
        waited = await ends_at(partial(reception._await_turn, "127.0.0.1"))
        assert waited == pytest.approx(1 / LIMITS.handshakes.per_second, rel=0.01)


@edge("handshakes_in_disgrace")
async def test_strangers_wait_longer_where_others_broke_the_rules(autojump_clock: Clock) -> None:
    reception = _Reception(Tls(credentials(BOB)), nobody, LIMITS)
    for _ in range(int(LIMITS.offences.burst) + 1):
        reception._offenders.blame("127.0.0.1", trio.current_time())
    for _ in range(int(LIMITS.handshakes_in_disgrace.burst)):
        assert await ends_at(partial(reception._await_turn, "127.0.0.1")) == 0
    waited = await ends_at(partial(reception._await_turn, "127.0.0.1"))
    assert waited == pytest.approx(1 / LIMITS.handshakes_in_disgrace.per_second)
    assert await ends_at(partial(reception._await_turn, "127.0.0.2")) == 0


@edge("handshake")
@pytest.mark.parametrize(("seconds", "proven"), [(-NEARLY, True), (NEARLY, False)])
async def test_a_handshake_has_its_time(seconds: float, proven: bool, autojump_clock: Clock):
    here, there = trio.testing.memory_stream_pair()
    channels: list[Channel] = []

    async def listen() -> None:
        try:
            channels.append(await Tls(credentials(BOB)).accepted(here, ADDRESS))
        except PeerUnreachable as error:
            assert f"within {LIMITS.handshake:g} s" in str(error)

    async def come_late() -> None:
        await trio.sleep(LIMITS.handshake + seconds)
        try:
            await Tls(credentials(ALICE)).dialled(there, ADDRESS, None)
        except PeerUnreachable:
            assert not proven

    async with trio.open_nursery() as sides:
        sides.start_soon(listen)
        sides.start_soon(come_late)
    assert bool(channels) is proven


@edge("linger")
async def test_a_refused_client_has_its_time_to_read_why(autojump_clock: Clock) -> None:
    here, there = trio.testing.memory_stream_pair()
    await there.send_all(b"GET / HTTP/1.1\r\n\r\n")  # and neither reads nor closes

    async def refuse() -> None:
        with pytest.raises(PeerUnreachable):
            await Tls(credentials(BOB)).accepted(here, ADDRESS)

    assert await ends_at(refuse) == pytest.approx(LIMITS.linger)


class Knocks:
    """A listener at which somebody knocks all the time."""

    def __init__(self) -> None:
        self.at: list[float] = []

    async def __aenter__(self) -> Knocks:
        return self

    async def __aexit__(self, *error: object) -> None:
        await trio.lowlevel.checkpoint()

    async def accept(self) -> None:
        await trio.lowlevel.checkpoint()
        self.at.append(trio.current_time())


@edge("accepts")
async def test_connections_are_taken_by_their_rate(autojump_clock: Clock, monkeypatch: Any):
    async def attend(self: _Reception, stream: None) -> None:
        await trio.lowlevel.checkpoint()

    monkeypatch.setattr(_Reception, "_attend", attend)
    listener: Any = Knocks()
    reception = _Reception(Tls(credentials(BOB)), nobody, LIMITS)
    async with trio.open_nursery() as connections:
        with trio.move_on_after(1.0 - NEARLY):
            await reception.run(listener, connections)
    most = LIMITS.accepts.burst + LIMITS.accepts.per_second
    assert most - 2 <= len(listener.at) <= most
    assert listener.at.count(listener.at[0]) == LIMITS.accepts.burst


class OutOfDescriptors:
    """A listener whose process has run out of them."""

    def __init__(self) -> None:
        self.tried: list[float] = []

    async def __aenter__(self) -> OutOfDescriptors:
        return self

    async def __aexit__(self, *error: object) -> None:
        await trio.lowlevel.checkpoint()

    async def accept(self) -> trio.SocketStream:
        self.tried.append(trio.current_time())
        raise OSError(errno.EMFILE, "too many open files")


@edge("accept_pause")
async def test_without_descriptors_a_listener_tries_again_after_a_pause(autojump_clock: Clock):
    listener: Any = OutOfDescriptors()
    reception = _Reception(Tls(credentials(BOB)), nobody, LIMITS)
    async with trio.open_nursery() as connections:
        with trio.move_on_after(10 * LIMITS.accept_pause - NEARLY):
            await reception.run(listener, connections)
    assert listener.tried == pytest.approx([n * LIMITS.accept_pause for n in range(10)])


class SlowNames(trio.abc.HostnameResolver):
    """A resolver that says no after a while."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    async def getaddrinfo(self, *args: Any, **flags: Any) -> Any:
        await trio.sleep(self._seconds)
        raise socket.gaierror(socket.EAI_NONAME, "not known")

    async def getnameinfo(self, sockaddr: Any, flags: int) -> Any:
        raise AssertionError("nobody asks for the name of an address")


@edge("connect")
@pytest.mark.parametrize(("seconds", "stage"), [(-NEARLY, "resolve"), (NEARLY, "connect")])
async def test_a_name_and_a_connection_have_their_time(
    seconds: float, stage: str, autojump_clock: Clock
) -> None:
    trio.socket.set_custom_hostname_resolver(SlowNames(LIMITS.connect + seconds))
    with pytest.raises(PeerUnreachable) as caught:
        await TcpTransport(ALICE, credentials(ALICE)).dial(Address("bob.example", 1), None)
    assert caught.value.stage == stage


# ------------------------------------------------------------------ greetings
@edge("hello")
@pytest.mark.parametrize(("seconds", "let_in"), [(-NEARLY, True), (NEARLY, False)])
async def test_a_guest_has_its_time_to_say_hello(
    seconds: float, let_in: bool, autojump_clock: Clock
) -> None:
    async with world() as w:
        stranger = await dial(w, await w.peer(1))
        await trio.sleep(LIMITS.hello + seconds)
        if let_in:
            await stranger.say(hello())
            assert isinstance(await stranger.hear(), Hello)
        else:
            with pytest.raises(EOFError):
                await stranger.hear()


def stuck() -> tuple[Channel, trio.abc.Stream]:
    """A channel on which nothing gets out before it is read."""
    here, there = trio.testing.lockstep_stream_pair()
    peer = key(9)
    return Channel(here, peer.peer_id, peer.public_key, ADDRESS, math.inf), there


@edge("refuse")
async def test_a_refusal_has_its_time_to_get_out(autojump_clock: Clock) -> None:
    channel, _ = stuck()

    async def refuse() -> None:
        with pytest.raises(MalformedMessage):
            async with _refusing(FrameStream(channel, BULK_LIMITS), LIMITS.refuse):
                raise MalformedMessage("hello.expected")

    assert await ends_at(refuse) == pytest.approx(LIMITS.refuse)


# ------------------------------------------------------------------ calls
@edge("call_seconds")
def test_a_call_may_not_take_longer_than_this_side_lets_it() -> None:
    side = Side(dialler=False)
    side.receive(request(budget_ms=10 * int(LIMITS.call_seconds * 1000)))
    assert side.arrived[0].deadline == LIMITS.call_seconds

    side.receive(request(3, size=100, budget_ms=10 * int(LIMITS.call_seconds * 1000)))
    side.core.heard(1, LIMITS.call_seconds - NEARLY, inside_frame=False)
    side.core.tick(LIMITS.call_seconds - NEARLY)
    assert side.headers() == []
    side.core.tick(LIMITS.call_seconds)
    assert [(said.id, said.code) for said in side.headers() if isinstance(said, End)] == [
        (3, "timeout")
    ]


# ------------------------------------------------------------------ signs of life
@edge("ping_control", "ping_bulk")
@pytest.mark.parametrize(
    ("channel", "seconds"), [("control", LIMITS.ping_control), ("bulk", LIMITS.ping_bulk)]
)
async def test_a_silent_peer_is_asked_for_a_sign_of_life(
    channel: str, seconds: float, autojump_clock: Clock
) -> None:
    async with world() as w:
        stranger = await greet(w, await w.peer(1), channel=channel)
        with trio.move_on_after(seconds - NEARLY) as early:
            await stranger.hear()
        assert early.cancelled_caught
        assert await stranger.hear() == Ping(n=1)
        assert trio.current_time() == pytest.approx(seconds)


async def test_who_was_refused_all_it_announced_holds_nothing_and_stays_as_long_as_any_silent_peer(
    autojump_clock: Clock,
) -> None:
    async with world() as w:
        b = await w.peer(1, params=PoolParams(quota=QuotaParams(payload_in_all=2**20)))
        stranger = await greet(w, b)
        await stranger.say(*(request(number, size=2**21) for number in (1, 3, 5, 7)))
        for number in (1, 3, 5, 7):
            answer = await stranger.hear()
            assert (answer.id, answer.code) == (number, "busy")
        assert b.pool.stats()["p2pmoe_payload_bytes_reserved"] == 0
        assert [await stranger.hear() for _ in range(LIMITS.pings)] == [Ping(n=1), Ping(n=2)]
        with pytest.raises(EOFError):
            await stranger.hear()
        assert trio.current_time() == pytest.approx((LIMITS.pings + 1) * LIMITS.ping_bulk)
        await trio.testing.wait_all_tasks_blocked()
        assert b.pool.stats()['p2pmoe_connections{class="bulk"}'] == 0


@edge("user_timeout_control", "user_timeout_bulk")
@pytest.mark.parametrize(
    ("bulk", "seconds"),
    [(False, LIMITS.user_timeout_control), (True, LIMITS.user_timeout_bulk)],
)
async def test_the_kernel_is_told_how_long_bytes_may_stay_unacknowledged(
    bulk: bool, seconds: float, autojump_clock: Clock
) -> None:
    told: list[float] = []
    channel, there = stuck()
    connection = opened(replace(channel, set_user_timeout=told.append), bulk=bulk)
    await there.aclose()
    await connection.run()
    assert told == [seconds]


# ------------------------------------------------------------------ the end
def opened(channel: Channel, *, bulk: bool = True) -> Connection:
    frames, greeted = FrameStream(channel, BULK_LIMITS), Greeted(channel.peer, None)
    return Connection(Terms(frames, greeted, bulk, outbound=False), account(), {})


@edge("goodbye")
async def test_the_last_words_of_a_connection_have_their_time(autojump_clock: Clock) -> None:
    channel, there = stuck()
    connection = opened(channel)
    async with trio.open_nursery() as peers:
        peers.start_soon(there.send_all, b"\xff" * 8)  # breaks a rule, and reads nothing
        assert await ends_at(connection.run) == pytest.approx(LIMITS.goodbye)
        peers.cancel_scope.cancel()
    assert isinstance(connection.error, MalformedMessage)


async def test_last_words_that_are_read_say_why(autojump_clock: Clock) -> None:
    async with world() as w:
        stranger = await greet(w, await w.peer(1))
        await stranger.stream.send_all(b"\xff" * 8)
        assert isinstance(await stranger.hear(), Refuse)


@edge("closing")
async def test_a_peer_has_its_time_to_close_after_a_goodbye(autojump_clock: Clock) -> None:
    async with world() as w:
        b = await w.peer(1)
        stranger = await greet(w, b)
        assert await ends_at(b.pool.drain) == pytest.approx(LIMITS.closing)
        assert await stranger.hear() == Goodbye(last_id=0)


# ------------------------------------------------------------------ the table
def test_each_limit_has_a_test_at_its_edge() -> None:
    assert {field.name for field in fields(QuotaParams)} - TESTED == set()


def test_what_a_process_holds_at_most_leaves_room_among_the_usual_descriptors() -> None:
    held = LIMITS.strangers + LIMITS.guests + LIMITS.connections
    assert held < 1024 - 64
    assert LIMITS.connections_in < LIMITS.connections
    assert LIMITS.payload_a_peer < LIMITS.payload_in_all
    assert Quota(LIMITS).params is LIMITS

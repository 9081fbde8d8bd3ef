"""Each limit of a number, at its edge: so many are allowed, and one more is not."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable

import pytest
import trio
import trio.testing

from p2pmoe.errors import MalformedMessage, PeerBusy, PeerUnreachable
from p2pmoe.identity import PeerId
from p2pmoe.net.lobby import Lobby
from p2pmoe.net.messages import Hello, Ping
from p2pmoe.net.pool import PoolParams
from p2pmoe.net.quota import PeerQuota, Progress, Quota, QuotaParams, Rate
from p2pmoe.net.tcp import _listen
from p2pmoe.net.tls import Tls
from p2pmoe.wire.address import Address
from p2pmoe.wire.envelope import VerifiedCache
from tests.net.edges import NEARLY, edge
from tests.net.pools import NETWORK, dial, greet, hello, key, record_of, world
from tests.net.sides import Side, request, violation
from tests.net.strangers import ADDRESS, ALICE, credentials

LIMITS = QuotaParams()
LOCAL, GLOBAL, ANOTHER = "192.168.1.7", "8.8.8.8", "8.8.8.9"


def peer(number: int) -> PeerId:
    return PeerId(number.to_bytes(32, "big"))


def account(limits: QuotaParams = LIMITS) -> PeerQuota:
    return Quota(limits).connect(peer(0), bulk=False, now=0.0)


# ------------------------------------------------------------------ strangers and guests
def crowd(lobby: Lobby, size: int, host: str = LOCAL) -> list[list[str]]:
    """So many who came one after the other, each with a list of what was said to it."""
    heard: list[list[str]] = [[] for _ in range(size)]
    for each in heard:
        assert lobby.enter(host, 0.0, lambda each=each: each.append("go")) is not None
    return heard


@edge("strangers")
def test_strangers_are_not_sent_away_before_there_is_one_too_many() -> None:
    lobby = Lobby(LIMITS.strangers, LIMITS.strangers_an_address)
    heard = crowd(lobby, LIMITS.strangers)
    assert not any(heard)
    heard += crowd(lobby, 1)
    assert [len(each) for each in heard] == [1] + [0] * LIMITS.strangers
    assert len(lobby) == LIMITS.strangers


@edge("strangers_an_address")
def test_strangers_of_one_global_address_have_a_few_places() -> None:
    lobby = Lobby(LIMITS.strangers, LIMITS.strangers_an_address)
    crowd(lobby, LIMITS.strangers_an_address - 1, GLOBAL)
    last = lobby.enter(GLOBAL, 0.0, lambda: None)
    assert last is not None
    assert lobby.enter(GLOBAL, 0.0, lambda: None) is None
    assert lobby.enter(ANOTHER, 0.0, lambda: None) is not None
    lobby.leave(last)
    assert lobby.enter(GLOBAL, 0.0, lambda: None) is not None


@edge("guests")
async def test_guests_who_say_no_hello_make_room_for_later_ones(autojump_clock: object) -> None:
    async with world() as w:
        b = await w.peer(1, params=PoolParams(quota=QuotaParams(guests=2)))
        first, second = [await dial(w, b, number) for number in (5, 6)]
        await trio.testing.wait_all_tasks_blocked()
        await dial(w, b, 7)
        with pytest.raises(EOFError):
            await first.hear()
        await second.say(hello())
        assert isinstance(await second.hear(), Hello)
        assert trio.current_time() == 0


@edge("linger_bytes")
async def test_a_refused_client_may_send_so_much_and_no_more(autojump_clock: object) -> None:
    limits = QuotaParams(linger=100.0)
    for sent, closed in ((limits.linger_bytes - 1, False), (limits.linger_bytes, True)):
        here, there = trio.testing.memory_stream_pair()
        await there.send_all(b"GET / HTTP/1.1\r\n\r\n")
        async with trio.open_nursery() as handshakes:
            handshakes.start_soon(refused, Tls(credentials(ALICE), limits), here)
            await trio.testing.wait_all_tasks_blocked()
            await there.send_all(bytes(sent))
            await trio.testing.wait_all_tasks_blocked()
            lingering = bool(handshakes.child_tasks)
            handshakes.cancel_scope.cancel()
        assert lingering is not closed


async def refused(tls: Tls, stream: trio.abc.Stream) -> None:
    with pytest.raises(PeerUnreachable):
        await tls.accepted(stream, ADDRESS)


# ------------------------------------------------------------------ connections
@edge("connections")
def test_connections_in_all_are_limited() -> None:
    quota = Quota(LIMITS)
    for number in range(LIMITS.connections):
        quota.connect(peer(number), bulk=False, now=0.0)
    with pytest.raises(PeerBusy):
        quota.connect(peer(9999), bulk=False, now=0.0)


@edge("connections_in")
def test_connections_that_others_dialled_leave_room_for_ones_own() -> None:
    quota = Quota(LIMITS)
    accounts = [
        quota.connect(peer(number), bulk=False, now=0.0, came_from=LOCAL)
        for number in range(LIMITS.connections_in)
    ]
    with pytest.raises(PeerBusy, match="that came in"):
        quota.connect(peer(9999), bulk=False, now=0.0, came_from=LOCAL)
    quota.connect(peer(9999), bulk=False, now=0.0)
    quota.disconnect(accounts[0], bulk=False, came_from=LOCAL)
    quota.connect(peer(9999), bulk=True, now=0.0, came_from=LOCAL)


@edge("connections_an_address")
@pytest.mark.parametrize(
    ("host", "neighbour", "stranger"),
    [(GLOBAL, GLOBAL, ANOTHER), ("2a00::1", "2a00::ffff", "2a00:0:0:1::1")],
)
def test_connections_of_one_global_address_are_limited(host, neighbour, stranger) -> None:
    quota = Quota(LIMITS)
    accounts = [
        quota.connect(peer(number), bulk=False, now=0.0, came_from=host)
        for number in range(LIMITS.connections_an_address)
    ]
    with pytest.raises(PeerBusy, match=r"from 8\.8\.8\.8/32|from 2a00::/64"):
        quota.connect(peer(9999), bulk=False, now=0.0, came_from=neighbour)
    quota.connect(peer(9999), bulk=False, now=0.0, came_from=stranger)
    for one in accounts:
        quota.disconnect(one, bulk=False, came_from=host)
    quota.connect(peer(9999), bulk=True, now=0.0, came_from=neighbour)


@pytest.mark.parametrize("host", ["127.0.0.1", LOCAL, "10.0.0.1", "fe80::1", "fd00::1", "ada"])
def test_a_home_or_a_cluster_behind_one_address_is_no_crowd(host: str) -> None:
    quota, lobby = Quota(LIMITS), Lobby(LIMITS.strangers, LIMITS.strangers_an_address)
    crowd(lobby, LIMITS.strangers, host)
    for number in range(LIMITS.connections_in):
        quota.connect(peer(number), bulk=False, now=0.0, came_from=host)


@edge("connections_a_peer")
def test_connections_of_one_peer_are_limited_in_each_class() -> None:
    quota = Quota(LIMITS)
    for bulk in (False, True):
        for _ in range(LIMITS.connections_a_peer):
            quota.connect(peer(0), bulk=bulk, now=0.0)
        with pytest.raises(PeerBusy):
            quota.connect(peer(0), bulk=bulk, now=0.0)


# ------------------------------------------------------------------ calls
@edge("calls_a_peer", "come_again")
def test_calls_in_flight_of_one_peer_are_limited() -> None:
    one = account()
    assert {one.begin_call("x", 0, 0.0) for _ in range(LIMITS.calls_a_peer)} == {0.0}
    assert one.begin_call("x", 0, 0.0) == LIMITS.come_again
    one.end_call()
    assert one.begin_call("x", 0, 0.0) == 0.0


@edge("payload_a_peer")
def test_bytes_in_flight_of_one_peer_are_limited() -> None:
    one = account()
    assert one.reserve(LIMITS.payload_a_peer)
    assert not one.reserve(1)


@edge("payload_in_all")
def test_no_peer_reserves_more_than_is_left_for_all_others() -> None:
    quota = Quota(QuotaParams(payload_a_peer=1000, payload_in_all=1024))
    one, two, three = (quota.connect(peer(n), bulk=True, now=0.0) for n in range(3))
    assert one.reserve(512)
    assert not one.reserve(1)
    assert two.reserve(256)
    assert not two.reserve(1)
    assert three.reserve(128)
    one.release(512)
    assert three.reserve(1)


# ------------------------------------------------------------------ rates
def spend_request(prefix: str) -> Callable[[PeerQuota, float], None]:
    def spend(one: PeerQuota, now: float) -> None:
        if one.begin_call(f"{prefix}x", 0, now):
            raise MalformedMessage("over the rate")
        one.end_call()

    return spend


def spend_refusal(one: PeerQuota, now: float) -> None:
    assert one.begin_call("x", LIMITS.payload_in_all + 1, now) > 0


SPENDING = {
    **{f"rates[{prefix}]": (rate, spend_request(prefix)) for prefix, rate in LIMITS.rates},
    "refusals": (LIMITS.refusals, spend_refusal),
    "faults": (LIMITS.faults, PeerQuota.count_fault),
    "cancels": (LIMITS.cancels, PeerQuota.count_cancel),
    "pings_heard": (LIMITS.pings_heard, PeerQuota.count_ping),
    "frames": (LIMITS.frames, PeerQuota.count_frame),
}


@edge("rates", "refusals", "faults", "cancels", "pings_heard", "frames")
@pytest.mark.parametrize("what", SPENDING)
def test_what_comes_too_often_is_refused_after_the_burst_and_then_goes_by_the_rate(what) -> None:
    rate, spend = SPENDING[what]
    one = account()
    for _ in range(int(rate.burst)):
        spend(one, 0.0)
    with pytest.raises(MalformedMessage):
        spend(one, 0.0)
    with pytest.raises(MalformedMessage):
        spend(one, 0.9 / rate.per_second)
    spend(one, 1.1 / rate.per_second)


async def test_a_peer_whose_calls_make_no_sense_is_hung_up_on(autojump_clock: object) -> None:
    limits = QuotaParams(faults=Rate(1, 2))
    async with world() as w:
        b = await w.peer(1, params=PoolParams(quota=limits))

        async def strict(call) -> None:
            raise MalformedMessage("schema.missing")

        b.pool.handlers["strict"] = strict
        stranger = await greet(w, b)
        for n in (1, 3):
            await stranger.say(strict_request(n))
            assert (await stranger.hear()).code == "malformed"
        await stranger.say(strict_request(5))
        said = [header async for header in everything(stranger)]
        assert said[-1].detail == "quota.faults_too_often"


def strict_request(number: int):
    return type(request())(id=number, method="strict", budget_ms=1000)


async def everything(stranger):
    """What comes until the end."""
    while True:
        try:
            yield await stranger.hear()
        except EOFError:
            return


# ------------------------------------------------------------------ queues and tables
@edge("small_frames")
def test_answers_that_are_not_read_pile_up_to_a_limit() -> None:
    side = Side(dialler=False, limits=QuotaParams(pings_heard=Rate(1, 10_000)))
    for n in range(LIMITS.small_frames):
        side.receive(Ping(n=n))
    with violation("exchange.not_reading"):
        side.receive(Ping(n=LIMITS.small_frames))


@edge("pings")
def test_a_peer_that_does_not_answer_so_many_pings_is_gone() -> None:
    side = Side(dialler=False)
    for sent in range(1, LIMITS.pings + 1):
        side.core.tick(side.core.next_deadline())
        assert side.headers() == [Ping(n=sent)]
    with pytest.raises(Exception, match="no sign of life"):
        side.core.tick(side.core.next_deadline())


@edge("peers_remembered")
def test_accounts_are_remembered_up_to_a_limit() -> None:
    quota = Quota(LIMITS)
    for number in range(LIMITS.peers_remembered + 1):
        assert len(quota) == number
        quota.disconnect(quota.connect(peer(number), bulk=False, now=0.0), bulk=False)
    quota.connect(peer(9999), bulk=False, now=0.0)
    assert len(quota) == LIMITS.peers_remembered


@edge("records_remembered")
def test_verified_records_are_remembered_up_to_a_limit() -> None:
    cache = VerifiedCache(LIMITS.records_remembered)
    for number in range(LIMITS.records_remembered):
        cache.add(number.to_bytes(32, "big"))
    assert cache.knows(bytes(32))
    cache.add(b"one more")
    assert len(cache) == LIMITS.records_remembered
    assert not cache.knows((1).to_bytes(32, "big"))


async def test_a_pool_remembers_so_many_records(autojump_clock: object) -> None:
    async with world() as w:
        b = await w.peer(1, params=PoolParams(quota=QuotaParams(records_remembered=2)))
        for number in (5, 6, 7):
            record = record_of(key(number), b.address, NETWORK)
            stranger = await greet(w, b, number, record=record)
            await stranger.stream.aclose()
        assert len(b.pool.verified) == 2


# ------------------------------------------------------------------ progress
@edge("grace", "last_chance", "least_rate")
def test_what_does_not_move_has_its_grace_and_a_last_chance_and_bytes_earn_time() -> None:
    progress, gone = Progress(LIMITS), LIMITS.grace + LIMITS.last_chance
    progress.moved(1, now=0.0)
    assert not progress.too_slow(LIMITS.grace - NEARLY)
    assert not progress.too_slow(LIMITS.grace)  # this begins the last chance
    assert not progress.too_slow(gone - NEARLY)
    assert progress.too_slow(gone)

    progress = Progress(LIMITS)
    progress.moved(1, now=0.0)
    progress.moved(int(LIMITS.least_rate), now=1.0)  # earns one second
    assert progress.deadline == pytest.approx(LIMITS.grace + 1.0)


def test_a_payload_is_not_helped_by_other_frames_and_has_the_time_of_one_chunk() -> None:
    side = Side(dialler=False)
    side.receive(request(size=2**20, budget_ms=300_000))
    chunk_seconds = (2**20 // 4) / LIMITS.least_rate
    patience, now = LIMITS.grace + chunk_seconds, 0.0
    while now < patience:
        side.core.heard(16 * 1024, now, inside_frame=False)
        side.core.tick(now)
        now += 1.0
    side.core.heard(16 * 1024, patience, inside_frame=False)
    side.core.tick(patience)
    with pytest.raises(Exception, match="bytes a second came in"):
        side.core.tick(patience + LIMITS.last_chance)


def test_an_id_is_used_once_and_a_later_one_is_always_larger() -> None:
    side = Side(dialler=False)
    side.receive(request(5))
    for used in (1, 3, 5, 6):
        with violation("exchange.id"):
            side.receive(request(used))
    side.receive(request(7))


@edge("backlog")
async def test_the_system_keeps_so_many_connections_that_are_not_accepted_yet() -> None:
    [listener] = await _listen(Address("127.0.0.1", 0), LIMITS.backlog)
    async with listener:
        about = listener.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 32)
    (most,) = struct.unpack_from("I", about, 28)  # tcpi_sacked; of a listener: its backlog
    assert most == LIMITS.backlog

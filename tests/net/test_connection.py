"""Calls on a connection: how they end, on both sides, and how the connection ends."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import trio
import trio.testing

from p2pmoe import telemetry
from p2pmoe.errors import (
    CallTimeout,
    ConnectionLost,
    LeaseLost,
    LocalProtocolError,
    PeerBusy,
    RemoteError,
)
from p2pmoe.net.buffers import HUGE_PAGE, allocate
from p2pmoe.net.incoming import IncomingCall
from p2pmoe.net.messages import (
    Cancel,
    Chunk,
    End,
    Goodbye,
    Ping,
    Pong,
    Refuse,
    Reply,
    Request,
)
from p2pmoe.net.pool import PeerLost, PoolParams
from p2pmoe.net.quota import QuotaParams
from p2pmoe.testing.memory import Line
from p2pmoe.wire.framing import frame_prefix
from tests.net.pools import Peer, ambush, greet, host, key, world

MIB = 2**20


def request(call: int = 1, **fields: object) -> Request:
    return Request(**({"id": call, "method": "echo", "budget_ms": 1000} | fields))


async def nothing_left(*peers: Peer) -> None:
    """Nothing is in flight or reserved on any side once all has come to rest."""
    await trio.testing.wait_all_tasks_blocked()
    for peer in peers:
        stats = peer.pool.stats()
        assert stats['p2pmoe_calls_in_flight{side="client"}'] == 0
        assert stats['p2pmoe_calls_in_flight{side="server"}'] == 0
        assert stats["p2pmoe_payload_bytes_reserved"] == 0


class Waits:
    """A handler that waits for ever, and tells how it ended."""

    def __init__(self, peer: Peer) -> None:
        self.begun = self.cancelled = 0
        peer.pool.handlers["wait"] = self

    async def __call__(self, call: IncomingCall) -> None:
        self.begun += 1
        try:
            await trio.sleep_forever()
        finally:
            self.cancelled += 1


# ------------------------------------------------------------------ cancelling
async def test_a_cancel_that_is_read_while_the_connection_ends_finds_no_call(autojump_clock):
    async with world() as w:
        b = await w.peer(1)
        waits = Waits(b)
        stranger = await greet(w, b)
        [connection] = b.pool._connections()
        await stranger.say(request(1, method="wait"))
        await trio.testing.wait_all_tasks_blocked()
        [scope] = connection._incoming._running.values()
        connection._incoming._running.clear()  # as its task does when all are cancelled
        await stranger.say(Cancel(id=1))
        await trio.testing.wait_all_tasks_blocked()
        assert connection.open
        connection._incoming._running[1] = scope
        b.life.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert waits.cancelled == 1


async def test_a_cancelled_call_ends_on_the_other_side(autojump_clock):
    async with world() as w:
        a, b = await w.peer(0), await w.peer(1)
        waits = Waits(b)
        with trio.move_on_after(1.0):
            await a.pool.call(b.contact, "wait", b"")
        await trio.testing.wait_all_tasks_blocked()
        assert (waits.begun, waits.cancelled) == (1, 1)
        assert trio.current_time() == pytest.approx(1.0)
        await nothing_left(a, b)


async def test_a_call_that_is_cancelled_in_the_turn_in_which_it_came_gets_no_task(autojump_clock):
    async with world() as w:
        b = await w.peer(1)
        waits, stranger = Waits(b), await greet(w, b)
        spawned: list[str] = []

        class Watch(trio.abc.Instrument):
            def task_spawned(self, task: trio.lowlevel.Task) -> None:
                spawned.append(task.name)

        trio.lowlevel.add_instrument(watch := Watch())
        await stranger.say(request(1, method="wait"), Cancel(id=1))
        assert await stranger.hear() == End(id=1, code="cancelled")
        trio.lowlevel.remove_instrument(watch)
        assert (waits.begun, spawned) == (0, [])
        await nothing_left(b)


async def test_leaving_an_open_call_cancels_it(autojump_clock):
    async with world() as w:
        a, b = await w.peer(0), await w.peer(1)
        ended = []

        async def parts(call: IncomingCall) -> None:
            try:
                for n in range(100):
                    await call.send(bytes([n]), [bytes(1000)])
                    await trio.sleep(1.0)
            finally:
                ended.append(trio.current_time())

        b.pool.handlers["parts"] = parts
        got = []
        async with a.pool.open_call(b.contact, "parts", b"", bulk=True) as answer:
            async for part in answer:
                got.append(part.body)
                if len(got) == 3:
                    break
        assert got == [b"\0", b"\1", b"\2"]
        await nothing_left(a, b)
        assert ended == [pytest.approx(2.0)]


async def test_a_thousand_calls_cancelled_at_random_leave_nothing_behind(autojump_clock):
    rng = random.Random(5)
    async with world() as w:
        w.network.set_line(host(0), host(1), Line(latency=0.01, jitter=0.02))
        a, b = await w.peer(0), await w.peer(1)
        tasks = len(trio.lowlevel.current_root_task().child_nurseries)
        outcomes = {"answered": 0, "cancelled": 0}

        async def sometimes(call: IncomingCall) -> None:
            await trio.sleep(rng.random() * 0.2)
            for _ in range(rng.randrange(3)):
                await call.send(b"", [bytes(rng.choice([0, 1, 100_000]))])

        b.pool.handlers["sometimes"] = sometimes
        payload = bytes(300_000)

        async def one(limit: trio.CapacityLimiter) -> None:
            async with limit:
                with trio.move_on_after(rng.random() * 0.3) as scope:
                    size = rng.choice([0, 0, 1, 300_000])
                    async with a.pool.open_call(
                        b.contact, "sometimes", b"", [payload[:size]], bulk=True
                    ) as answer:
                        async for _ in answer:
                            pass
                outcomes["cancelled" if scope.cancelled_caught else "answered"] += 1

        limit = trio.CapacityLimiter(100)
        async with trio.open_nursery() as calls:
            for _ in range(1000):
                calls.start_soon(one, limit)
        await trio.sleep(1.0)
        await nothing_left(a, b)
        assert sum(outcomes.values()) == 1000
        assert min(outcomes.values()) > 100
        part = await a.pool.call(b.contact, "echo", b"", [bytes(3 * MIB)], bulk=True)
        assert len(part.payload) == 3 * MIB
        assert len(trio.lowlevel.current_root_task().child_nurseries) == tasks


async def test_cancelling_in_the_middle_of_a_payload_spares_the_connection(autojump_clock):
    async with world() as w:
        w.network.set_line(host(0), host(1), Line(bandwidth=MIB))
        a, b = await w.peer(0), await w.peer(1)
        with trio.move_on_after(2.0):
            await a.pool.call(b.contact, "echo", b"", [bytes(20 * MIB)], bulk=True)
        part = await a.pool.call(b.contact, "echo", b"still here", bulk=True)
        assert part.body == b"still here"
        assert len(a.events) == 1
        await nothing_left(a, b)


# ------------------------------------------------------------------ how answers end
async def test_a_typed_failure_arrives_as_itself(autojump_clock):
    async with world() as w:
        a, b = await w.peer(0), await w.peer(1)

        async def lost(call: IncomingCall) -> None:
            raise LeaseLost("ffn.1.2 is served by nobody here")

        b.pool.handlers["lost"] = lost
        with pytest.raises(LeaseLost, match=r"ffn\.1\.2") as caught:
            await a.pool.call(b.contact, "lost", b"")
        error = caught.value
        assert (error.peer, error.stage) == (b.keys.peer_id.short, "call")
        assert error.address == "peer1:4747"


async def test_a_busy_server_says_when_to_come_again(autojump_clock):
    async with world() as w:
        a, b = await w.peer(0), await w.peer(1)

        async def busy(call: IncomingCall) -> None:
            error = PeerBusy("the queue is full")
            error.retry_after = 0.5
            raise error

        b.pool.handlers["busy"] = busy
        with pytest.raises(PeerBusy, match="queue") as caught:
            await a.pool.call(b.contact, "busy", b"")
        assert caught.value.retry_after == 0.5


async def test_a_crash_is_told_without_its_details_and_logged_with_them(
    autojump_clock, monkeypatch
):
    events = []
    monkeypatch.setattr(telemetry, "emit", lambda event, **fields: events.append((event, fields)))
    async with world() as w:
        a, b = await w.peer(0), await w.peer(1)

        async def crash(call: IncomingCall) -> None:
            raise ZeroDivisionError("secret")

        b.pool.handlers["crash"] = crash
        with pytest.raises(RemoteError) as caught:
            await a.pool.call(b.contact, "crash", b"")
        assert "secret" not in str(caught.value)
        [fields] = [fields for event, fields in events if event == "net.call.crashed"]
        assert (fields["level"], "secret" in fields["error"]) == ("error", True)
        await a.pool.call(b.contact, "echo", b"")


async def test_an_unknown_method_is_refused_by_its_name(autojump_clock):
    async with world() as w:
        a, b = await w.peer(0), await w.peer(1)
        with pytest.raises(RemoteError, match="no method foo"):
            await a.pool.call(b.contact, "foo", b"")


async def test_a_handler_is_stopped_at_the_callers_deadline(autojump_clock):
    async with world() as w:
        b = await w.peer(1)
        waits = Waits(b)
        stranger = await greet(w, b)
        await stranger.say(request(1, method="wait", budget_ms=2000))
        assert await stranger.hear() == End(
            id=1, code="timeout", detail="no answer by the deadline"
        )
        assert trio.current_time() == pytest.approx(2.0)
        assert waits.cancelled == 1


async def test_a_timeout_over_there_is_a_timeout_here(autojump_clock):
    async with world() as w:
        a, b = await w.peer(0), await w.peer(1)

        async def late(call: IncomingCall) -> None:
            raise CallTimeout("the batch took too long")

        b.pool.handlers["late"] = late
        with pytest.raises(CallTimeout, match="batch"):
            await a.pool.call(b.contact, "late", b"")


async def test_an_answer_waits_for_the_parts_before_it(autojump_clock):
    async with world() as w:
        a, b = await w.peer(0), await w.peer(1)
        sent = []

        async def many(call: IncomingCall) -> None:
            for n in range(20):
                await call.send(b"", [bytes(MIB)])
                sent.append(n)

        b.pool.handlers["many"] = many
        async with a.pool.open_call(b.contact, "many", b"", bulk=True) as answer:
            await trio.testing.wait_all_tasks_blocked()
            assert 1 <= len(sent) < 12
            assert len([part async for part in answer]) == 20
        await nothing_left(a, b)


async def test_what_is_too_large_fails_its_call_alone(autojump_clock):
    async with world() as w:
        a, b = await w.peer(0), await w.peer(1)

        async def large(call: IncomingCall) -> None:
            await call.send(b"", [bytes(65 * 1024)])

        b.pool.handlers["large"] = large
        with pytest.raises(LocalProtocolError, match="bulk"):
            await a.pool.call(b.contact, "echo", b"", [bytes(65 * 1024)])
        with pytest.raises(RemoteError, match="bulk"):
            await a.pool.call(b.contact, "large", b"")
        await a.pool.call(b.contact, "large", b"", bulk=True)


async def test_an_answer_that_was_given_takes_no_more_parts(autojump_clock):
    async with world() as w:
        a, b = await w.peer(0), await w.peer(1)
        kept = []

        async def keep(call: IncomingCall) -> None:
            kept.append(call)
            await call.send(b"")

        b.pool.handlers["keep"] = keep
        await a.pool.call(b.contact, "keep", b"")
        with pytest.raises(LocalProtocolError):
            await kept[0].send(b"late")


@pytest.mark.parametrize("size", [1, 4097, HUGE_PAGE, HUGE_PAGE + 1])
def test_a_payload_has_memory_of_its_own_that_may_be_written(size):
    buffer = allocate(size)
    assert len(buffer) == size
    assert not buffer.readonly
    assert bytes(buffer) == bytes(size)
    buffer[:] = b"\1" * size


# ------------------------------------------------------------------ the connection breaks
async def test_a_peer_that_vanishes_in_the_middle_of_an_answer_loses_the_call(autojump_clock):
    async with world() as w:
        w.network.break_after(host(1), host(0), 2 * MIB + 100)
        a, b = await w.peer(0), await w.peer(1)

        async def large(call: IncomingCall) -> None:
            await call.send(b"", [bytes(8 * MIB)])

        b.pool.handlers["large"] = large
        with pytest.raises(ConnectionLost, match="peer1:4747: call:") as caught:
            await a.pool.call(b.contact, "large", b"", bulk=True)
        assert caught.value.stage == "call"
        await trio.testing.wait_all_tasks_blocked()
        assert isinstance(a.events[-1], PeerLost)
        assert isinstance(a.events[-1].error, ConnectionLost)
        await nothing_left(a, b)


async def test_a_peer_that_vanishes_in_the_middle_of_a_request_leaves_no_bytes(autojump_clock):
    async with world() as w:
        w.network.break_after(host(0), host(1), 2 * MIB + 100)
        a, b = await w.peer(0), await w.peer(1)
        with pytest.raises(ConnectionLost):
            await a.pool.call(b.contact, "echo", b"", [bytes(8 * MIB)], bulk=True)
        await trio.sleep(QuotaParams().closing)
        await nothing_left(a, b)
        assert isinstance(b.events[-1].error, ConnectionLost)


async def test_a_broken_connection_ends_the_handlers_of_its_calls(autojump_clock):
    async with world() as w:
        a, b = await w.peer(0), await w.peer(1)
        waits = Waits(b)
        async with trio.open_nursery() as calls:
            calls.start_soon(_lose, a, b)
            await trio.sleep(1.0)
            w.network.cut(host(0), host(1))
        await nothing_left(a, b)
        assert (waits.begun, waits.cancelled) == (3, 3)


async def _lose(a: Peer, b: Peer) -> None:
    async def one() -> None:
        with pytest.raises(ConnectionLost):
            await a.pool.call(b.contact, "wait", b"")

    async with trio.open_nursery() as calls:
        for _ in range(3):
            calls.start_soon(one)


async def test_a_peer_that_breaks_the_rules_is_told_and_hung_up_on(autojump_clock):
    async with world() as w:
        b = await w.peer(1)
        waits = Waits(b)
        stranger = await greet(w, b)
        await stranger.say(request(1, method="wait"), request(1))
        refuse = await stranger.hear()
        assert isinstance(refuse, Refuse)
        assert (refuse.code, "exchange.id" in refuse.detail) == ("malformed", True)
        with pytest.raises(EOFError):
            await stranger.hear()
        await nothing_left(b)
        assert b.events[-1].error.why == "exchange.id"
        assert waits.begun == waits.cancelled


async def test_an_answer_counts_although_nonsense_follows_it_at_once(autojump_clock):
    async with world() as w:
        a, waiting = await w.peer(0), await ambush(w)
        got = []

        async def call() -> None:
            got.append(await a.pool.call(waiting.contact, "x", b""))

        with trio.fail_after(1.0):
            async with trio.open_nursery() as calls:
                calls.start_soon(call)
                stranger = await waiting.next_greeted()
                await stranger.hear()
                await stranger.say(Reply(id=1, body=b"yes"), End(id=1), End(id=1))
        assert [part.body for part in got] == [b"yes"]
        await nothing_left(a)


async def test_whoever_is_refused_in_the_middle_loses_its_calls_with_the_reason(autojump_clock):
    async with world() as w:
        a, waiting = await w.peer(0), await ambush(w)
        async with trio.open_nursery() as calls:
            calls.start_soon(_refused_call, a, waiting)
            stranger = await waiting.next_greeted()
            await stranger.hear()
            await stranger.say(Refuse(code="not_allowed", detail="revoked"))


async def _refused_call(a: Peer, waiting) -> None:
    with pytest.raises(ConnectionLost, match="revoked"):
        await a.pool.call(waiting.contact, "echo", b"")


async def test_frames_longer_than_the_limit_are_refused_before_they_are_read(autojump_clock):
    async with world() as w:
        b = await w.peer(1)
        stranger = await greet(w, b)
        await stranger.stream.send_all(frame_prefix(10, 2**32 - 1))
        assert (await stranger.hear()).detail.startswith("frame.payload_too_long")


# ------------------------------------------------------------------ peers that are slow or silent
async def test_a_peer_that_does_not_read_is_given_up(autojump_clock):
    async with world() as w:
        a, waiting = await w.peer(0), await ambush(w)
        async with trio.open_nursery() as calls:
            calls.start_soon(_unread_call, a, waiting)
            await waiting.next_greeted()
        assert 10 < trio.current_time() < 60


async def _unread_call(a: Peer, waiting) -> None:
    with trio.fail_after(100), pytest.raises(ConnectionLost, match="does not read"):
        await a.pool.call(waiting.contact, "echo", b"", [bytes(MIB)], bulk=True)


async def test_a_peer_that_does_not_read_holds_up_nobody_else(autojump_clock):
    async with world() as w:
        a, b, waiting = await w.peer(0), await w.peer(1), await ambush(w)
        async with trio.open_nursery() as calls:
            calls.start_soon(_unread_call, a, waiting)
            await waiting.next_greeted()
            await trio.testing.wait_all_tasks_blocked()
            for _ in range(5):
                await a.pool.call(b.contact, "echo", b"", [bytes(3 * MIB)], bulk=True)
            assert trio.current_time() < 1


async def test_a_peer_that_drips_its_payload_is_given_up_within_fifteen_seconds(autojump_clock):
    async with world() as w:
        b = await w.peer(1)
        stranger = await greet(w, b)
        await stranger.say(request(1, size=100_000, budget_ms=10**6))
        with pytest.raises(trio.BrokenResourceError):
            await _drip(stranger)
        assert 10 <= trio.current_time() <= 15
        await nothing_left(b)
        assert "bytes a second" in str(b.events[-1].error)


async def _drip(stranger) -> None:
    for _ in range(100):
        await stranger.say((Chunk(id=1), b"x"))
        await trio.sleep(1.0)


async def test_a_late_payload_ends_its_call_at_the_deadline(autojump_clock):
    async with world() as w:
        b = await w.peer(1)
        stranger = await greet(w, b)
        await stranger.say(request(1, size=100_000, budget_ms=3000))
        assert (await stranger.hear()).code == "timeout"
        assert trio.current_time() == pytest.approx(3.0)


async def test_an_idle_connection_is_pinged_and_stays(autojump_clock):
    async with world() as w:
        a, b = await w.peer(0), await w.peer(1)
        await a.pool.call(b.contact, "echo", b"")
        await trio.sleep(200)
        assert len(a.events) == len(b.events) == 1


async def test_a_silent_peer_is_given_up_after_two_pings(autojump_clock):
    async with world() as w:
        b = await w.peer(1)
        stranger = await greet(w, b, channel="control")
        assert [await stranger.hear(), await stranger.hear()] == [Ping(n=1), Ping(n=2)]
        with pytest.raises(EOFError):
            await stranger.hear()
        assert trio.current_time() == pytest.approx(30.0)


async def test_a_ping_is_answered_while_handlers_wait(autojump_clock):
    async with world() as w:
        b = await w.peer(1)
        Waits(b)
        stranger = await greet(w, b)
        await stranger.say(*(request(n, method="wait") for n in range(1, 20, 2)), Ping(n=5))
        assert await stranger.hear() == Pong(n=5)


async def test_a_small_call_is_not_delayed_by_a_large_payload(autojump_clock):
    async with world() as w:
        w.network.set_line(host(0), host(1), Line(latency=0.001, bandwidth=10 * MIB))
        a, b = await w.peer(0), await w.peer(1)
        await a.pool.call(b.contact, "echo", b"")
        async with trio.open_nursery() as calls:
            calls.start_soon(_echo_large, a, b)
            await trio.sleep(1.0)
            for _ in range(20):
                begun = trio.current_time()
                await a.pool.call(b.contact, "echo", b"")
                assert trio.current_time() - begun < 0.01
            calls.cancel_scope.cancel()


async def _echo_large(a: Peer, b: Peer) -> None:
    await a.pool.call(b.contact, "echo", b"", [bytes(60 * MIB)], bulk=True)


async def test_calls_of_one_connection_share_it(autojump_clock):
    async with world() as w:
        w.network.set_line(host(0), host(1), Line(bandwidth=MIB))
        params = PoolParams(bulk_per_peer=1)
        a, b = await w.peer(0, params=params), await w.peer(1)
        async with trio.open_nursery() as calls:
            calls.start_soon(_echo_large, a, b)
            await trio.sleep(5.0)
            begun = trio.current_time()
            await a.pool.call(b.contact, "echo", b"", [bytes(300_000)], bulk=True)
            assert trio.current_time() - begun < 3.0
            calls.cancel_scope.cancel()


# ------------------------------------------------------------------ goodbye
async def test_goodbye_lets_calls_in_flight_finish_and_begins_no_others(autojump_clock):
    async with world() as w:
        b = await w.peer(1)

        async def slow(call: IncomingCall) -> None:
            await trio.sleep(5.0)
            await call.send(b"done")

        b.pool.handlers["slow"] = slow
        stranger = await greet(w, b)
        await stranger.say(request(1, method="slow", budget_ms=9000))
        await trio.testing.wait_all_tasks_blocked()
        async with trio.open_nursery() as drains:
            drains.start_soon(b.pool.drain)
            assert await stranger.hear() == Goodbye(last_id=1)
            await stranger.say(request(3))
            assert await stranger.hear() == Reply(id=1, body=b"done", last=True)
            await stranger.stream.aclose()
        assert trio.current_time() == pytest.approx(5.0)
        assert b.events[-1] == PeerLost(key(9).peer_id, None)


async def test_a_peer_that_stays_after_a_goodbye_is_hung_up_on(autojump_clock):
    async with world() as w:
        b = await w.peer(1)
        stranger = await greet(w, b)
        await b.pool.drain()
        assert trio.current_time() == pytest.approx(QuotaParams().closing)
        assert await stranger.hear() == Goodbye(last_id=0)
        with pytest.raises(EOFError):
            await stranger.hear()


async def test_a_peer_that_says_goodbye_is_let_go_when_nothing_is_left(autojump_clock):
    async with world() as w:
        b = await w.peer(1)
        stranger = await greet(w, b)
        await stranger.say(request(1), Goodbye(last_id=0))
        assert await stranger.hear() == Reply(id=1, last=True)
        with pytest.raises(EOFError):
            await stranger.hear()
        await trio.testing.wait_all_tasks_blocked()
        assert trio.current_time() == 0
        assert b.events[-1] == PeerLost(key(9).peer_id, None)


async def test_a_node_that_is_stopped_says_goodbye_first(autojump_clock):
    async with world() as w:
        b = await w.peer(1)
        stranger = await greet(w, b)
        b.life.cancel()
        assert await stranger.hear() == Goodbye(last_id=0)
        with pytest.raises(EOFError):
            await stranger.hear()


async def test_a_node_that_is_stopped_in_the_middle_of_a_send_says_nothing_more(autojump_clock):
    async with world() as w:
        b = await w.peer(1)
        stranger = await greet(w, b)
        await stranger.say(request(1, size=300_000))
        await stranger.say((Chunk(id=1), bytes(262_144)), (Chunk(id=1), bytes(300_000 - 262_144)))
        await trio.testing.wait_all_tasks_blocked()
        b.life.cancel()
        assert await stranger.hear() == Reply(id=1, size=300_000, last=True)
        with pytest.raises(EOFError):
            await stranger.hear()


async def test_a_connection_ends_with_its_certificate(autojump_clock, monkeypatch):
    monkeypatch.setattr("time.time", lambda: 1000.0 + trio.current_time())
    async with world() as w:
        a, b = await w.peer(0), await w.peer(1)
        dial = a.transport.dial

        async def dial_expiring(address, expect):
            return replace(await dial(address, expect), expires_at=1050.0)

        monkeypatch.setattr(a.transport, "dial", dial_expiring)
        Waits(b)
        with pytest.raises(ConnectionLost, match="certificate"):
            with trio.fail_after(100):
                await a.pool.call(b.contact, "wait", b"")
        assert trio.current_time() == pytest.approx(50.0)


# ------------------------------------------------------------------ limits
async def test_calls_over_the_limit_are_answered_busy_and_the_others_go_on(autojump_clock):
    async with world() as w:
        params = PoolParams(quota=QuotaParams(calls_a_peer=2))
        b = await w.peer(1, params=params)
        Waits(b)
        stranger = await greet(w, b)
        await stranger.say(*(request(n, method="wait") for n in (1, 3, 5)))
        busy = await stranger.hear()
        assert (busy.id, busy.code, busy.retry_after_ms) == (5, "busy", 100)
        await stranger.say(Cancel(id=1))
        assert await stranger.hear() == End(id=1, code="cancelled")
        await stranger.say(request(7))
        assert await stranger.hear() == Reply(id=7, last=True)


async def test_a_deadline_beyond_the_limit_here_is_cut(autojump_clock):
    async with world() as w:
        params = PoolParams(quota=QuotaParams(call_seconds=7.0))
        b = await w.peer(1, params=params)
        Waits(b)
        stranger = await greet(w, b)
        await stranger.say(request(1, method="wait", budget_ms=2**32 - 1))
        assert (await stranger.hear()).code == "timeout"
        assert trio.current_time() == pytest.approx(7.0)


async def test_a_large_payload_crosses_in_one_direction_whole(autojump_clock):
    async with world() as w:
        a, b = await w.peer(0), await w.peer(1)
        payload = random.Random(1).randbytes(MIB) * 64

        async def check(call: IncomingCall) -> None:
            assert call.payload == payload
            await call.send(b"whole")

        b.pool.handlers["check"] = check
        part = await a.pool.call(b.contact, "check", b"", [payload], bulk=True)
        assert part.body == b"whole"

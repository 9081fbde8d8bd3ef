"""The pool: which connection a call takes, who dials whom, and when connections go."""

from __future__ import annotations

from dataclasses import replace

import pytest
import trio
import trio.testing

from p2pmoe import telemetry
from p2pmoe.errors import (
    CallTimeout,
    ConnectionLost,
    NodeClosed,
    NotAllowed,
    PeerBusy,
    PeerUnreachable,
    RemoteProtocolError,
)
from p2pmoe.net.incoming import IncomingCall
from p2pmoe.net.links import CROSSING
from p2pmoe.net.messages import Goodbye, Ping, Reply, Request
from p2pmoe.net.pool import DialFailed, PeerConnected, PeerLost, PoolParams
from p2pmoe.net.quota import QuotaParams
from p2pmoe.testing.memory import Line
from p2pmoe.wire.address import Address
from p2pmoe.wire.peer_record import Contact
from tests.net.pools import (
    PORT,
    Peer,
    Stranger,
    ambush,
    greet,
    hello,
    host,
    key,
    record_of,
    world,
)

MIB = 2**20
NOBODY = Address("nobody", PORT)


def connections(peer: Peer) -> tuple[int, int]:
    """Control and bulk connections that are open."""
    stats = peer.pool.stats()
    return (
        stats['p2pmoe_connections{class="control"}'],
        stats['p2pmoe_connections{class="bulk"}'],
    )


def dials(peer: Peer) -> list[Address]:
    """The addresses that the peer dials, from now on."""
    seen: list[Address] = []
    dial = peer.transport.dial

    async def count(address, expect):
        seen.append(address)
        return await dial(address, expect)

    peer.transport.dial = count
    return seen


async def echoes(caller: Peer, called: Peer, count: int, **kwargs) -> None:
    async with trio.open_nursery() as calls:
        for _ in range(count):
            calls.start_soon(lambda: caller.pool.call(called.contact, "echo", b"", **kwargs))


# ------------------------------------------------------------------ calls
async def test_a_call_is_answered_by_the_peer_that_it_names(autojump_clock):
    async with world() as w:
        a, b = await w.peer(0), await w.peer(1)
        part = await a.pool.call(b.contact, "echo", b"hello", [b"x", bytearray(b"yz")])
        assert (part.body, bytes(part.payload)) == (b"hello", b"xyz")
        assert not part.payload.readonly


@pytest.mark.parametrize("size", [0, 1, 256 * 1024 + 1, 9 * MIB])
async def test_payloads_of_any_size_come_back_whole(size, autojump_clock):
    async with world() as w:
        a, b = await w.peer(0), await w.peer(1)
        payload = bytes(i % 251 for i in range(1000)) * (size // 1000) + bytes(size % 1000)
        part = await a.pool.call(b.contact, "echo", b"", [payload], bulk=True)
        assert part.payload == payload


async def test_a_call_is_begun_at_once_where_a_connection_is_open(autojump_clock):
    async with world() as net:
        a, b = await net.peer(1), await net.peer(2)
        assert a.pool.open_connection(b.contact, bulk=True) is None
        await a.pool.call(b.contact, "echo", b"x", bulk=True)
        connection = a.pool.open_connection(b.contact, bulk=True)
        call = connection.ask("echo", b"x", [b"yz"], 5.0)
        taken = []

        def news() -> None:
            while (part := call.take()) is not None:
                taken.append((part.body, bytes(part.payload)))

        call.news = news
        await trio.sleep(1)
        assert taken == [(b"x", b"yz")]
        assert call.over
        assert a.pool.stats()['p2pmoe_calls_in_flight{side="client"}'] == 0


async def test_a_call_may_be_closed_at_the_news_of_its_last_part(autojump_clock):
    async with world() as net:
        a, b = await net.peer(1), await net.peer(2)
        await a.pool.call(b.contact, "echo", b"x", bulk=True)
        call = a.pool.open_connection(b.contact, bulk=True).ask("echo", b"x", (), 5.0)
        call.news = call.close
        await trio.sleep(1)
        assert call.over
        await a.pool.call(b.contact, "echo", b"y", bulk=True)
        assert connections(a) == (0, 1)


async def test_many_calls_share_one_dial(autojump_clock):
    async with world() as w:
        a, b = await w.peer(0), await w.peer(1)
        dialled = dials(a)
        await echoes(a, b, 50)
        assert dialled == [b.address]
        assert connections(a) == connections(b) == (1, 0)
        assert [type(event) for event in a.events + b.events] == [PeerConnected] * 2


async def test_small_and_large_calls_have_connections_of_their_own(autojump_clock):
    async with world() as w:
        a, b = await w.peer(0), await w.peer(1)
        await echoes(a, b, 2)
        await echoes(a, b, 2, bulk=True)
        assert connections(a) == connections(b) == (1, 1)


async def test_a_payload_that_waits_makes_the_pool_dial_one_more_bulk_connection(autojump_clock):
    async with world() as w:
        w.network.set_line(host(0), host(1), Line(bandwidth=10 * MIB))
        a, b = await w.peer(0), await w.peer(1)
        dialled = dials(a)
        await echoes(a, b, 5, payload=[bytes(4 * MIB)], bulk=True)
        await echoes(a, b, 5, payload=[bytes(4 * MIB)], bulk=True)
        assert connections(a) == connections(b) == (0, 2)
        assert len(dialled) == 2


async def test_no_more_bulk_connections_are_dialled_than_the_other_side_takes(autojump_clock):
    async with world() as w:
        w.network.set_line(host(0), host(1), Line(bandwidth=10 * MIB))
        params = PoolParams(quota=QuotaParams(connections_a_peer=1))
        a, b = await w.peer(0), await w.peer(1, params=params)
        dialled = dials(a)
        for _ in range(3):
            await echoes(a, b, 5, payload=[bytes(4 * MIB)], bulk=True)
        assert connections(a) == (0, 1)
        assert len(dialled) == 2
        assert a.pool.usable(b.keys.peer_id)


async def test_an_accepted_connection_carries_calls_back(autojump_clock):
    async with world() as w:
        a, b = await w.peer(0, listens=False), await w.peer(1)
        await a.pool.call(b.contact, "echo", b"")
        nowhere = Contact(a.keys.peer_id, ())
        assert (await b.pool.call(nowhere, "echo", b"back")).body == b"back"


async def test_a_peer_without_an_address_and_connection_cannot_be_reached(autojump_clock):
    async with world() as w:
        a = await w.peer(0)
        with pytest.raises(PeerUnreachable, match="no address") as caught:
            await a.pool.call(Contact(key(5).peer_id, ()), "echo", b"")
        assert caught.value.stage == "resolve"


async def test_a_node_does_not_call_itself(autojump_clock):
    async with world() as w:
        a = await w.peer(0)
        with pytest.raises(NotAllowed):
            await a.pool.call(a.contact, "echo", b"")


async def test_a_caller_without_a_deadline_gets_thirty_seconds(autojump_clock):
    async with world() as w:
        a, b = await w.peer(0), await w.peer(1)
        deadlines = []

        async def wait(call: IncomingCall) -> None:
            deadlines.append(trio.current_effective_deadline() - trio.current_time())
            await trio.sleep_forever()

        b.pool.handlers["wait"] = wait
        with pytest.raises(CallTimeout) as caught:
            await a.pool.call(b.contact, "wait", b"")
        assert trio.current_time() == pytest.approx(30.0, abs=0.1)
        assert caught.value.peer == b.keys.peer_id.short
        async with a.pool.open_call(b.contact, "wait", b""):
            await trio.testing.wait_all_tasks_blocked()
        with trio.move_on_after(5.0):
            await a.pool.call(b.contact, "wait", b"")
        assert deadlines == [pytest.approx(30.0), pytest.approx(30.0), pytest.approx(5.0)]


@pytest.mark.parametrize("count", [0, 2])
async def test_a_call_for_one_part_takes_no_other_number(count, autojump_clock):
    async with world() as w:
        a, b = await w.peer(0), await w.peer(1)

        async def parts(call: IncomingCall) -> None:
            for _ in range(count):
                await call.send(b"")

        b.pool.handlers["parts"] = parts
        with pytest.raises(RemoteProtocolError, match=f"{count} parts"):
            await a.pool.call(b.contact, "parts", b"")


async def test_parts_are_yielded_as_they_come(autojump_clock):
    async with world() as w:
        a, b = await w.peer(0), await w.peer(1)

        async def parts(call: IncomingCall) -> None:
            for n in range(3):
                await trio.sleep(1.0)
                await call.send(bytes([n]), [bytes(n)])

        b.pool.handlers["parts"] = parts
        async with a.pool.open_call(b.contact, "parts", b"") as answer:
            got = [(trio.current_time(), part.body, len(part.payload)) async for part in answer]
            assert [part async for part in answer] == []
        assert got == [(1.0, b"\0", 0), (2.0, b"\1", 1), (3.0, b"\2", 2)]


# ------------------------------------------------------------------ dialling
async def test_a_cancelled_caller_does_not_end_the_dial_of_others(autojump_clock):
    async with world() as w:
        w.network.set_line(host(0), host(1), Line(latency=0.5))
        a, b = await w.peer(0), await w.peer(1)
        async with trio.open_nursery() as calls:
            with trio.move_on_after(0.1) as first:
                calls.start_soon(echoes, a, b, 1)
                await a.pool.call(b.contact, "echo", b"")
        assert first.cancelled_caught
        assert trio.current_time() == pytest.approx(4.0)


async def test_all_addresses_are_tried(autojump_clock):
    async with world() as w:
        a, b = await w.peer(0), await w.peer(1)
        contact = Contact(b.keys.peer_id, (NOBODY, Address("nobody", 1), b.address))
        assert (await a.pool.call(contact, "echo", b"hi")).body == b"hi"
        assert trio.current_time() < 0.01


async def test_an_address_that_leads_nowhere_delays_the_next_a_quarter_second(autojump_clock):
    async with world() as w:
        a, b = await w.peer(0), await w.peer(1)
        w.network.partition([host(0), host(1)], ["hole"])
        contact = Contact(b.keys.peer_id, (Address("hole", 1), b.address, NOBODY))
        await a.pool.call(contact, "echo", b"")
        assert trio.current_time() == pytest.approx(0.25)


async def test_the_slower_of_two_addresses_is_let_go(autojump_clock):
    async with world() as w:
        w.network.set_line(host(0), host(1), Line(latency=0.2))
        a, b = await w.peer(0), await w.peer(1)
        contact = Contact(b.keys.peer_id, (b.address, b.address, b.address))
        await a.pool.call(contact, "echo", b"")
        await trio.sleep(10)
        assert connections(b) == (1, 0)


async def test_a_peer_that_answers_nowhere_says_of_each_address_why(autojump_clock):
    async with world() as w:
        a, b = await w.peer(0), await w.peer(1)
        contact = Contact(key(5).peer_id, (NOBODY, b.address))
        with pytest.raises(PeerUnreachable) as caught:
            await a.pool.call(contact, "echo", b"")
        assert "nobody:4747: connect: connection refused" in str(caught.value)
        assert f"peer {b.keys.peer_id} answers there" in str(caught.value)


async def test_a_dial_is_cancelled_with_the_node_and_its_callers_are_told(autojump_clock):
    async with world() as w:
        a = await w.peer(0)
        w.network.partition([host(0)], ["hole"])
        contact = Contact(key(5).peer_id, (Address("hole", 1), Address("hole", 2)))
        async with trio.open_nursery() as calls:
            calls.start_soon(_closed_call, a, contact)
            await trio.sleep(1.0)
            a.life.cancel()
        await _closed_call(a, contact)


async def _closed_call(a: Peer, contact: Contact) -> None:
    with pytest.raises(NodeClosed):
        await a.pool.call(contact, "echo", b"")


async def test_a_dial_that_crashes_is_an_unreachable_peer(autojump_clock, monkeypatch):
    events = []
    monkeypatch.setattr(telemetry, "emit", lambda event, **fields: events.append(event))
    async with world() as w:
        a, b = await w.peer(0), await w.peer(1)

        async def crash(address, expect):
            raise ZeroDivisionError

        monkeypatch.setattr(a.transport, "dial", crash)
        with pytest.raises(PeerUnreachable, match="ZeroDivisionError"):
            await a.pool.call(b.contact, "echo", b"")
        assert "net.dial.crashed" in events


async def test_an_unknown_peer_is_met_by_its_address(autojump_clock):
    async with world() as w:
        a, b = await w.peer(0), await w.peer(1)
        greeted = await a.pool.connect(b.address)
        assert greeted.peer == b.keys.peer_id
        assert greeted.record.body.addresses == (str(b.address),)
        dialled = dials(a)
        await a.pool.call(b.contact, "echo", b"")
        assert dialled == []
        with pytest.raises(PeerUnreachable):
            await a.pool.connect(NOBODY)
        assert a.pool.usable(b.keys.peer_id)


async def test_meeting_a_peer_again_keeps_one_connection(autojump_clock):
    async with world() as w:
        a, b = await w.peer(0), await w.peer(1)
        for _ in range(4):
            await a.pool.connect(b.address)
            await trio.sleep(1.0)
        assert connections(a) == connections(b) == (1, 0)


async def test_those_who_meet_a_peer_at_once_share_one_dial(autojump_clock):
    async with world() as w:
        a, b = await w.peer(0), await w.peer(1)
        dialled = dials(a)
        named = replace(b.address, peer_prefix=b.keys.peer_id.hex)
        async with trio.open_nursery() as meetings:
            for _ in range(20):
                meetings.start_soon(a.pool.connect, named)
                meetings.start_soon(a.pool.call, b.contact, "echo", b"")
        assert len(dialled) == 1
        assert connections(a) == connections(b) == (1, 0)


async def test_those_who_meet_nobody_at_once_are_told_so_by_one_dial(autojump_clock):
    async with world() as w:
        a = await w.peer(0)
        dialled, failed = dials(a), []

        async def meet() -> None:
            try:
                await a.pool.connect(NOBODY)
            except PeerUnreachable as error:
                failed.append(error)

        async with trio.open_nursery() as meetings:
            for _ in range(20):
                meetings.start_soon(meet)
        assert len(set(map(id, failed))) == 20
        assert len(dialled) == 1


async def test_who_gives_up_on_a_shared_dial_ends_it_for_nobody_else(autojump_clock):
    async with world() as w:
        a, b = await w.peer(0), await w.peer(1)
        w.network.set_line(host(0), host(1), Line(latency=1.0))
        dialled = dials(a)
        with trio.move_on_after(0.5) as patience:
            await a.pool.connect(b.address)
        assert patience.cancelled_caught
        assert (await a.pool.connect(b.address)).peer == b.keys.peer_id
        assert len(dialled) == 1


async def test_a_dial_of_another_peer_at_that_address_is_not_shared(autojump_clock):
    async with world() as w:
        a, b = await w.peer(0), await w.peer(1)
        wrong = Contact(key(5).peer_id, (b.address,))
        dialled = dials(a)
        async with trio.open_nursery() as meetings:

            @meetings.start_soon
            async def _() -> None:
                with pytest.raises(NotAllowed):
                    await a.pool.call(wrong, "echo", b"")

            meetings.start_soon(a.pool.connect, b.address)
        assert len(dialled) == 2


async def test_a_peer_that_dials_meanwhile_is_dialled_all_the_same(autojump_clock):
    async with world() as w:
        a, b = await w.peer(0), await w.peer(1)
        w.network.set_line(host(0), host(1), Line(latency=0.5))
        dialled, named = dials(a), replace(b.address, peer_prefix=b.keys.peer_id.hex)
        async with trio.open_nursery() as meetings:
            meetings.start_soon(b.pool.call, a.contact, "echo", b"")
            await trio.sleep(0.3)
            meetings.start_soon(a.pool.call, b.contact, "echo", b"")
            await trio.sleep(0.1)
            assert (await a.pool.connect(named)).peer == b.keys.peer_id
        assert dialled == [b.address, named]  # the first served the call by what b had dialled
        assert [each.outbound for each in a.events if isinstance(each, PeerConnected)][-1]


async def test_too_many_dials_at_once_are_refused(autojump_clock):
    async with world() as w:
        a = await w.peer(0)
        w.network.partition([host(0)], ["hole"])
        caught = []

        async def meet(port: int) -> None:
            try:
                await a.pool.connect(Address("hole", port))
            except (PeerBusy, PeerUnreachable) as error:
                caught.append(type(error))

        async with trio.open_nursery() as calls:
            for port in range(1, 301):
                calls.start_soon(meet, port)
        assert caught.count(PeerUnreachable) >= 256
        assert caught.count(PeerBusy) >= 40


# ------------------------------------------------------------------ back-off
async def test_a_peer_that_refuses_is_not_asked_again_until_its_back_off_ends(autojump_clock):
    async with world() as w:
        a = await w.peer(0)
        dialled = dials(a)
        contact = Contact(key(5).peer_id, (NOBODY,))
        assert a.pool.usable(contact.peer)
        with pytest.raises(PeerUnreachable, match="refused"):
            await a.pool.call(contact, "echo", b"")
        assert not a.pool.usable(contact.peer)
        with pytest.raises(PeerUnreachable, match="a dial failed a moment ago") as caught:
            await a.pool.call(contact, "echo", b"")
        assert 0.5 <= caught.value.retry_after <= 0.75
        assert len(dialled) == 1
        assert [type(event) for event in a.events] == [DialFailed]
        await trio.sleep(caught.value.retry_after)
        assert a.pool.usable(contact.peer)
        with pytest.raises(PeerUnreachable, match="refused"):
            await a.pool.call(contact, "echo", b"")
        await trio.sleep(0.9)
        assert not a.pool.usable(contact.peer)


async def test_a_peer_that_dials_ends_its_own_back_off(autojump_clock):
    async with world() as w:
        a, b = await w.peer(0), await w.peer(1)
        wrong = Contact(b.keys.peer_id, (NOBODY,))
        with pytest.raises(PeerUnreachable):
            await a.pool.call(wrong, "echo", b"")
        assert not a.pool.usable(b.keys.peer_id)
        await b.pool.call(a.contact, "echo", b"")
        assert a.pool.usable(b.keys.peer_id)
        await a.pool.call(wrong, "echo", b"")


async def test_callers_need_not_wait_for_their_dial_when_the_peer_dials(autojump_clock):
    async with world() as w:
        a, b = await w.peer(0), await w.peer(1)
        w.network.partition([host(0), host(1)], ["hole"])
        contact = Contact(b.keys.peer_id, (Address("hole", 1),))
        async with trio.open_nursery() as calls:
            calls.start_soon(a.pool.call, contact, "echo", b"")
            await trio.sleep(1.0)
            await b.pool.call(a.contact, "echo", b"")
        assert trio.current_time() == pytest.approx(1.0)
        await trio.sleep(10.0)
        await a.pool.call(contact, "echo", b"")


async def test_a_failed_dial_does_not_matter_where_the_peer_has_dialled(autojump_clock):
    async with world() as w:
        a, b = await w.peer(0), await w.peer(1)
        w.network.set_line(host(0), host(1), Line(latency=1.0))
        w.network.break_after(host(0), host(1), 10)
        async with trio.open_nursery() as calls:
            calls.start_soon(a.pool.call, b.contact, "echo", b"")
            await trio.sleep(3.9)
            w.network.set_line(host(0), host(1), Line())
            w.network.break_after(host(0), host(1), None)
            await b.pool.call(a.contact, "echo", b"")
        assert connections(a) == (1, 0)


async def test_the_peers_that_are_remembered_are_bounded(autojump_clock):
    async with world() as w:
        a, b = (
            await w.peer(0, params=PoolParams(quota=QuotaParams(peers_remembered=2))),
            await w.peer(1),
        )
        await a.pool.call(b.contact, "echo", b"")
        for n in range(5, 12):
            with pytest.raises(PeerUnreachable):
                await a.pool.call(Contact(key(n).peer_id, (NOBODY,)), "echo", b"")
        assert a.pool.usable(key(5).peer_id)
        assert not a.pool.usable(key(11).peer_id)
        assert connections(a) == (1, 0)


# ------------------------------------------------------------------ crossing dials
@pytest.mark.parametrize("seed", range(5))
async def test_of_two_crossing_dials_the_one_of_the_lower_id_stays(seed, autojump_clock):
    async with world(seed) as w:
        w.network.set_line(host(0), host(1), Line(latency=0.1, jitter=0.1))
        a, b = await w.peer(0), await w.peer(1)
        assert a.keys.peer_id < b.keys.peer_id
        async with trio.open_nursery() as calls:
            for _ in range(5):
                calls.start_soon(echoes, a, b, 5)
                calls.start_soon(echoes, b, a, 5)
        await trio.sleep(5.0)
        assert connections(a) == connections(b) == (1, 0)
        [kept] = a.pool._connections()
        assert kept.outbound
        assert [type(event) for event in a.events] == [PeerConnected] * 2


async def test_a_peer_that_was_restarted_is_reached_on_its_new_connection(autojump_clock):
    async with world() as w:
        a, b = await w.peer(0), await w.peer(1)
        await a.pool.call(b.contact, "echo", b"")
        await trio.sleep(CROSSING)
        again = await greet(w, a, number=1, channel="control")
        assert isinstance(await again.hear(), Ping)
        assert connections(a) == (1, 0)
        async with trio.open_nursery() as calls:
            calls.start_soon(a.pool.call, b.contact, "echo", b"to the new one")
            assert (await again.hear()).body == b"to the new one"
            calls.cancel_scope.cancel()


async def test_connections_of_an_earlier_run_of_a_peer_are_dropped(autojump_clock):
    async with world() as w:
        a, b = await w.peer(0), await w.peer(1)
        await b.pool.call(a.contact, "echo", b"")
        await b.pool.call(a.contact, "echo", b"", bulk=True)
        w.network.partition([host(0)], [host(1)])
        b.life.cancel()
        await trio.sleep(3.0)
        assert connections(a) == (1, 1)
        w.network.heal()
        w.network.partition([host(0), "elsewhere"], [host(1)])
        address = Address("elsewhere", PORT)
        record = record_of(b.keys, address, epoch=2)
        again = Stranger(await w.network.transport(b.keys, "elsewhere").dial(a.address, None))
        await again.say(hello(channel="control", record=record))
        await again.hear()
        await trio.testing.wait_all_tasks_blocked()
        assert connections(a) == (1, 0)
        assert not any(isinstance(event, PeerLost) for event in a.events)


# ------------------------------------------------------------------ calls that were not begun
async def test_a_call_that_crosses_a_goodbye_is_asked_again(autojump_clock):
    async with world() as w:
        a, waiting = await w.peer(0), await ambush(w)
        async with trio.open_nursery() as calls:
            calls.start_soon(a.pool.call, waiting.contact, "echo", b"", [b"payload"])
            first = await waiting.next_greeted()
            assert isinstance(await first.hear(), Request)
            await first.say(Goodbye(last_id=0))
            second = await waiting.next_greeted()
            again, payload = await second.hear_frame()
            assert (again.id, again.size, payload) == (1, 0, b"payload")
            await second.say(Reply(id=1, last=True))


async def test_a_call_that_was_begun_is_not_asked_again(autojump_clock):
    async with world() as w:
        a, waiting = await w.peer(0), await ambush(w)
        async with trio.open_nursery() as calls:
            calls.start_soon(_lost_call, a, waiting.contact)
            first = await waiting.next_greeted()
            await first.hear()
            await first.say(Goodbye(last_id=1))
            await first.stream.aclose()


async def _lost_call(a: Peer, contact: Contact) -> None:
    with pytest.raises(ConnectionLost):
        await a.pool.call(contact, "echo", b"")


async def test_a_peer_that_always_says_goodbye_is_given_up(autojump_clock):
    async with world() as w:
        a, waiting = await w.peer(0), await ambush(w)
        async with trio.open_nursery() as calls:
            calls.start_soon(_unreachable_call, a, waiting.contact)
            for _ in range(3):
                stranger = await waiting.next_greeted()
                await stranger.hear()
                await stranger.say(Goodbye(last_id=0))


async def test_connections_that_end_at_once_are_given_up(autojump_clock):
    async with world() as w:
        a, waiting = await w.peer(0), await ambush(w)
        async with trio.open_nursery() as calls:
            calls.start_soon(_unreachable_call, a, waiting.contact)
            for _ in range(9):
                stranger = await waiting.next()
                said = await stranger.hear()
                await stranger.say(hello(channel=said.channel), Goodbye(last_id=0))
                await trio.testing.wait_all_tasks_blocked()
                if not calls.child_tasks:
                    break


async def _unreachable_call(a: Peer, contact: Contact) -> None:
    with pytest.raises(PeerUnreachable):
        await a.pool.call(contact, "echo", b"")


# ------------------------------------------------------------------ idle connections
async def test_idle_connections_are_closed_and_dialled_again_when_needed(autojump_clock):
    async with world() as w:
        params = PoolParams(idle=60.0)
        a, b = await w.peer(0, params=params), await w.peer(1)
        await echoes(a, b, 1)
        await echoes(a, b, 1, bulk=True)
        await trio.sleep(45.0)
        await echoes(a, b, 1)
        await trio.sleep(45.0)
        assert connections(a) == connections(b) == (1, 0)
        await trio.sleep(45.0)
        assert connections(a) == connections(b) == (0, 0)
        assert a.events[-1] == PeerLost(b.keys.peer_id, None)
        assert b.events[-1] == PeerLost(a.keys.peer_id, None)
        await echoes(a, b, 1)


async def test_a_connection_with_a_call_in_flight_is_not_idle(autojump_clock):
    async with world() as w:
        a, b = await w.peer(0, params=PoolParams(idle=20.0)), await w.peer(1)

        async def slow(call: IncomingCall) -> None:
            await trio.sleep(100.0)
            await call.send(b"")

        b.pool.handlers["slow"] = slow
        with trio.fail_after(200.0):
            await a.pool.call(b.contact, "slow", b"")


async def test_of_too_many_control_connections_the_least_used_go(autojump_clock):
    async with world() as w:
        a = await w.peer(0, params=PoolParams(control_connections=3))
        others = [await w.peer(n) for n in range(1, 7)]
        for other in others:
            await echoes(a, other, 1)
            await trio.sleep(1.0)
        await echoes(a, others[0], 1, bulk=True)
        await echoes(a, others[0], 1)
        await trio.sleep(20.0)
        assert connections(a) == (3, 1)
        kept = [other for other in others if connections(other)[0]]
        assert kept == [others[0], others[4], others[5]]


# ------------------------------------------------------------------ the end
async def test_forgetting_a_peer_loses_its_calls_now(autojump_clock):
    async with world() as w:
        a, waiting = await w.peer(0), await ambush(w)
        async with trio.open_nursery() as calls:
            calls.start_soon(_lost_call, a, waiting.contact)
            stranger = await waiting.next_greeted()
            await stranger.hear()
            a.pool.forget(waiting.contact.peer)
            a.pool.forget(key(3).peer_id)
        with pytest.raises(EOFError):
            await stranger.hear()
        await trio.testing.wait_all_tasks_blocked()
        assert "dropped" in str(a.events[-1].error)


async def test_draining_waits_for_calls_in_flight_and_refuses_new_ones(autojump_clock):
    async with world() as w:
        a, b, c = await w.peer(0), await w.peer(1), await w.peer(2)

        async def slow(call: IncomingCall) -> None:
            await trio.sleep(3.0)
            await call.send(b"done")

        b.pool.handlers["slow"] = slow
        await b.pool.call(c.contact, "echo", b"")
        answers = []

        async def ask() -> None:
            answers.append((await a.pool.call(b.contact, "slow", b"")).body)

        async with trio.open_nursery() as calls:
            calls.start_soon(ask)
            await trio.sleep(1.0)
            await b.pool.drain()
        assert answers == [b"done"]
        assert trio.current_time() == pytest.approx(3.0)
        assert connections(b) == (0, 0)
        with pytest.raises(NodeClosed):
            await b.pool.call(c.contact, "echo", b"")
        with pytest.raises(PeerBusy, match="shutting down"):
            await c.pool.call(b.contact, "echo", b"")
        assert [event for event in a.events if isinstance(event, PeerLost)] == [
            PeerLost(b.keys.peer_id, None)
        ]


async def test_draining_takes_no_longer_than_its_caller_allows(autojump_clock):
    async with world() as w:
        a, b = await w.peer(0), await w.peer(1)
        b.pool.handlers["wait"] = _wait
        async with trio.open_nursery() as calls:
            calls.start_soon(_lost_call_to, a, b.contact)
            await trio.sleep(1.0)
            with trio.move_on_after(5.0):
                await b.pool.drain()
            assert trio.current_time() == pytest.approx(6.0)
            b.life.cancel()


async def _wait(call: IncomingCall) -> None:
    await trio.sleep_forever()


async def _lost_call_to(a: Peer, contact: Contact) -> None:
    with pytest.raises(ConnectionLost):
        await a.pool.call(contact, "wait", b"")


async def test_a_connection_made_while_draining_is_let_go(autojump_clock):
    async with world() as w:
        w.network.set_line(host(0), host(1), Line(latency=0.5))
        a, b = await w.peer(0), await w.peer(1)
        async with trio.open_nursery() as calls:
            calls.start_soon(_closed_call, a, b.contact)
            await trio.sleep(1.0)
            await a.pool.drain()
        await trio.sleep(10.0)
        assert connections(a) == connections(b) == (0, 0)


async def test_a_stopped_pool_lets_nobody_in(autojump_clock):
    async with world() as w:
        a, b = await w.peer(0), await w.peer(1)
        await b.pool.drain()
        with pytest.raises(PeerBusy, match="shutting down"):
            await a.pool.call(b.contact, "echo", b"")
        assert b.events == []


async def test_what_is_to_be_asked_soon_is_composed_once_in_the_writers_turn(autojump_clock):
    async with world() as w:
        a, b = await w.peer(0), await w.peer(1)
        await a.pool.call(b.contact, "echo", b"")
        connection = a.pool.open_connection(b.contact, bulk=False)
        composed, answers = [], []

        def compose() -> None:
            composed.append(connection.open)
            if connection.open:
                answers.append(connection.ask("echo", b"soon", (), 1.0))

        connection.soon(compose)
        connection.soon(compose)
        assert composed == []
        await trio.testing.wait_all_tasks_blocked()
        await trio.sleep(1)
        assert composed == [True, True]
        assert [answer.take().body for answer in answers] == [b"soon", b"soon"]
        connection.soon(compose)
        connection.drop(ConnectionLost("of a test"))
        await trio.testing.wait_all_tasks_blocked()
        assert composed == [True, True, False]

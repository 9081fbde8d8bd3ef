"""The rules of a whole connection: who may send what, GOODBYE, signs of life, the end."""

from __future__ import annotations

import pytest

from p2pmoe.errors import ConnectionLost, LocalProtocolError, NotAllowed
from p2pmoe.net.calls import CallEnded, CallLost
from p2pmoe.net.messages import Chunk, End, Goodbye, Hello, Ping, Pong, Refuse, Reply, Request
from tests.net.sides import CHUNK, MIB, Side, asking, pair, pump, request, violation

SIZE = 2 * CHUNK
BROKEN = {
    "a second hello": (
        "exchange.second_hello",
        [Hello(version_min=1, version_max=1, network=bytes(32), channel="bulk")],
    ),
    "an id of the wrong side": ("exchange.id", [request(2)]),
    "an id used again": ("exchange.id", [request(3), request(3)]),
    "an id that goes back": ("exchange.id", [request(3), request(1)]),
    "a chunk for a call never begun": ("exchange.id", [(Chunk(id=1), b"x")]),
    "a chunk without a byte": ("exchange.chunk_size", [request(1, 1), (Chunk(id=1), b"")]),
    "a chunk that is too long": (
        "exchange.chunk_size",
        [request(1, SIZE), (Chunk(id=1), bytes(CHUNK + 1))],
    ),
    "more bytes than announced": (
        "exchange.too_many_bytes",
        [request(1, 3), (Chunk(id=1), b"abcd")],
    ),
    "bytes after the payload": (
        "exchange.too_many_bytes",
        [request(1, 1), (Chunk(id=1), b"a"), (Chunk(id=1), b"b")],
    ),
    "a payload behind another header": ("exchange.payload", [(Ping(n=1), b"x")]),
    "a payload that is too long for its request's frame": (
        "exchange.payload",
        [(request(1), bytes(101))],
    ),
    "a payload in a request's frame and behind it": (
        "exchange.payload",
        [(request(1, 101), b"x")],
    ),
    "a payload that could be in its request's frame": ("exchange.payload", [request(1, 100)]),
    "a reply to nothing": ("exchange.id", [Reply(id=2)]),
    "a part's bytes for nothing": ("exchange.id", [(Chunk(id=2), b"x")]),
    "an end of nothing": ("exchange.id", [End(id=2)]),
    "a pong that was not asked": ("exchange.pong", [Pong(n=1)]),
    "a second goodbye": ("exchange.after_goodbye", [Goodbye(last_id=0), Goodbye(last_id=0)]),
    "a call after a goodbye": ("exchange.after_goodbye", [Goodbye(last_id=0), request(1)]),
    "a goodbye that names a call never made": ("exchange.id", [Goodbye(last_id=2)]),
    "a goodbye that names a call of its own": ("exchange.id", [request(1), Goodbye(last_id=1)]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_breaks_the_rules_is_refused(name):
    why, messages = BROKEN[name]
    b = Side(dialler=False, inline_bytes=100 if "request's frame" in name else 0)
    *before, last = [each if isinstance(each, tuple) else (each, b"") for each in messages]
    for message, payload in before:
        b.receive(message, payload)
    with violation(why):
        b.receive(*last)


def test_a_refusal_is_raised_as_the_error_that_it_names():
    with pytest.raises(NotAllowed, match="you are out"):
        Side(dialler=True).receive(Refuse(code="not_allowed", detail="you are out"))


def test_goodbye_lets_calls_in_flight_finish():
    a, b = pair()
    there, back = asking(a), asking(b)
    pump(a, b)
    a.core.leave()
    a.core.leave()
    assert not a.core.open
    pump(a, b)
    assert not b.core.open
    for side in (a, b):
        assert not side.core.parted
        with pytest.raises(LocalProtocolError):
            asking(side)
    b.core.reply(there, b"still")
    b.core.end(there)
    a.core.end(back)
    assert not a.core.finished
    pump(a, b)
    assert a.parts[0].part.body == b"still"
    assert a.core.finished
    assert b.core.finished
    assert b.core.left
    assert not a.core.left


def test_a_connection_without_a_goodbye_is_not_finished():
    a, _ = pair()
    assert not a.core.finished


def test_goodbye_names_the_last_call_that_is_answered():
    a, b = pair()
    taken = asking(a)
    pump(a, b)
    crossing, cancelled = asking(a, bytes(MIB)), asking(a)
    outs = list(iter(a.core.next_frame, None))
    a.core.cancel(cancelled)
    b.core.leave()
    [goodbye] = b.headers()
    assert goodbye == Goodbye(last_id=taken)
    for out in outs:
        b.deliver(out)
    assert len(b.arrived) == 1
    assert b.account.calls == 1
    assert a.receive(goodbye) == [CallLost(crossing, begun=False)]
    b.core.end(taken)
    pump(a, b)
    assert a.over[-1] == CallEnded(taken)
    assert a.core.finished


def test_goodbye_goes_behind_the_calls_that_wait_to_be_sent():
    a = Side(dialler=True)
    asking(a, b"payload")
    a.core.tick(10.0)
    a.core.leave()
    assert [type(header) for header in a.headers()] == [Ping, Request, Goodbye, Chunk]


def test_a_goodbye_before_any_call_names_none():
    a, b = pair()
    b.core.leave()
    asking(a)
    assert b.headers() == [Goodbye(last_id=0)]
    assert a.receive(Goodbye(last_id=0)) == [CallLost(1, begun=False)]


def test_a_silent_peer_is_asked_twice_and_then_gone():
    a = Side(dialler=True)
    assert a.core.next_deadline() == 10.0
    a.core.tick(9.9)
    assert a.headers() == []
    for n, now in ((1, 10.0), (2, 20.0)):
        a.core.tick(now)
        assert a.headers() == [Ping(n=n)]
    assert a.core.next_deadline() == 30.0
    with pytest.raises(ConnectionLost):
        a.core.tick(30.0)


def test_any_byte_is_a_sign_of_life():
    a = Side(dialler=True)
    for n in range(1, 20):
        a.core.tick(n * 10.0)
        a.core.heard(1, n * 10.0 + 5, inside_frame=False)
    assert a.core.next_deadline() == 205.0


def test_a_ping_is_answered_with_its_number():
    a, b = pair()
    a.core.tick(10.0)
    pump(a, b)
    a.core.tick(20.0)
    pump(a, b)
    a.core.tick(25.0)
    assert b.receive(Ping(n=77)) == []
    assert b.headers() == [Pong(n=77)]


def test_a_pong_comes_once():
    a = Side(dialler=True)
    a.core.tick(10.0)
    a.receive(Pong(n=1))
    with violation("exchange.pong"):
        a.receive(Pong(n=1))


@pytest.mark.parametrize("what", ["frame", "request", "part"])
def test_what_has_begun_and_stops_ends_the_connection(what):
    side = Side(dialler=True)
    if what == "request":
        side.receive(Request(id=2, method="x", budget_ms=10**6, size=10))
    elif what == "part":
        call = asking(side)
        side.sent()
        side.receive(Reply(id=call, size=10))
    side.core.heard(5, 0.0, inside_frame=what == "frame")
    side.core.tick(10.0)
    with pytest.raises(ConnectionLost, match="bytes a second"):
        side.core.tick(11.0)


def test_what_is_whole_may_rest():
    side = Side(dialler=True)
    side.receive(Request(id=2, method="x", budget_ms=10**6, size=1))
    side.core.heard(5, 0.0, inside_frame=False)
    side.receive(Chunk(id=2), b"x")
    side.core.heard(5, 1.0, inside_frame=False)
    for now in (11.0, 21.0):
        side.core.tick(now)


def test_a_part_that_waits_for_credit_of_this_side_is_not_slow():
    a, b = pair()
    call = asking(a)
    pump(a, b)
    for _ in range(20):
        b.core.reply(call, b"", [bytes(MIB)])
    pump(a, b)
    a.core.heard(1, 0.0, inside_frame=False)
    assert a.core.next_deadline() == 10.0
    a.core.tick(10.0)
    a.core.tick(11.0)


def test_a_lost_connection_has_nothing_more_to_send():
    a, b = pair()
    asking(a)
    pump(a, b)
    [call] = b.arrived
    b.core.reply(call.id, b"", [bytes(2 * MIB)])
    b.core.end(call.id)
    b.core.close()
    assert b.core.unsent_bytes == 0
    assert b.core.next_frame() is None


def test_a_lost_connection_gives_back_all_that_it_held():
    a, b = pair()
    begun = asking(a)
    ended = asking(a, bytes(10))
    pump(a, b)
    b.core.end(ended)
    cancelled = asking(a)
    partial = asking(a, bytes(3 * MIB))
    for out in iter(a.core.next_frame, None):
        b.deliver(out)
    a.core.cancel(cancelled)
    a.receive(Reply(id=begun, size=10))
    unsent = asking(a)
    assert a.core.close() == [
        CallLost(begun, begun=True),
        CallLost(ended, begun=True),
        CallLost(partial, begun=True),
        CallLost(unsent, begun=False),
    ]
    assert b.core.close() == []
    for side in (a, b):
        assert side.account.calls == side.account.payload == 0
        assert side.core.calls == (0, 0)
        assert not side.core.open
        assert side.core.close() == []
    b.core.end(begun)

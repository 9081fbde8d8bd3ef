"""Calls between two sides: payloads, parts, credit, and what is too large to send."""

from __future__ import annotations

import pytest

from p2pmoe.errors import LocalProtocolError
from p2pmoe.net.calls import CallEnded
from p2pmoe.net.credit import FIRST_WINDOW_BYTES
from p2pmoe.net.messages import (
    INLINE_BYTES,
    MAX_BODY_BYTES,
    MAX_PARTS,
    Chunk,
    Credit,
    End,
    Reply,
    Request,
)
from p2pmoe.net.quota import QuotaParams
from tests.net.sides import BULK, CHUNK, MIB, Side, asking, pair, pump, request, violation


def test_a_call_goes_there_and_its_answer_comes_back():
    a, b = pair()
    call = asking(a, b"abc")
    pump(a, b)
    [arrived] = b.arrived
    assert (arrived.id, arrived.method, arrived.body) == (call, "echo", b"question")
    assert (bytes(arrived.payload), arrived.deadline) == (b"abc", 30.0)
    b.core.reply(call, b"answer", [b"de", b"f"])
    b.core.end(call)
    pump(a, b)
    [part] = a.parts
    assert (part.id, part.part.body, bytes(part.part.payload)) == (call, b"answer", b"def")
    assert a.over == [CallEnded(call)]
    assert a.core.calls == b.core.calls == (0, 0)
    assert a.account.payload == b.account.payload == 0


@pytest.mark.parametrize("size", [0, 1, INLINE_BYTES])
def test_a_small_call_is_one_frame_each_way(size):
    a, b = pair(inline=INLINE_BYTES)
    payload = bytes(size)
    call = asking(a, payload)
    assert a.core.unsent_bytes == size
    [asked] = a.sent()
    assert asked == (request(1, budget_ms=30_000), payload)
    assert a.core.unsent_bytes == 0
    [arrived] = b.receive(*asked)
    assert (arrived.payload, b.account.payload, b.allocated) == (payload, size, 0)
    b.core.reply(1, b"answer", [payload])
    b.core.end(1)
    [answered] = b.sent()
    assert answered == (Reply(id=1, body=b"answer", last=True), payload)
    part, ended = a.receive(*answered)
    assert (part.part.body, part.part.payload) == (b"answer", payload)
    assert ended == CallEnded(call)
    assert a.core.calls == b.core.calls == (0, 0)
    assert a.account.payload == b.account.payload == 0


def test_a_payload_that_is_too_long_for_its_messages_frame_follows_in_chunks():
    a, b = pair(inline=INLINE_BYTES)
    call = asking(a, bytes(INLINE_BYTES + 1))
    assert a.headers() == [request(1, INLINE_BYTES + 1, 30_000), Chunk(id=1)]
    b.receive(request(1, INLINE_BYTES + 1))
    b.receive(Chunk(id=1), bytes(INLINE_BYTES + 1))
    b.core.reply(call, b"answer", [bytes(2 * CHUNK)])
    b.core.end(call)
    outs = list(iter(b.core.next_frame, None))
    assert [out.ends for out in outs] == [0, 0, call]
    for out in outs:
        a.deliver(out)
    assert a.over == [CallEnded(call)]
    assert a.account.payload == 0


def test_an_inline_payload_is_a_buffer_of_its_own_that_may_be_written():
    b = Side(dialler=False, inline_bytes=INLINE_BYTES)
    came = bytearray(b"abc")
    b.receive(request(1), came)
    came[:] = b"xyz"
    assert b.arrived[0].payload == b"abc"
    b.arrived[0].payload[0] = 7


def test_an_inline_payload_needs_no_credit_and_is_counted_with_the_quota():
    limits = QuotaParams(payload_a_peer=2 * INLINE_BYTES)
    b = Side(dialler=False, limits=limits, inline_bytes=INLINE_BYTES)
    before = b.core._window._left
    for call in (1, 3, 5):
        b.receive(request(call), bytes(INLINE_BYTES))
    assert b.core._window._left == before
    assert [arrived.id for arrived in b.arrived] == [1, 3]
    assert b.account.payload == 2 * INLINE_BYTES
    [busy] = b.headers()
    assert (busy.id, busy.code) == (5, "busy")


def test_an_answer_says_that_it_ends_only_where_that_is_known_in_time():
    a, b = pair()
    for when in ("before", "after"):
        call = asking(a)
        pump(a, b)
        b.core.reply(call, b"1")
        b.core.reply(call, b"2")
        early = b.headers() if when == "after" else []
        b.core.end(call)
        last = when == "before"
        parts = [Reply(id=call, body=b"1"), Reply(id=call, body=b"2", last=last)]
        assert early + b.headers() == parts + ([] if last else [End(id=call)])
        for part in parts:
            a.receive(part)
        if not last:
            a.receive(End(id=call))
        assert a.over[-1] == CallEnded(call)
    assert a.core.calls == (0, 0)


def test_a_failure_ends_an_answer_apart_from_its_parts():
    a, b = pair()
    call = asking(a)
    pump(a, b)
    b.core.reply(call, b"1")
    b.core.end(call, "internal")
    assert b.headers() == [Reply(id=call, body=b"1"), End(id=call, code="internal")]


@pytest.mark.parametrize("size", [0, 1, CHUNK, CHUNK + 1, 9 * MIB])
def test_payloads_of_any_size_come_whole_both_ways(size):
    a, b = pair()
    payload = bytes(range(256)) * (size // 256) + bytes(size % 256)
    call = asking(a, payload)
    pump(a, b)
    assert b.arrived[0].payload == payload
    b.core.reply(call, b"", [payload])
    b.core.end(call)
    pump(a, b)
    assert a.parts[0].part.payload == payload
    assert a.over == [CallEnded(call)]


def test_an_answer_has_many_parts_in_order():
    a, b = pair()
    call = asking(a)
    pump(a, b)
    for n in range(5):
        b.core.reply(call, bytes([n]), [bytes(n * 100_000)])
    b.core.end(call)
    pump(a, b)
    got = [(part.part.body, len(part.part.payload)) for part in a.parts]
    assert got == [(bytes([n]), n * 100_000) for n in range(5)]


def test_an_answer_may_have_no_part():
    a, b = pair()
    call = asking(a)
    pump(a, b)
    b.core.end(call)
    pump(a, b)
    assert a.effects == [CallEnded(call)]


def test_both_sides_may_call_at_once():
    a, b = pair()
    asking(a, bytes(MIB))
    asking(b, bytes(MIB))
    pump(a, b)
    assert [x.id for x in a.arrived] == [2]
    assert [x.id for x in b.arrived] == [1]


def test_a_failure_comes_with_its_code_and_when_to_come_again():
    a, b = pair()
    call = asking(a)
    pump(a, b)
    b.core.end(call, "busy", "d" * 1000, 0.25)
    pump(a, b)
    assert a.over == [CallEnded(call, "busy", "d" * 256, 0.25)]


def test_a_payload_beyond_the_window_waits_for_credit():
    a = Side(dialler=True)
    asking(a, bytes(4 * MIB))
    chunks = a.sent()[1:]
    assert sum(len(payload) for _, payload in chunks) == FIRST_WINDOW_BYTES
    a.receive(Credit(id=1, size=MIB))
    assert a.sent() == []
    a.receive(Credit(id=0, size=MIB // 2))
    assert sum(len(payload) for _, payload in a.sent()) == MIB // 2


def test_credit_of_the_connection_is_given_back_for_dropped_chunks_too():
    a, b = pair()
    for _ in range(20):
        call = asking(a, bytes(MIB), budget=0.0)
        b.deliver(a.core.next_frame())
        b.core.tick(0.0)
        while (late := a.core.next_frame()) is not None:
            b.deliver(late)
        pump(a, b)
        assert a.over[-1].id == call
    assert b.arrived == []
    asking(a, bytes(9 * MIB))
    pump(a, b)
    assert len(b.arrived[0].payload) == 9 * MIB


def test_parts_that_nobody_takes_do_not_stop_other_calls():
    a, b = pair()
    stuck = asking(a)
    pump(a, b)
    for _ in range(40):
        b.core.reply(stuck, b"", [bytes(MIB)])
    pump(a, b)
    call = asking(a, bytes(3 * MIB))
    pump(a, b)
    b.core.reply(call, b"", [bytes(3 * MIB)])
    b.core.end(call)
    pump(a, b)
    assert a.over == [CallEnded(call)]


def test_memory_is_reserved_before_it_is_allocated_and_only_once():
    b = Side(dialler=False, limits=QuotaParams(payload_a_peer=100))
    b.receive(request(1, 60))
    b.receive(request(3, 60))
    assert (b.account.payload, b.allocated) == (60, 0)
    assert [type(header) for header in b.headers()] == [End]
    for _ in range(2):
        b.receive(Chunk(id=1), bytes(20))
        assert b.allocated == b.account.payload == 60


def test_a_payload_of_one_chunk_takes_no_memory_before_that():
    b = Side(dialler=False)
    b.receive(request(1, 60))
    chunk = bytearray(range(60))
    b.receive(Chunk(id=1), chunk)
    (arrived,) = b.arrived
    chunk[:] = bytes(60)
    assert (arrived.payload, b.allocated) == (bytes(range(60)), 0)
    arrived.payload[0] = 7


def test_what_is_too_large_to_send_is_the_callers_fault():
    a, b = pair()
    with pytest.raises(LocalProtocolError, match="payload"):
        a.core.ask("echo", b"", [bytes(BULK), b"x"], 1.0)
    with pytest.raises(LocalProtocolError, match="body"):
        a.core.ask("echo", bytes(MAX_BODY_BYTES + 1), [], 1.0)
    call = asking(a)
    pump(a, b)
    for _ in range(MAX_PARTS):
        b.core.reply(call, b"")
    with pytest.raises(LocalProtocolError, match="parts"):
        b.core.reply(call, b"")
    assert a.core.calls == (1, 0)


def test_a_connection_for_small_calls_takes_no_large_payload_either_way():
    a, b = Side(dialler=True, payload_bytes=100), Side(dialler=False, payload_bytes=100)
    with violation("exchange.payload_too_long"):
        b.receive(request(1, 101))
    call = asking(a, bytes(100))
    a.sent()
    with violation("exchange.payload_too_long"):
        a.receive(Reply(id=call, size=101))
    with pytest.raises(LocalProtocolError, match="bulk"):
        asking(a, bytes(101))


def test_headers_go_out_while_payloads_wait():
    a = Side(dialler=True)
    asking(a, bytes(8 * MIB))
    a.sent()
    assert not a.core.sendable
    asking(a, bytes(8 * MIB))
    assert a.core.sendable
    assert [type(header) for header in a.headers()] == [Request]
    assert a.core.unsent_bytes == 15 * MIB

"""The asking side of calls: ids, deadlines, parts as they come, cancelling, broken answers."""

from __future__ import annotations

import math

import pytest

from p2pmoe.errors import PeerBusy
from p2pmoe.net.calls import CallEnded
from p2pmoe.net.messages import MAX_PARTS, Cancel, Chunk, End, Reply
from p2pmoe.net.quota import QuotaParams
from tests.net.sides import CHUNK, MIB, Side, asking, pair, pump, violation


def test_ids_of_the_dialler_are_odd_and_of_the_other_side_even():
    a, b = pair()
    assert [asking(a) for _ in range(3)] == [1, 3, 5]
    assert [asking(b) for _ in range(3)] == [2, 4, 6]


def test_a_part_may_be_cut_by_a_failure():
    a = Side(dialler=True)
    call = asking(a)
    a.sent()
    a.receive(Reply(id=call, size=100))
    a.receive(Chunk(id=call), bytes(50))
    assert a.receive(End(id=call, code="internal")) == [CallEnded(call, "internal")]
    assert a.account.payload == 0


@pytest.mark.parametrize(("budget", "on_the_wire"), [(-1.0, 0), (0.0019, 1), (math.inf, 2**32 - 1)])
def test_the_time_left_goes_along_in_milliseconds(budget, on_the_wire):
    a = Side(dialler=True)
    asking(a, budget=budget)
    assert a.headers()[0].budget_ms == on_the_wire


def test_chunks_without_credit_break_the_rules():
    a = Side(dialler=True)
    call = asking(a)
    a.sent()
    with violation("exchange.no_credit"):
        for _ in range(40):
            a.receive(Reply(id=call, size=CHUNK))
            a.receive(Chunk(id=call), bytes(CHUNK))
    assert len(a.parts) * CHUNK < 10 * MIB


def test_parts_that_nobody_takes_stop_the_sender():
    a, b = pair()
    call = asking(a)
    pump(a, b)
    for _ in range(40):
        b.core.reply(call, b"", [bytes(MIB)])
    b.core.end(call)
    pump(a, b)
    untaken = len(a.parts)
    assert 1 <= untaken < 20
    assert b.core.waiting(call)
    a.core.taken(call, MIB)
    pump(a, b)
    while len(a.parts) < 40:
        before = len(a.parts)
        for _ in range(before):
            a.core.taken(call, MIB)
        pump(a, b)
        assert len(a.parts) > before
    assert a.over == [CallEnded(call)]


def test_credit_that_was_held_back_comes_when_parts_are_taken_and_none_is_on_its_way():
    a, b = pair()
    call = asking(a)
    pump(a, b)
    for size in (MIB + 1, CHUNK, CHUNK):
        b.core.reply(call, b"", [bytes(size)])
    pump(a, b)
    assert len(a.parts) == 3
    window = a.core._own._calls[call].window
    before = window._left + window._freed
    a.core.taken(call, MIB + 1)
    assert window._left + window._freed >= before + 2 * CHUNK


def test_taking_a_part_of_a_call_that_is_over_means_nothing():
    a, b = pair()
    call = asking(a)
    pump(a, b)
    b.core.reply(call, b"", [b"x"])
    b.core.end(call)
    pump(a, b)
    a.core.taken(call, 1)
    assert a.headers() == []


def test_a_call_that_was_not_sent_is_cancelled_without_a_word():
    a = Side(dialler=True)
    call = asking(a, b"abc")
    a.core.cancel(call)
    assert a.sent() == []
    assert a.core.calls == (0, 0)
    assert asking(a) == call + 2


def test_an_end_that_crosses_a_cancel_answers_it():
    a, b = pair()
    call = asking(a)
    pump(a, b)
    b.core.end(call)
    end = b.headers()
    a.core.cancel(call)
    assert b.receive(a.headers()[0]) == []
    assert b.headers() == []
    assert a.receive(end[0]) == []
    assert a.core.calls == (0, 0)


def test_parts_for_a_cancelled_call_are_dropped():
    a, b = pair()
    call = asking(a)
    pump(a, b)
    b.core.reply(call, b"", [bytes(3 * MIB)])
    b.core.end(call)
    while (out := b.core.next_frame()) is not None:
        a.deliver(out)
    a.core.cancel(call)
    assert a.account.payload == 0
    assert a.receive(Chunk(id=call), b"late") == []
    pump(a, b)
    assert a.effects == []
    assert a.core.calls == b.core.calls == (0, 0)


@pytest.mark.parametrize("size", [0, CHUNK, 2 * CHUNK])
def test_the_last_part_of_a_cancelled_call_ends_it(size):
    a, b = pair()
    call = asking(a)
    pump(a, b)
    b.core.reply(call, b"1")
    b.core.reply(call, b"2", [bytes(size)])
    b.core.end(call)
    answer = list(iter(b.core.next_frame, None))
    a.core.cancel(call)
    [cancel] = a.headers()
    for out in answer:
        assert a.core.calls == (1, 0)
        a.deliver(out)
    assert (a.effects, a.account.payload, a.core.calls) == ([], 0, (0, 0))
    assert b.receive(cancel) == []
    assert b.headers() == []


def test_a_call_cancelled_inside_its_last_part_ends_with_that_or_with_an_end():
    for sent in (1, 2, 3):
        a, b = pair()
        call = asking(a)
        pump(a, b)
        b.core.reply(call, b"", [bytes(3 * CHUNK)])
        b.core.end(call)
        for _ in range(1 + sent):
            a.deliver(b.core.next_frame())
        a.core.cancel(call)
        pump(a, b)
        assert a.core.calls == b.core.calls == (0, 0)
        assert a.account.payload == b.account.payload == 0


def test_this_side_does_not_begin_more_calls_than_the_other_allows():
    a = Side(dialler=True, limits=QuotaParams(calls_a_peer=2))
    asking(a)
    asking(a)
    with pytest.raises(PeerBusy) as caught:
        asking(a)
    assert caught.value.retry_after == a.limits.come_again


def test_an_answer_that_has_no_room_here_fails_the_call_and_cancels_it():
    a = Side(dialler=True, limits=QuotaParams(payload_a_peer=100))
    call = asking(a)
    a.sent()
    [ended] = a.receive(Reply(id=call, size=101))
    assert (ended.id, ended.code, ended.retry_after) == (call, "busy", a.limits.come_again)
    assert a.headers() == [Cancel(id=call)]
    assert a.allocated == 0


BROKEN_ANSWERS = {
    "a part inside a part": ("exchange.part_in_part", [Reply(id=1, size=1), Reply(id=1)]),
    "an end inside a part": ("exchange.part_cut", [Reply(id=1, size=1), End(id=1)]),
    "bytes of no part": ("exchange.too_many_bytes", [(Chunk(id=1), b"x")]),
    "too many parts": ("exchange.too_many_parts", [Reply(id=1)] * (MAX_PARTS + 1)),
    "a second end": ("exchange.id", [End(id=1), End(id=1)]),
    "an end behind the last part": ("exchange.id", [Reply(id=1, last=True), End(id=1)]),
    "a part behind the last one": ("exchange.id", [Reply(id=1, last=True), Reply(id=1)]),
    "a part inside the last one": (
        "exchange.part_in_part",
        [Reply(id=1, size=9, last=True), Reply(id=1)],
    ),
    "an end inside the last part": (
        "exchange.part_cut",
        [Reply(id=1, size=9, last=True), (Chunk(id=1), b"x"), End(id=1)],
    ),
    "more bytes than the last part has": (
        "exchange.too_many_bytes",
        [Reply(id=1, size=1, last=True), (Chunk(id=1), b"xy")],
    ),
}


@pytest.mark.parametrize(("why", "messages"), BROKEN_ANSWERS.values(), ids=BROKEN_ANSWERS)
def test_what_breaks_the_rules_of_answers_is_refused(why, messages):
    a = Side(dialler=True)
    asking(a)
    a.sent()
    *before, last = [each if isinstance(each, tuple) else (each, b"") for each in messages]
    for message, payload in before:
        a.receive(message, payload)
    with violation(why):
        a.receive(*last)

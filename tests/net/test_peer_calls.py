"""The answering side of calls: quotas, deadlines, CANCEL and END, late payloads."""

from __future__ import annotations

import pytest

from p2pmoe.errors import LocalProtocolError
from p2pmoe.net.calls import CallArrived, CallCancelled, CallEnded, PartArrived
from p2pmoe.net.messages import Cancel, Chunk, End
from p2pmoe.net.quota import QuotaParams, Rate
from tests.net.sides import MIB, Side, asking, pair, pump, request, violation


def test_a_hint_is_never_rounded_down_to_none():
    a, b = pair()
    call = asking(a)
    pump(a, b)
    b.core.end(call, "busy", "", 0.0001)
    pump(a, b)
    assert a.over == [CallEnded(call, "busy", "", 0.001)]


def test_the_time_left_is_the_smaller_of_the_callers_and_the_limit_here():
    b = Side(dialler=False, now=100.0)
    b.receive(request(1, budget_ms=2500))
    b.receive(request(3, budget_ms=2**32 - 1))
    assert [x.deadline for x in b.arrived] == [102.5, 100.0 + b.limits.call_seconds]


def test_a_cancelled_call_is_stopped_over_there_and_ends_once():
    a, b = pair()
    call = asking(a)
    pump(a, b)
    a.core.cancel(call)
    a.core.cancel(call)
    pump(a, b)
    assert b.over == [CallCancelled(call)]
    assert a.core.calls == (1, 0)
    b.core.end(call)
    assert b.core.calls == (0, 1)
    assert b.headers() == [End(id=call, code="cancelled")]
    assert b.core.calls == (0, 0)
    a.receive(End(id=call, code="cancelled"))
    assert a.core.calls == (0, 0)
    assert a.effects == []


def test_a_call_cancelled_while_its_payload_comes_ends_at_once():
    a, b = pair()
    call = asking(a, bytes(4 * MIB))
    for out in iter(a.core.next_frame, None):
        b.deliver(out)
    assert b.account.payload == 4 * MIB
    a.core.cancel(call)
    pump(a, b)
    assert b.effects == []
    assert b.account.payload == b.account.calls == 0
    assert a.core.calls == (0, 0)


def test_an_answer_to_a_cancelled_call_is_not_sent():
    a, b = pair()
    call = asking(a)
    pump(a, b)
    a.core.cancel(call)
    pump(a, b)
    b.core.reply(call, b"", [bytes(MIB)])
    b.core.end(call, "internal")
    assert b.headers() == [End(id=call, code="cancelled")]


def test_two_cancels_for_one_call_break_the_rules():
    b = Side(dialler=False)
    b.receive(request())
    b.receive(Cancel(id=1))
    with violation("exchange.cancelled_twice"):
        b.receive(Cancel(id=1))


def test_a_cancel_for_a_call_never_begun_breaks_the_rules():
    with violation("exchange.id"):
        Side(dialler=False).receive(Cancel(id=1))


def test_chunks_that_come_after_the_end_are_dropped():
    a, b = pair()
    call = asking(a, bytes(2 * MIB))
    out = a.core.next_frame()
    b.deliver(out)
    b.now = 31.0
    b.core.tick(b.now)
    for late in iter(a.core.next_frame, None):
        b.deliver(late)
    assert b.effects == []
    pump(a, b)
    assert a.over == [CallEnded(call, "timeout", "the payload did not come in time")]
    b.receive(Chunk(id=call), b"later still")


def test_a_peer_over_its_quota_is_told_to_come_again():
    b = Side(dialler=False, limits=QuotaParams(calls_a_peer=1))
    b.receive(request(1))
    assert b.receive(request(3, 100)) == []
    assert b.headers() == [
        End(id=3, code="busy", detail="over this peer's quota", retry_after_ms=100)
    ]
    b.receive(Chunk(id=3), bytes(100))
    assert b.allocated == 0


def test_an_answer_that_was_given_is_not_added_to():
    a, b = pair()
    call = asking(a)
    pump(a, b)
    b.core.end(call)
    with pytest.raises(LocalProtocolError):
        b.core.reply(call, b"")
    pump(a, b)
    with pytest.raises(LocalProtocolError):
        b.core.reply(call, b"")


def test_answers_that_nobody_reads_are_bounded():
    limits = QuotaParams(calls_a_peer=0, refusals=Rate(1, 10_000))
    b = Side(dialler=False, limits=limits)
    with violation("exchange.not_reading"):
        for n in range(limits.small_frames + 1):
            b.receive(request(2 * n + 1))


def test_a_payload_that_is_late_ends_its_call_and_nothing_else():
    a, b = pair()
    call = asking(a, bytes(2 * MIB), budget=2.0)
    for out in iter(a.core.next_frame, None):
        b.deliver(out)
    in_time = asking(a, bytes(1), budget=9.0)
    assert b.core.next_deadline() == 2.0
    b.core.tick(1.9)
    assert b.account.calls == 1
    b.core.tick(2.0)
    pump(a, b)
    assert a.over == [CallEnded(call, "timeout", "the payload did not come in time")]
    assert [x.id for x in b.arrived] == [in_time]


def test_of_two_late_payloads_each_ends_at_its_own_deadline():
    b = Side(dialler=False)
    b.receive(request(1, 10, budget_ms=5000))
    b.receive(request(3, 10, budget_ms=2000))
    for now, left in ((2.0, 1), (5.0, 0)):
        assert b.core.next_deadline() == now
        b.core.tick(now)
        b.sent()
        assert b.account.calls == left


def test_ids_say_which_calls_were_taken():
    b = Side(dialler=False)
    assert b.core.last_id == 0
    b.receive(request(5))
    assert b.core.last_id == 5
    assert isinstance(b.effects[0], CallArrived)
    assert not [effect for effect in b.effects if isinstance(effect, CallCancelled | PartArrived)]

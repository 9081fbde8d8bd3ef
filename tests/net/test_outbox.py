"""The order in which one side sends: small before large, and every call in its turn."""

from __future__ import annotations

import pytest

from p2pmoe.errors import MalformedMessage
from p2pmoe.net.credit import FIRST_WINDOW_BYTES
from p2pmoe.net.messages import Chunk, Credit, End, Ping, Reply, Request, decode_header
from p2pmoe.net.outbox import CONNECTION, Outbox, views_of

CHUNK = 1000
SMALL_FRAMES = 512


def request(call: int, size: int = 0) -> Request:
    return Request(id=call, method="x", budget_ms=1, size=size)


def asking(outbox: Outbox, call: int, *payload: bytes) -> None:
    outbox.open(call)
    outbox.add(call, request(call, sum(map(len, payload))), views_of(payload))


def sent(outbox: Outbox) -> list:
    """What would be sent now: chunks as (id, bytes), other frames as messages."""
    found = []
    while outbox.sendable:
        out = outbox.next_frame()
        header = decode_header(out.header)
        assert out.size == sum(map(len, out.payload))
        found.append((header.id, out.size) if isinstance(header, Chunk) else header)
    assert outbox.next_frame() is None
    return found


def test_an_empty_outbox_has_nothing_to_send():
    outbox = Outbox(CHUNK, SMALL_FRAMES)
    assert outbox.empty
    assert sent(outbox) == []


def test_small_frames_and_credit_go_before_headers_and_headers_before_chunks():
    outbox = Outbox(CHUNK, SMALL_FRAMES)
    asking(outbox, 1, bytes(1500))
    outbox.announce(CONNECTION, 5)
    outbox.announce(CONNECTION, 6)
    outbox.announce(1, 0)
    outbox.put(Ping(n=1))
    asking(outbox, 3)
    assert not outbox.empty
    expected = [Ping(n=1), Credit(id=0, size=11), request(1, 1500), request(3), (1, 1000), (1, 500)]
    assert sent(outbox) == expected
    assert outbox.empty


def test_large_payloads_take_turns():
    outbox = Outbox(CHUNK, SMALL_FRAMES)
    for call in (1, 3):
        asking(outbox, call, bytes(2000))
    assert sent(outbox)[2:] == [(1, 1000), (3, 1000), (1, 1000), (3, 1000)]


def test_a_chunk_is_cut_from_many_buffers_without_copying():
    outbox = Outbox(CHUNK, SMALL_FRAMES)
    buffers = [bytearray(b"ab" * 300), b"", bytearray(b"cd" * 300)]
    asking(outbox, 1, *buffers)
    outbox.next_frame()
    first, second = outbox.next_frame(), outbox.next_frame()
    assert [len(view) for view in first.payload] == [600, 400]
    assert first.payload[0].obj is buffers[0]
    assert b"".join((*first.payload, *second.payload)) == b"".join(buffers)


def test_parts_of_one_answer_come_one_after_the_other():
    outbox = Outbox(CHUNK, SMALL_FRAMES)
    outbox.open(1)
    first, second = Reply(id=1, body=b"1", size=1500), Reply(id=1, body=b"2")
    outbox.add(1, first, views_of([bytes(1500)]))
    outbox.add(1, second)
    outbox.add(1, End(id=1), last=True)
    assert outbox.waiting(1)
    assert sent(outbox) == [first, (1, 1000), (1, 500), second, End(id=1)]
    assert not outbox.waiting(1)


def test_the_frame_that_ends_a_call_says_so():
    outbox = Outbox(CHUNK, SMALL_FRAMES)
    outbox.open(7)
    outbox.add(7, Reply(id=7))
    outbox.add(7, End(id=7), last=True)
    assert [outbox.next_frame().ends for _ in range(2)] == [0, 7]
    assert not outbox.waiting(7)


def test_a_part_that_waits_takes_the_end_of_its_answer_along():
    outbox = Outbox(CHUNK, SMALL_FRAMES)
    for call in (7, 9):
        outbox.open(call)
    outbox.end(9, End(id=9))
    outbox.add(7, Reply(id=7, body=b"x", size=CHUNK + 1), views_of([bytes(CHUNK + 1)]))
    outbox.end(7, End(id=7))
    frames = [outbox.next_frame() for _ in range(4)]
    assert [frame.ends for frame in frames] == [9, 0, 0, 7]
    assert decode_header(frames[1].header) == Reply(id=7, body=b"x", size=CHUNK + 1, last=True)
    assert outbox.empty


def test_a_short_payload_goes_with_its_header_and_before_long_ones():
    outbox = Outbox(CHUNK, SMALL_FRAMES)
    asking(outbox, 1, bytes(2000))
    outbox.open(3)
    outbox.add(3, request(3), views_of([b"ab", b"c"]))
    assert outbox.unsent_bytes == 2003
    sizes = [(out.size, b"".join(out.payload)) for out in (outbox.next_frame() for _ in range(2))]
    assert sizes == [(0, b""), (3, b"abc")]
    assert outbox.unsent_bytes == 2000
    assert not outbox.waiting(3)


def test_a_call_without_credit_waits_and_does_not_hold_up_others():
    outbox = Outbox(2**20, SMALL_FRAMES)
    asking(outbox, 1, bytes(FIRST_WINDOW_BYTES + 10))
    outbox.granted(CONNECTION, 2**20)
    assert sent(outbox)[1:] == [(1, FIRST_WINDOW_BYTES)]
    assert outbox.unsent_bytes == 10
    asking(outbox, 3, bytes(10))
    assert sent(outbox) == [request(3, 10), (3, 10)]
    assert not outbox.empty
    outbox.granted(1, 4)
    assert sent(outbox) == [(1, 4)]
    outbox.granted(1, 100)
    assert sent(outbox) == [(1, 6)]
    assert outbox.empty


def test_without_credit_of_the_connection_no_chunk_goes_but_headers_do():
    outbox = Outbox(2**20, SMALL_FRAMES)
    for call in (1, 3):
        asking(outbox, call, bytes(FIRST_WINDOW_BYTES))
    assert sent(outbox)[2:] == [(1, FIRST_WINDOW_BYTES)]
    assert outbox.unsent_bytes == FIRST_WINDOW_BYTES
    asking(outbox, 5)
    assert sent(outbox) == [request(5)]
    outbox.granted(3, 10)
    outbox.granted(CONNECTION, 10)
    assert sent(outbox) == [(3, 10)]


def test_credit_for_a_call_that_is_gone_means_nothing():
    outbox = Outbox(CHUNK, SMALL_FRAMES)
    outbox.granted(9, 10)
    assert sent(outbox) == []


def test_a_call_that_is_closed_sends_nothing_more():
    outbox = Outbox(CHUNK, SMALL_FRAMES)
    for call in (1, 3, 5):
        asking(outbox, call, bytes(2000))
    outbox.announce(1, 10)
    assert not outbox.begun(1)
    outbox.close(1)
    outbox.close(5)
    assert outbox.unsent_bytes == 2000
    assert sent(outbox) == [request(3, 2000), (3, 1000), (3, 1000)]
    assert outbox.unsent_bytes == 0
    assert outbox.begun(3)


def test_a_call_that_is_cleared_may_say_something_else_instead():
    outbox = Outbox(CHUNK, SMALL_FRAMES)
    asking(outbox, 1, bytes(5000))
    outbox.next_frame()
    outbox.next_frame()
    outbox.clear(1)
    outbox.add(1, End(id=1, code="cancelled"), last=True)
    assert sent(outbox) == [End(id=1, code="cancelled")]


def test_answers_that_pile_up_unread_break_the_rules():
    outbox = Outbox(CHUNK, SMALL_FRAMES)
    for n in range(SMALL_FRAMES):
        outbox.put(Ping(n=n))
    with pytest.raises(MalformedMessage, match=r"exchange\.not_reading"):
        outbox.put(Ping(n=0))


def test_buffers_of_any_kind_are_sent_as_bytes():
    floats = memoryview(bytearray(16)).cast("d")
    assert [len(view) for view in views_of([floats, b"abc", b""])] == [16, 3]

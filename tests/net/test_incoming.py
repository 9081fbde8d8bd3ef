"""Calls that are answered without a task: what they post, and who ends them."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from p2pmoe import telemetry
from p2pmoe.errors import LeaseLost, RemoteError
from p2pmoe.net.frames import FrameStream
from p2pmoe.net.incoming import IncomingCall, Prompt
from p2pmoe.net.messages import Cancel, End, Reply, Request
from p2pmoe.net.outbox import OutFrame
from tests.net.pools import Peer, greet, world
from tests.net.test_connection import nothing_left


class Desk:
    """A prompt handler that keeps the calls, for a test to answer."""

    def __init__(self, peer: Peer) -> None:
        self.calls: list[IncomingCall] = []
        self.dropped: list[int] = []
        peer.pool.handlers["ask"] = Prompt(self.begin)

    def begin(self, call: IncomingCall) -> None:
        call.dropped = lambda: self.dropped.append(call.id)
        self.calls.append(call)


def ask(number: int, budget_ms: int = 1000) -> Request:
    return Request(id=number, method="ask", budget_ms=budget_ms)


async def test_what_is_posted_goes_with_the_end_in_one_frame(autojump_clock):
    async with world() as w:
        b = await w.peer(1)
        desk, stranger = Desk(b), await greet(w, b)
        await stranger.say(ask(1))
        await trio.testing.wait_all_tasks_blocked()
        [call] = desk.calls
        call.post(b"all", [b"rows"])
        call.finish()
        assert await stranger.hear_frame() == (Reply(id=1, body=b"all", last=True), b"rows")
        call.finish()
        call.cancel()
        assert desk.dropped == []
        await nothing_left(b)


async def test_what_is_flushed_goes_before_the_end(autojump_clock):
    async with world() as w:
        b = await w.peer(1)
        desk, stranger = Desk(b), await greet(w, b)
        await stranger.say(ask(1))
        await trio.testing.wait_all_tasks_blocked()
        desk.calls[0].post(b"one")
        desk.calls[0].flush()
        assert await stranger.hear() == Reply(id=1, body=b"one")
        desk.calls[0].post(b"two")
        desk.calls[0].post(b"three")
        desk.calls[0].finish()
        assert await stranger.hear() == Reply(id=1, body=b"two")
        assert await stranger.hear() == Reply(id=1, body=b"three", last=True)


async def test_the_answers_of_one_turn_go_out_together(autojump_clock):
    async with world() as w:
        b = await w.peer(1)
        desk, stranger = Desk(b), await greet(w, b)
        await stranger.say(ask(1), ask(3), ask(5))
        await trio.testing.wait_all_tasks_blocked()
        for call in desk.calls:
            call.post(b"%d" % call.id)
            call.finish()
        assert [(await stranger.hear()).body for _ in desk.calls] == [b"1", b"3", b"5"]
        await nothing_left(b)


async def test_a_call_is_dropped_at_its_own_deadline_and_the_others_go_on(autojump_clock):
    async with world() as w:
        b = await w.peer(1)
        desk, stranger = Desk(b), await greet(w, b)
        await stranger.say(ask(1, budget_ms=3000), ask(3, budget_ms=2000))
        late = {"code": "timeout", "detail": "no answer by the deadline"}
        assert await stranger.hear() == End(id=3, **late)
        assert trio.current_time() == pytest.approx(2.0)
        assert desk.dropped == [3]
        assert await stranger.hear() == End(id=1, **late)
        assert trio.current_time() == pytest.approx(3.0)
        assert desk.dropped == [3, 1]
        await nothing_left(b)


async def test_a_cancelled_call_is_dropped_once(autojump_clock):
    async with world() as w:
        b = await w.peer(1)
        desk, stranger = Desk(b), await greet(w, b)
        await stranger.say(ask(1))
        await stranger.say(Cancel(id=1))
        assert await stranger.hear() == End(id=1, code="cancelled")
        b.life.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert desk.dropped == [1]


async def test_the_end_of_the_connection_drops_its_calls(autojump_clock):
    async with world() as w:
        b = await w.peer(1)
        desk, stranger = Desk(b), await greet(w, b)
        await stranger.say(ask(1), ask(3))
        await trio.testing.wait_all_tasks_blocked()
        await stranger.stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
        assert desk.dropped == [1, 3]
        desk.calls[0].finish()
        await nothing_left(b)


async def test_a_handler_that_raises_has_ended_its_call(autojump_clock, monkeypatch):
    events = []
    monkeypatch.setattr(telemetry, "emit", lambda event, **fields: events.append(event))

    def lost(call: IncomingCall) -> None:
        raise LeaseLost("ffn.1.2 is served by nobody here")

    def crash(call: IncomingCall) -> None:
        raise ZeroDivisionError("secret")

    async with world() as w:
        a, b = await w.peer(0), await w.peer(1)
        b.pool.handlers |= {"lost": Prompt(lost), "crash": Prompt(crash)}
        with pytest.raises(LeaseLost, match=r"ffn\.1\.2"):
            await a.pool.call(b.contact, "lost", b"")
        with pytest.raises(RemoteError, match="see its log"):
            await a.pool.call(b.contact, "crash", b"")
        assert events.count("net.call.crashed") == 1
        await a.pool.call(b.contact, "echo", b"")
        await nothing_left(a, b)


async def test_a_call_that_has_to_wait_goes_on_in_a_task_and_can_be_cancelled(autojump_clock):
    ended = []

    async def wait(call: IncomingCall) -> None:
        try:
            await trio.sleep(0.5 if call.body else 5.0)
            call.post(b"late")
        finally:
            ended.append(trio.current_time())

    async with world() as w:
        b = await w.peer(1)
        b.pool.handlers["ask"] = Prompt(lambda _call: wait)
        stranger = await greet(w, b)
        began = trio.current_time()
        await stranger.say(Request(id=1, method="ask", budget_ms=1000, body=b"short"), ask(3))
        assert await stranger.hear() == Reply(id=1, body=b"late", last=True)
        late = {"code": "timeout", "detail": "no answer by the deadline"}
        assert await stranger.hear() == End(id=3, **late)
        await stranger.say(ask(5), Cancel(id=5))
        assert await stranger.hear() == End(id=5, code="cancelled")
        assert [at - began for at in ended] == pytest.approx([0.5, 1.0])
        await nothing_left(b)


def now(call: IncomingCall) -> None:
    call.post(b"now")
    call.finish()


async def test_answers_to_what_is_read_at_once_leave_in_one_send(autojump_clock, monkeypatch):
    async with world() as w:
        b = await w.peer(1)
        b.pool.handlers["ask"] = Prompt(now)
        stranger = await greet(w, b)
        sends, start = [], FrameStream.start

        def noted(frames: FrameStream, batch: list[OutFrame]) -> bool:
            if any(frame.ends for frame in batch):
                sends.append(len(batch))
            return start(frames, batch)

        monkeypatch.setattr(FrameStream, "start", noted)
        await stranger.say(ask(1), ask(3), ask(5))
        for number in (1, 3, 5):
            assert await stranger.hear() == Reply(id=number, body=b"now", last=True)
        assert sends == [3]
        await nothing_left(b)

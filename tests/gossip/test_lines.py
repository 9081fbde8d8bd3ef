"""Lines to other members: bounded, never waited for, and each on its own."""

from __future__ import annotations

from contextlib import asynccontextmanager

import trio
import trio.testing

from p2pmoe.errors import PeerUnreachable
from p2pmoe.gossip import lines
from p2pmoe.gossip.lines import Lines, _drop_oldest
from p2pmoe.gossip.messages import GossipMessage, News, Ping, Tell
from p2pmoe.identity import PeerId
from p2pmoe.wire import schema
from p2pmoe.wire.peer_record import Contact


def contact(number: int) -> Contact:
    return Contact(PeerId(number.to_bytes(32, "big")), ())


def ping(number: int) -> GossipMessage:
    return GossipMessage(Ping(seq=number))


class Pool:
    """Takes what it is told; a peer that is stuck answers nothing, one that is gone fails."""

    def __init__(self) -> None:
        self.told: list[tuple[int, int]] = []
        self.stuck: set[PeerId] = set()
        self.gone: set[PeerId] = set()

    @asynccontextmanager
    async def open_call(self, to: Contact, method: str, body: bytes):
        assert method == "gossip.tell"
        if to.peer in self.gone:
            raise PeerUnreachable("gone")
        if to.peer in self.stuck:
            await trio.sleep_forever()
        tell = schema.decode(body, Tell)
        self.told.append((int.from_bytes(to.peer.raw, "big"), getattr(tell.body, "seq", -1)))
        yield _nothing()


async def _nothing():
    return
    yield


async def test_messages_go_out_in_their_order_and_the_line_is_gone_after(autojump_clock) -> None:
    pool = Pool()
    made = Lines(pool)
    async with trio.open_nursery() as senders:
        for number in range(3):
            made.put(senders, contact(1), ping(number))
        await made.empty()
    assert pool.told == [(1, 0), (1, 1), (1, 2)]
    assert not made._lines


async def test_a_peer_that_is_stuck_holds_up_nobody_else_and_costs_a_bounded_queue(
    autojump_clock,
) -> None:
    pool = Pool()
    made = Lines(pool)
    pool.stuck.add(contact(1).peer)
    async with trio.open_nursery() as senders:
        for number in range(1000):
            made.put(senders, contact(1), ping(number))
        made.put(senders, contact(2), ping(7))
        await trio.testing.wait_all_tasks_blocked()
        assert pool.told == [(2, 7)]
        assert len(made._lines[contact(1).peer].waiting) <= lines.WAITING
        began = trio.current_time()
        await made.empty()
        assert trio.current_time() - began <= lines.TELL_LIMIT * (lines.WAITING / lines.AT_ONCE + 1)


async def test_what_cannot_be_sent_is_dropped_and_more_lines_than_allowed_too(
    autojump_clock,
) -> None:
    pool = Pool()
    made = Lines(pool)
    pool.gone.add(contact(1).peer)
    async with trio.open_nursery() as senders:
        made.put(senders, contact(1), ping(0))
        await made.empty()
        for number in range(2, lines.MOST_LINES + 10):
            made.put(senders, contact(number), ping(0))
        assert len(made._lines) == lines.MOST_LINES
        await made.empty()
    assert len(pool.told) == lines.MOST_LINES


def test_a_full_line_drops_its_oldest_rumour_before_any_probe() -> None:
    from collections import deque

    news = GossipMessage(News())
    waiting = deque([ping(0), ping(1), news, ping(2)])
    _drop_oldest(waiting)
    assert list(waiting) == [ping(0), ping(1), ping(2)]
    _drop_oldest(waiting)
    assert list(waiting) == [ping(1), ping(2)]

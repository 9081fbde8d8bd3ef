"""Lines to other members: bounded, never waited for, and each on its own."""

from __future__ import annotations

from collections import deque

import trio
import trio.testing

from p2pmoe.errors import ConnectionLost, PeerBusy
from p2pmoe.gossip import lines
from p2pmoe.gossip.lines import Lines, _drop_oldest
from p2pmoe.gossip.messages import GossipMessage, News, Ping, Tell
from p2pmoe.identity import PeerId
from p2pmoe.net.asking import OutgoingCall
from p2pmoe.wire import schema
from p2pmoe.wire.peer_record import Contact


def contact(number: int) -> Contact:
    return Contact(PeerId(number.to_bytes(32, "big")), ())


def ping(number: int) -> GossipMessage:
    return GossipMessage(Ping(seq=number))


class Connection:
    """Takes what it is told, and says so when `answer` is called."""

    def __init__(self) -> None:
        self.told: list[int] = []
        self.calls: list[OutgoingCall] = []
        self.full = False
        self.cancelled = 0

    def ask(self, method: str, body: bytes, payload: object, budget: float) -> OutgoingCall:
        assert (method, payload, budget) == ("gossip.tell", (), lines.TELL_LIMIT)
        if self.full:
            raise PeerBusy("too many calls")
        self.told.append(schema.decode(body, Tell).body.seq)
        self.calls.append(OutgoingCall(method, _nothing, self.cancel))
        return self.calls[-1]

    def cancel(self) -> None:
        self.cancelled += 1

    def answer(self, error: ConnectionLost | None = None) -> None:
        self.calls.pop(0).ended(error, "ok")


class Pool(dict[PeerId, Connection]):
    """The connections that are open."""

    def open_connection(self, to: Contact, *, bulk: bool) -> Connection | None:
        assert not bulk
        return self.get(to.peer)


def _nothing(_size: int) -> None: ...


def one_line() -> tuple[Lines, Connection]:
    pool = Pool({contact(1).peer: Connection()})
    return Lines(pool), pool[contact(1).peer]


async def test_messages_go_out_in_their_order_and_the_line_is_gone_after(autojump_clock) -> None:
    made, one = one_line()
    for number in range(lines.AT_ONCE + 3):
        made.put(contact(1), ping(number))
    assert one.told == list(range(lines.AT_ONCE))
    while one.calls:
        one.answer()
    assert one.told == list(range(lines.AT_ONCE + 3))
    assert not made._lines


async def test_a_peer_that_is_stuck_holds_up_nobody_else_and_costs_a_bounded_queue(
    autojump_clock,
) -> None:
    stuck, other = Connection(), Connection()
    made = Lines(Pool({contact(1).peer: stuck, contact(2).peer: other}))
    for number in range(1000):
        made.put(contact(1), ping(number))
    made.put(contact(2), ping(7))
    assert other.told == [7]
    assert len(made._lines[contact(1).peer].waiting) == lines.WAITING


async def test_what_is_not_taken_in_time_makes_room_for_what_is_newer(autojump_clock) -> None:
    made, stuck = one_line()
    for number in range(lines.AT_ONCE):
        made.put(contact(1), ping(number))
    await trio.sleep(lines.TELL_LIMIT)
    made.put(contact(1), ping(99))
    assert stuck.cancelled == lines.AT_ONCE
    assert stuck.told[-1] == 99
    stuck.calls = stuck.calls[-1:]
    stuck.answer()
    assert not made._lines


async def test_whoever_waits_for_the_lines_waits_until_all_was_sent_or_lost(autojump_clock) -> None:
    made, one = one_line()
    made.put(contact(1), ping(0))
    made.put(contact(1), ping(1))
    done = False

    async def wait() -> None:
        nonlocal done
        await made.empty()
        done = True

    async with trio.open_nursery() as waiters:
        waiters.start_soon(wait)
        one.answer(ConnectionLost("cut"))
        await trio.testing.wait_all_tasks_blocked()
        assert not done
        one.answer()
    assert done


async def test_what_cannot_be_sent_is_dropped_and_more_lines_than_allowed_too(
    autojump_clock,
) -> None:
    pool = Pool()
    made = Lines(pool)
    made.put(contact(1), ping(0))
    pool[contact(1).peer] = full = Connection()
    full.full = True
    made.put(contact(1), ping(0))
    assert not made._lines
    for number in range(2, lines.MOST_LINES + 10):
        pool[contact(number).peer] = Connection()
        made.put(contact(number), ping(0))
    assert len(made._lines) == lines.MOST_LINES
    assert sum(len(each.told) for each in pool.values()) == lines.MOST_LINES


def test_a_full_line_drops_its_oldest_rumour_before_any_probe() -> None:
    news = GossipMessage(News())
    waiting = deque([ping(0), ping(1), news, ping(2)])
    _drop_oldest(waiting)
    assert list(waiting) == [ping(0), ping(1), ping(2)]
    _drop_oldest(waiting)
    assert list(waiting) == [ping(1), ping(2)]

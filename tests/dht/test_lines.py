"""Questions that travel without a task, on a connection that a test works by hand."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from p2pmoe.dht.asks import VERIFY_AT_ONCE, Asks
from p2pmoe.dht.contacts import ContactParams, Contacts
from p2pmoe.dht.jobs import Jobs
from p2pmoe.dht.lines import STALLED
from p2pmoe.dht.messages import FindRequest, Found, FoundReply
from p2pmoe.errors import (
    CallTimeout,
    ConnectionLost,
    NodeClosed,
    P2PMoEError,
    PeerBusy,
    PeerUnreachable,
    RemoteProtocolError,
)
from p2pmoe.identity import KeyPair
from p2pmoe.net.asking import NotBegun, OutgoingCall
from p2pmoe.net.calls import Part
from p2pmoe.wire import schema
from p2pmoe.wire.envelope import VerifiedCache
from tests.dht.swarm_of_ids import NETWORK, PEOPLE, card, place

OWN, ANN = PEOPLE[:2]
LIMIT = 3.0  # seconds for a find


def found(count: int, contacts: tuple[bytes, ...] = ()) -> bytes:
    return schema.encode(FoundReply(answers=(Found(),) * count, contacts=contacts))


class Wire:
    """A pool with one open connection, which is that connection. `turn` is the writer's."""

    def __init__(self) -> None:
        self.open = True
        self.verified = VerifiedCache(64)
        self.busy = False
        self.composing: list[Callable[[], None]] = []
        self.calls: list[OutgoingCall] = []
        self.requests: list[FindRequest] = []
        self.cancelled: list[int] = []
        self.dialled: list[FindRequest] = []

    def open_connection(self, to: object, *, bulk: bool) -> Wire:
        assert not bulk
        return self

    async def call(self, to: object, method: str, body: bytes) -> Part:
        """What goes by a task."""
        self.dialled.append(schema.decode(body, FindRequest))
        await trio.sleep(0.1)
        return Part(found(len(self.dialled[-1].targets)), memoryview(b""))

    def soon(self, compose: Callable[[], None]) -> None:
        self.composing.append(compose)

    def turn(self) -> None:
        composing, self.composing = self.composing, []
        for compose in composing:
            compose()

    def ask(self, method: str, body: bytes, payload: tuple[()], budget: float) -> OutgoingCall:
        assert (method, payload, budget) == ("dht.find", (), pytest.approx(LIMIT))
        if self.busy:
            raise PeerBusy("as many calls as the peer allows are in flight")
        number = len(self.calls)
        call = OutgoingCall(method, lambda _: None, lambda: self.cancelled.append(number))
        self.calls.append(call)
        self.requests.append(schema.decode(body, FindRequest))
        return call

    def answer(self, call: int, *bodies: bytes) -> None:
        for body in bodies:
            self.calls[call].arrived(Part(body, memoryview(b"")))
        self.calls[call].ended(None, "ok")


@asynccontextmanager
async def asking() -> AsyncIterator[tuple[Asks, Wire, Contacts]]:
    wire, jobs = Wire(), Jobs()
    contacts = Contacts(OWN.peer_id, ContactParams(), trio.current_time())
    contacts.learn(card(ANN, "10.0.0.1:4747"))
    contacts.dialled(ANN.peer_id, 0.0)
    async with trio.open_nursery() as parts:
        await parts.start(jobs.run)
        yield Asks(wire, contacts, NETWORK, jobs), wire, contacts
        parts.cancel_scope.cancel()


class Askers:
    """Those who ask ANN for places, and what became of each."""

    def __init__(self, asks: Asks, tasks: trio.Nursery) -> None:
        self.asks, self.tasks = asks, tasks
        self.ended: dict[int, P2PMoEError | None] = {}
        self.at: dict[int, float] = {}

    async def ask(self, number: int) -> None:
        try:
            await self.asks.find(ANN.peer_id, place(number))
            self.ended[number] = None
        except P2PMoEError as error:
            self.ended[number] = error
        self.at[number] = trio.current_time()

    async def come(self, *numbers: int) -> None:
        for number in numbers:
            self.tasks.start_soon(self.ask, number)
            await trio.testing.wait_all_tasks_blocked()  # in this order

    def kinds(self) -> dict[int, type]:
        return {number: type(self.ended[number]) for number in sorted(self.ended)}


@asynccontextmanager
async def askers() -> AsyncIterator[tuple[Askers, Wire, Contacts]]:
    async with asking() as (asks, wire, contacts), trio.open_nursery() as tasks:
        yield Askers(asks, tasks), wire, contacts
        await trio.testing.wait_all_tasks_blocked()


async def test_what_came_up_before_the_writers_turn_travels_in_one_call(autojump_clock) -> None:
    async with askers() as (them, wire, _):
        await them.come(1, 2)
        assert wire.requests == []
        wire.turn()
        await them.come(3)
        assert wire.requests == [FindRequest(targets=(place(1), place(2)))]
        wire.turn()
        wire.answer(1, found(1))
        wire.answer(0, found(2))
    assert them.kinds() == dict.fromkeys((1, 2, 3), type(None))
    assert wire.dialled == []
    assert wire.cancelled == []


async def test_an_answer_that_was_cut_is_asked_for_with_what_came_up_since(autojump_clock) -> None:
    async with askers() as (them, wire, _):
        await them.come(1, 2)
        wire.turn()
        wire.answer(0, found(1))
        await them.come(3)
        wire.turn()
        assert wire.requests[1] == FindRequest(targets=(place(2), place(3)))
        await them.come(4)
        wire.answer(1, found(1))
        wire.turn()
        assert wire.requests[2] == FindRequest(targets=(place(4), place(3)))
        wire.answer(2, found(2))
    assert them.kinds() == dict.fromkeys((1, 2, 3, 4), type(None))


async def test_who_is_late_is_avoided_and_its_call_cancelled_but_not_those_who_wait_less(
    autojump_clock,
) -> None:
    async with askers() as (them, wire, contacts):
        began = trio.current_time()
        await them.come(1)
        wire.turn()
        await trio.sleep(1)
        await them.come(2)
        wire.turn()
        await trio.sleep(LIMIT - 0.5)
        assert them.kinds() == {1: CallTimeout}
        assert them.at[1] == began + LIMIT
        assert wire.cancelled == [0]
        assert contacts.avoided(ANN.peer_id, trio.current_time())
        wire.answer(1, found(1))
    assert them.kinds() == {1: CallTimeout, 2: type(None)}


async def test_what_the_writer_cannot_send_is_late_as_well(autojump_clock) -> None:
    async with askers() as (them, wire, _):
        await them.come(1)
        await trio.sleep(LIMIT + 1)
        await them.come(2)  # in a call of its own
        wire.turn()
        assert wire.requests == [FindRequest(targets=(place(2),))]
        wire.answer(0, found(1))
    assert them.kinds() == {1: CallTimeout, 2: type(None)}


async def test_that_this_peer_stood_still_is_nobodys_fault(mock_clock) -> None:
    async with askers() as (them, wire, contacts):
        await them.come(1)
        wire.turn()
        mock_clock.jump(LIMIT + STALLED + 0.1)
        await trio.testing.wait_all_tasks_blocked()
        assert not contacts.avoided(ANN.peer_id, trio.current_time())
    assert them.kinds() == {1: PeerBusy}


@pytest.mark.parametrize("when", ["before the turn", "after it"])
async def test_what_was_not_begun_is_asked_again(autojump_clock, when: str) -> None:
    async with askers() as (them, wire, contacts):
        await them.come(1)
        if when == "before the turn":
            wire.open = False
            wire.turn()
        else:
            wire.turn()
            wire.calls[0].ended(NotBegun("the connection ended"), "unreachable")
        await trio.sleep(1)
        assert not contacts.avoided(ANN.peer_id, trio.current_time())
    assert them.kinds() == {1: type(None)}
    assert wire.dialled == [FindRequest(targets=(place(1),))]


async def test_a_call_that_is_lost_is_not_asked_again(autojump_clock) -> None:
    async with askers() as (them, wire, contacts):
        await them.come(1)
        wire.turn()
        wire.calls[0].ended(ConnectionLost("the peer was killed"), "lost")
        assert contacts.avoided(ANN.peer_id, trio.current_time())
    assert them.kinds() == {1: ConnectionLost}
    assert issubclass(ConnectionLost, PeerUnreachable)
    assert wire.dialled == []


async def test_a_connection_with_too_many_calls_is_not_the_peers_fault(autojump_clock) -> None:
    async with askers() as (them, wire, contacts):
        wire.busy = True
        await them.come(1)
        wire.turn()
        assert not contacts.avoided(ANN.peer_id, trio.current_time())
    assert them.kinds() == {1: PeerBusy}


@pytest.mark.parametrize("bodies", [[], [found(1), found(1)]])
async def test_an_answer_is_one_part(autojump_clock, bodies: list[bytes]) -> None:
    async with askers() as (them, wire, contacts):
        await them.come(1)
        wire.turn()
        wire.answer(0, *bodies)
        assert contacts.avoided(ANN.peer_id, trio.current_time())
    assert them.kinds() == {1: RemoteProtocolError}


async def test_a_long_answer_is_read_in_a_task_as_others_have_their_turn(autojump_clock) -> None:
    many = [KeyPair.from_seed(bytes([8, number]) * 16) for number in range(2 * VERIFY_AT_ONCE)]
    cards = tuple(card(keys, "10.0.0.9:1").raw for keys in many)
    async with askers() as (them, wire, contacts):
        await them.come(1, 2)
        wire.turn()
        wire.answer(0, found(2, cards))
        assert contacts.contact(many[VERIFY_AT_ONCE - 1].peer_id) is not None
        assert contacts.contact(many[-1].peer_id) is None
        await trio.testing.wait_all_tasks_blocked()
        assert contacts.contact(many[-1].peer_id) is not None
        await them.come(3)
        wire.turn()
        forged = cards[-1][:-1] + b"x"
        wire.answer(1, found(1, (*cards[:-1], forged)))
        await trio.testing.wait_all_tasks_blocked()
        assert contacts.avoided(ANN.peer_id, trio.current_time())
    assert them.kinds()[1] is them.kinds()[2] is type(None)
    assert issubclass(them.kinds()[3], RemoteProtocolError)


async def test_the_end_of_the_node_cancels_calls_and_tells_who_waits(autojump_clock) -> None:
    async with trio.open_nursery() as tasks:
        async with asking() as (asks, wire, _):
            them = Askers(asks, tasks)
            await them.come(1)
            wire.turn()
            await them.come(2)
        wire.turn()
        assert wire.cancelled == [0]
        assert len(wire.calls) == 1
        await them.come(3)
    assert them.kinds() == dict.fromkeys((1, 2, 3), NodeClosed)


async def test_what_cannot_be_asked_again_fails(autojump_clock, monkeypatch) -> None:
    async with askers() as (them, wire, _):
        await them.come(1, 2)
        wire.turn()
        await them.come(3)
        wire.turn()
        monkeypatch.setattr("p2pmoe.dht.jobs.MOST_RUNNING", 1)
        wire.answer(0, found(1))  # the other one needs a place, and 3 has it
        monkeypatch.setattr("p2pmoe.dht.jobs.MOST_RUNNING", 0)
        wire.calls[1].ended(NotBegun("the connection ended"), "unreachable")
    assert them.kinds() == {1: type(None), 2: PeerBusy, 3: PeerBusy}

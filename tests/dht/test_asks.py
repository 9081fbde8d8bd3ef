"""Questions to one peer, against a pool that answers as it is told."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from p2pmoe.dht.asks import ASK_LIMIT, VERIFY_AT_ONCE, Asks
from p2pmoe.dht.contacts import ContactParams, Contacts
from p2pmoe.dht.jobs import Jobs
from p2pmoe.dht.leases import Vote
from p2pmoe.dht.lines import BATCH_BYTES, STALLED
from p2pmoe.dht.messages import (
    MAX_BATCH,
    Copy,
    FindRequest,
    Found,
    FoundReply,
    GetRequest,
    MendKey,
    MendReply,
    MendRequest,
    PutReply,
    PutRequest,
    Verdict,
)
from p2pmoe.dht.reading import Question
from p2pmoe.errors import (
    CallTimeout,
    MalformedMessage,
    NodeClosed,
    P2PMoEError,
    PeerBusy,
    PeerUnreachable,
)
from p2pmoe.identity import KeyPair
from p2pmoe.net.calls import Part
from p2pmoe.wire import schema
from p2pmoe.wire.envelope import Kind, VerifiedCache
from tests.dht.swarm_of_ids import NETWORK, PEOPLE, card, dictionary, lease, manifest, place

OWN, ANN, BOB, EVE = PEOPLE[:4]
LEASE = lease(ANN)
QUESTION = Question(Kind.LEASE, LEASE.body.key)
NOTHING = Found()


class ScriptedPool:
    """Answers each call by `answer`, a function of the decoded request."""

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.answer: Callable[[Any], msgspec.Struct] = lambda _: FoundReply(answers=(NOTHING,))
        self.wait = 0.01  # seconds for each call
        self.verified = VerifiedCache(64)

    def open_connection(self, to: object, *, bulk: bool) -> None:
        """It has to dial for each call."""

    async def call(self, to: object, method: str, body: bytes) -> Part:
        types = {
            "dht.find": FindRequest,
            "dht.get": GetRequest,
            "dht.put": PutRequest,
            "dht.mend": MendRequest,
        }
        request = schema.decode(body, types[method])
        self.requests.append(request)
        await trio.sleep(self.wait)
        return Part(schema.encode(self.answer(request)), memoryview(b""))


@asynccontextmanager
async def asking() -> AsyncIterator[tuple[Asks, ScriptedPool, Contacts]]:
    """Asks that know where ANN is."""
    pool, jobs = ScriptedPool(), Jobs()
    contacts = Contacts(OWN.peer_id, ContactParams(), trio.current_time())
    contacts.learn(card(ANN, "10.0.0.1:4747"))
    contacts.dialled(ANN.peer_id, 0.0)
    asks = Asks(pool, contacts, NETWORK, jobs)
    async with trio.open_nursery() as parts:
        await parts.start(jobs.run)
        yield asks, pool, contacts
        parts.cancel_scope.cancel()


async def refused(
    answer: msgspec.Struct, ask: Callable[[Asks], Any] | None = None
) -> MalformedMessage:
    """How an answer to a get is refused; its sender is avoided from then on."""
    async with asking() as (asks, pool, contacts):
        pool.answer = lambda _: answer
        with pytest.raises(MalformedMessage) as caught:
            await (ask(asks) if ask is not None else asks.get(ANN.peer_id, QUESTION))
        assert contacts.avoided(ANN.peer_id, trio.current_time())
        assert ANN.peer_id not in contacts.table
    return caught.value


async def test_an_answer_is_opened_and_its_contacts_are_learned(autojump_clock) -> None:
    async with asking() as (asks, pool, contacts):
        found = Found(closer=(1,), records=(Copy(record=LEASE.raw, left_ms=5000),), number=3)
        cards = (card(ANN, "10.0.0.1:4747").raw, card(BOB, "10.0.0.2:4747").raw)
        pool.answer = lambda _: FoundReply(answers=(found,), contacts=cards)
        asked_at = trio.current_time()
        answer = await asks.get(ANN.peer_id, QUESTION)
        assert answer.closer == (BOB.peer_id,)
        assert (answer.number, answer.more) == (3, False)
        assert answer.records[0].signed == LEASE
        assert answer.records[0].expires_at == asked_at + 5.0
        assert contacts.contact(BOB.peer_id) is not None
        assert not contacts.was_dialled(BOB.peer_id)


async def test_questions_that_come_up_together_travel_together(autojump_clock) -> None:
    async with asking() as (asks, pool, _):
        pool.answer = lambda request: FoundReply(answers=(NOTHING,) * len(request.targets))
        async with trio.open_nursery() as questions:
            for number in range(MAX_BATCH + 5):
                questions.start_soon(asks.find, ANN.peer_id, place(number))
        assert [len(request.targets) for request in pool.requests] == [MAX_BATCH, 5]


async def test_questions_whose_answers_were_cut_are_asked_again(autojump_clock) -> None:
    async with asking() as (asks, pool, _):
        pool.answer = lambda request: FoundReply(answers=(NOTHING,) * min(2, len(request.keys)))
        async with trio.open_nursery() as questions:
            for number in range(5):
                questions.start_soon(asks.get, ANN.peer_id, Question(Kind.LEASE, place(number)))
        assert [len(request.keys) for request in pool.requests] == [5, 3, 1]


async def test_large_records_are_put_in_several_calls(autojump_clock) -> None:
    async with asking() as (asks, pool, _):
        stored = Verdict(outcome="stored")
        pool.answer = lambda request: PutReply(verdicts=(stored,) * len(request.records))
        records = [
            manifest(ANN, f"a{number}", options={f"o{i}": "x" * 256 for i in range(31)})
            for number in range(8)
        ]
        votes: list[Vote] = []

        async def put(record: Any) -> None:
            votes.append(await asks.put(ANN.peer_id, record))

        async with trio.open_nursery() as puts:
            for record in records:
                puts.start_soon(put, record)
        assert votes == [Vote("stored")] * 8
        sizes = [sum(len(each.record) for each in request.records) for request in pool.requests]
        assert len(sizes) > 1
        assert max(sizes) <= BATCH_BYTES


async def test_a_refusal_names_the_owner_and_until_when(autojump_clock) -> None:
    async with asking() as (asks, pool, _):
        theirs = Copy(record=lease(BOB, number=4).raw, left_ms=7000)
        verdict = Verdict(outcome="refused", why="owned", number=4, owner=theirs)
        pool.answer = lambda _: PutReply(verdicts=(verdict,))
        asked_at = trio.current_time()
        vote = await asks.put(ANN.peer_id, LEASE)
        assert (vote.outcome, vote.why, vote.number) == ("refused", "owned", 4)
        assert vote.owner is not None
        assert vote.owner.signed.signer == BOB.peer_id
        assert vote.owner.expires_at == asked_at + 7.0
        assert (await asks.put(ANN.peer_id, dictionary(ANN, 1))).owner is None


async def test_one_who_goes_away_does_not_disturb_the_others(autojump_clock) -> None:
    async with asking() as (asks, pool, _):
        pool.wait = 1.0
        pool.answer = lambda request: FoundReply(answers=(NOTHING,) * len(request.targets))
        async with trio.open_nursery() as questions:
            with trio.move_on_after(0.5):
                async with trio.open_nursery() as other:
                    other.start_soon(asks.find, ANN.peer_id, place(1))
                    questions.start_soon(asks.find, ANN.peer_id, place(2))
        assert len(pool.requests) == 1
        assert trio.current_time() >= 1.0


# ------------------------------------------------------------------------------------- failures
async def test_a_peer_that_does_not_answer_in_time_is_avoided(autojump_clock) -> None:
    async with asking() as (asks, pool, contacts):
        pool.wait = 100.0
        began = trio.current_time()
        with pytest.raises(CallTimeout):
            await asks.find(ANN.peer_id, place(1))
        assert trio.current_time() - began == pytest.approx(3.0)
        assert contacts.avoided(ANN.peer_id, trio.current_time())


async def test_a_peer_without_an_address_cannot_be_asked(autojump_clock) -> None:
    async with asking() as (asks, pool, _):
        with pytest.raises(PeerUnreachable, match="no address"):
            await asks.find(EVE.peer_id, place(1))
        assert pool.requests == []


async def test_a_busy_peer_is_not_avoided(autojump_clock) -> None:
    async with asking() as (asks, pool, contacts):

        def busy(_: Any) -> msgspec.Struct:
            raise PeerBusy("later")

        pool.answer = busy
        with pytest.raises(PeerBusy):
            await asks.find(ANN.peer_id, place(1))
        assert not contacts.avoided(ANN.peer_id, trio.current_time())
        assert ANN.peer_id in contacts.table


async def test_who_waits_when_the_node_ends_is_told(autojump_clock) -> None:
    told: list[P2PMoEError] = []
    jobs = Jobs()
    contacts = Contacts(OWN.peer_id, ContactParams(), 0.0)
    asks = Asks(ScriptedPool(), contacts, NETWORK, jobs)

    async def ask() -> None:
        try:
            await asks.find(ANN.peer_id, place(1))
        except P2PMoEError as error:
            told.append(error)

    async with trio.open_nursery() as questions:
        questions.start_soon(ask)
        questions.start_soon(ask)
        await trio.sleep(1)
        with trio.CancelScope() as scope:
            scope.cancel()
            await jobs.run()
    assert [type(error) for error in told] == [NodeClosed, NodeClosed]


# ------------------------------------------------------------------- answers of no honest peer
async def test_more_answers_than_questions_are_refused(autojump_clock) -> None:
    assert (await refused(FoundReply(answers=(NOTHING, NOTHING)))).why == "dht.answers"


async def test_a_contact_that_is_not_there_is_refused(autojump_clock) -> None:
    reply = FoundReply(answers=(Found(closer=(0,)),))
    assert (await refused(reply)).why == "dht.contact"


async def test_a_record_of_another_key_is_refused(autojump_clock) -> None:
    copy = Copy(record=lease(ANN, "ffn.0.0").raw, left_ms=1)
    reply = FoundReply(answers=(Found(records=(copy,)),))
    assert (await refused(reply)).why == "dht.key"


async def test_a_record_of_another_kind_is_refused(autojump_clock) -> None:
    reply = FoundReply(answers=(Found(records=(Copy(record=manifest(ANN).raw, left_ms=1),)),))
    assert (await refused(reply)).why == "envelope.kind"


async def test_a_forged_record_is_refused(autojump_clock) -> None:
    forged = bytearray(LEASE.raw)
    forged[-1] ^= 1
    reply = FoundReply(answers=(Found(records=(Copy(record=bytes(forged), left_ms=1),)),))
    assert (await refused(reply)).why == "envelope.signature"


async def test_records_that_nobody_asked_for_are_refused(autojump_clock) -> None:
    reply = FoundReply(answers=(Found(records=(Copy(record=LEASE.raw, left_ms=1),)),))
    error = await refused(reply, lambda asks: asks.find(ANN.peer_id, place(1)))
    assert error.why == "dht.answers"


async def test_another_number_of_verdicts_than_of_records_is_refused(autojump_clock) -> None:
    reply = PutReply(verdicts=(Verdict(outcome="stored"),) * 2)
    error = await refused(reply, lambda asks: asks.put(ANN.peer_id, LEASE))
    assert error.why == "dht.answers"


async def test_long_answers_let_other_tasks_run_while_they_are_verified(autojump_clock) -> None:
    async with asking() as (asks, pool, _):
        many = [KeyPair.from_seed(bytes([9, number]) * 16) for number in range(4 * VERIFY_AT_ONCE)]
        cards = tuple(card(keys, "10.0.0.9:1").raw for keys in many)
        copies = tuple(Copy(record=dictionary(keys, 1).raw, left_ms=9) for keys in many)
        turns, answering = 0, trio.Event()

        def answer(_: Any) -> FoundReply:
            answering.set()
            return FoundReply(answers=(Found(records=copies),), contacts=cards)

        pool.answer = answer

        async def other() -> None:
            nonlocal turns
            await answering.wait()
            while True:
                await trio.lowlevel.checkpoint()
                turns += 1

        pool.wait = 0.0
        async with trio.open_nursery() as tasks:
            tasks.start_soon(other)
            answer = await asks.get(ANN.peer_id, Question(Kind.PREFIX, dictionary(ANN, 1).body.key))
            assert len(answer.records) == len(many)
            assert turns >= 4
            tasks.cancel_scope.cancel()


async def test_a_deadline_that_is_late_because_this_peer_stood_still_is_nobodys_fault(
    mock_clock: trio.testing.MockClock,
) -> None:
    async with asking() as (asks, pool, contacts):
        pool.wait = 100.0
        for late, avoided in ((STALLED + 0.1, False), (0.0, True)):
            errors: list[P2PMoEError] = []

            async def ask(errors: list[P2PMoEError] = errors) -> None:
                try:
                    await asks.find(ANN.peer_id, place(1))
                except P2PMoEError as error:
                    errors.append(error)

            async with trio.open_nursery() as questions:
                questions.start_soon(ask)
                await trio.testing.wait_all_tasks_blocked()
                mock_clock.jump(ASK_LIMIT + late)
            assert isinstance(errors[0], CallTimeout if avoided else PeerBusy)
            assert contacts.avoided(ANN.peer_id, trio.current_time()) is avoided


async def test_a_peer_is_told_where_others_have_more(autojump_clock) -> None:
    async with asking() as (asks, pool, _):
        pool.answer = lambda _: MendReply()
        await asks.mend(ANN.peer_id, Kind.LEASE, place(1))
        assert pool.requests == [MendRequest(keys=(MendKey(kind="lease", key=place(1)),))]


async def test_a_record_of_any_kind_is_opened_as_what_it_says_it_is(autojump_clock) -> None:
    anything = Question(None, QUESTION.key)
    async with asking() as (asks, pool, _):
        found = Found(records=(Copy(record=LEASE.raw, left_ms=5000),))
        pool.answer = lambda _: FoundReply(answers=(found,))
        answer = await asks.get(ANN.peer_id, anything)
        assert answer.records[0].signed == LEASE
    for raw in (card(ANN, "10.0.0.1:4747").raw, b"\x81\x01"):  # no kind that is stored; no kind
        error = await refused(
            FoundReply(answers=(Found(records=(Copy(record=raw, left_ms=1),)),)),
            lambda asks: asks.get(ANN.peer_id, anything),
        )
        assert error.why == "envelope.kind"

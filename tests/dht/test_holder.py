"""What a holder answers, and what it refuses."""

import pytest
import trio

from p2pmoe.dht.messages import (
    Copy,
    Found,
    FoundReply,
    PrefixRecord,
)
from p2pmoe.dht.reading import Searched
from p2pmoe.dht.routing import RoutingParams, RoutingTable
from p2pmoe.errors import (
    NotAllowed,
    PeerBusy,
)
from p2pmoe.identity import KeyPair
from p2pmoe.wire import schema
from p2pmoe.wire.envelope import Kind, seal
from p2pmoe.wire.peer_record import Contact
from tests.dht.peers import UID, swarm, town
from tests.dht.swarm_of_ids import GRID, NETWORK, PEOPLE, card, dictionary, lease, manifest, place


async def test_a_lease_is_taken_only_from_its_publisher(autojump_clock) -> None:
    async with town() as here:
        one, two, three = await swarm(here, 3)
        stolen = one.dht._owner._lease((GRID, UID), 1, 30.0)
        vote = await two.dht._asks.put(three.id, stolen)
        assert (vote.outcome, vote.why) == ("refused", "not_publisher")


async def test_a_publisher_that_cannot_be_dialled_back_is_granted_nothing(autojump_clock) -> None:
    async with town() as here:
        (one,) = await swarm(here, 1)
        liar = await here.open(3, by=[one], client=True)
        record = one.dht._own_record()
        assert record is not None
        liar.dht._contacts.learn(record)
        vote = await liar.dht._asks.put(one.id, lease(liar.keys))
        assert (vote.outcome, vote.why) == ("refused", "not_dialled")


async def test_a_client_refuses_to_hold_anything(autojump_clock) -> None:
    async with town() as here:
        one = await here.open(1)
        client = await here.open(2, client=True)
        one.dht._contacts.contact = lambda peer: Contact(peer, ())
        with pytest.raises(NotAllowed):
            await one.dht._asks.put(client.id, lease(one.keys))


async def test_a_long_dictionary_is_read_page_by_page(autojump_clock) -> None:
    async with town() as here:
        one, two = await swarm(here, 2)
        await trio.sleep(1)
        coordinates = tuple(range(1000))
        store = two.dht._store
        for number in range(60):
            body = PrefixRecord(
                grid=GRID,
                prefix="ffn",
                coordinates=coordinates,
                epoch=1,
                incarnation=1,
                ttl_ms=60_000,
            )
            keys = KeyPair.from_seed(number.to_bytes(32, "big"))
            store.put(seal(keys, body, kind=Kind.PREFIX, network=NETWORK), trio.current_time())
        view = await one.dht.get_prefix(GRID, "ffn")
        assert {len(peers) for peers in view.coordinates.values()} == {60}


async def test_answers_that_do_not_fit_one_reply_are_asked_for_again(autojump_clock) -> None:
    async with town() as here:
        one, two = await swarm(here, 2)
        await trio.sleep(1)
        now = trio.current_time()
        for prefix in ("a", "b", "c"):
            for number in range(1, 12):
                keys = KeyPair.from_seed(number.to_bytes(32, "big"))
                two.dht._store.put(dictionary(keys, *range(900), prefix=prefix), now)
        sizes = []
        async with trio.open_nursery() as reads:

            async def read(prefix: str) -> None:
                view = await one.dht.get_prefix(GRID, prefix)
                sizes.append({len(peers) for peers in view.coordinates.values()})

            for prefix in ("a", "b", "c"):
                reads.start_soon(read, prefix)
        assert sizes == [{11}] * 3


async def test_so_many_places_that_their_contacts_do_not_fit_are_asked_for_again(
    autojump_clock,
) -> None:
    async with town() as here:
        one, two = await swarm(here, 2)
        await trio.sleep(1)
        two.dht._contacts.table = RoutingTable(two.id, RoutingParams(k=64), 0.0)
        for number in range(1, 250):
            keys = KeyPair.from_seed(number.to_bytes(32, "big"))
            addresses = [f"host-{number}-{'x' * 40}-{each}:4747" for each in range(4)]
            two.dht._contacts.learn(card(keys, *addresses))
            two.dht._contacts.dialled(keys.peer_id, 0.0)
        answers = []
        async with trio.open_nursery() as finds:

            async def find(number: int) -> None:
                answer = await one.dht._asks.find(two.id, place(number << 248))
                answers.append(answer.closer)

            for number in range(0, 256, 8):
                finds.start_soon(find, number)
        assert len(answers) == 32
        assert {len(closer) for closer in answers} == {8}


async def test_who_may_be_dead_is_named_only_where_too_few_others_are(autojump_clock) -> None:
    async with town() as here:
        one, two, *others = await swarm(here, 12)
        await trio.sleep(1)
        now, target = trio.current_time(), others[0].id.raw
        for peer in others[:2]:
            one.dht._contacts.connection(peer.id, now, broke=True)
        sure = {peer.id for peer in others[2:]}
        assert set((await two.dht._asks.find(one.id, target)).closer) == sure
        one.dht._contacts.connection(others[2].id, now, broke=True)
        named = (await two.dht._asks.find(one.id, target)).closer
        assert len(named) == len(sure)
        assert others[0].id in named


async def test_a_holder_that_always_has_more_is_not_asked_for_ever(autojump_clock) -> None:
    async with town() as here:
        one, two = await swarm(here, 2)
        await trio.sleep(1)
        record = dictionary(PEOPLE[5], 3)
        pages = 0

        async def endless(call) -> None:
            nonlocal pages
            pages += 1
            found = Found(records=(Copy(record=record.raw, left_ms=9000),), more=True)
            await call.send(schema.encode(FoundReply(answers=(found,))))

        two.pool.handlers["dht.get"] = endless
        view = await one.dht.get_prefix(GRID, "ffn")
        assert view.coordinates == {3: (PEOPLE[5].peer_id,)}
        assert pages < 20


async def test_a_holder_without_room_says_so_and_that_is_no_error(autojump_clock) -> None:
    async with town() as here:
        one = await here.open(1)
        client = await here.open(2, client=True)
        for keys in PEOPLE[:4]:
            assert (await one.dht._holder.put(manifest(keys))).outcome == "stored"
        assert (await one.dht._holder.put(manifest(PEOPLE[5]))).outcome == "full"
        assert (await one.dht._holder.put(dictionary(PEOPLE[0], 1))).outcome == "stored"
        assert (await one.dht._holder.put(dictionary(PEOPLE[0], 1))).outcome == "stale"
        receipt = await client.dht.put_manifest(manifest(PEOPLE[5]))
        assert receipt.stored == ()
        assert receipt.failed == (one.id,)
        assert receipt.manifest == manifest(PEOPLE[0])


async def test_a_holder_that_cannot_ask_the_others_in_time_abstains(autojump_clock) -> None:
    async with town() as here:
        one, two = await swarm(here, 2)
        await trio.sleep(1)

        async def slow(*_: object) -> Searched:
            await trio.sleep_forever()
            raise AssertionError

        two.dht._searches.read = slow
        vote = await one.dht._asks.put(two.id, lease(one.keys))
        assert vote.outcome == "abstained"

        async def busy(*_: object) -> Searched:
            raise PeerBusy("too much to do")

        two.dht._searches.read = busy
        vote = await one.dht._asks.put(two.id, lease(one.keys))
        assert vote.outcome == "abstained"

"""Reads and writes at the closest that are known: when, at what cost, and in spite of liars."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import trio
import trio.lowlevel

from p2pmoe.dht.direct import ALL_SLOW, SLOW
from p2pmoe.dht.leases import MOST_HOLDERS, LeaseRefused, holders
from p2pmoe.dht.messages import (
    Copy,
    Found,
    FoundReply,
    GetRequest,
    PutReply,
    PutRequest,
    Verdict,
    key_of,
)
from p2pmoe.dht.region import LEAST_MEASURES, MOST_MEASURES, _Measure
from p2pmoe.errors import NodeClosed, PeerBusy
from p2pmoe.identity import PeerId
from p2pmoe.net.incoming import IncomingCall
from p2pmoe.wire import schema
from p2pmoe.wire.envelope import Kind, Signed
from tests.dht.peers import UID, Peer, Town, owner_of, pass_on, swarm, town
from tests.dht.swarm_of_ids import GRID, dictionary, lease, manifest, place
from tests.dht.test_writing import holding, questions

LEASE_KEY = key_of(Kind.LEASE, GRID, UID)


async def settled(here: Town, number: int = 10) -> list[Peer]:
    """Peers that have all met."""
    peers = await swarm(here, number)
    await trio.sleep(2)
    return peers


async def count(peer: Peer) -> None:
    """Let a peer know from several lookups how many there are."""
    for where in range(LEAST_MEASURES):
        await peer.dht._searches.find(place(where << 248))


def order(peers: Sequence[Peer], key: bytes) -> list[Peer]:
    """Who holds a key, closest first, and behind them the others."""
    by_id = {peer.id: peer for peer in peers}
    return [by_id[each] for each in holders(key, by_id, None, len(peers))]


async def seen(reader: Peer) -> tuple[PeerId, int] | None:
    """Whom a reader takes for the owner, and the number of its lease."""
    view = await owner_of(reader)
    return None if view is None else (view.peer, view.number)


def lie(peer: Peer, record: Signed[Any], closer: Sequence[Signed[Any]] = ()) -> None:
    """From now on this is all that the peer holds and knows, whatever is put there."""
    places = tuple(range(len(closer)))
    cards = tuple(each.raw for each in closer)

    async def get(call: IncomingCall) -> None:
        count = len(schema.decode(call.body, GetRequest).keys)
        copies = (Copy(record=record.raw, left_ms=30_000),)
        one = Found(closer=places, records=copies, number=99)
        await call.send(schema.encode(FoundReply(answers=(one,) * count, contacts=cards)))

    async def put(call: IncomingCall) -> None:
        count = len(schema.decode(call.body, PutRequest).records)
        await call.send(schema.encode(PutReply(verdicts=(Verdict(outcome="stored"),) * count)))

    peer.pool.handlers |= {"dht.get": get, "dht.put": put}


def forget(reader: Peer, peer: PeerId) -> None:
    reader.dht._contacts.table.remove(peer)
    del reader.dht._contacts._known[peer]


# ----------------------------------------------------------------------------------------- when
async def test_a_lease_is_read_directly_once_several_lookups_told_how_many_peers_there_are(
    autojump_clock: object,
) -> None:
    async with town() as here:
        peers = await settled(here)
        direct = peers[0].dht._searches.direct
        assert direct.closest_known(LEASE_KEY, careful=True) == []
        nearest = holders(LEASE_KEY, [peer.id for peer in peers[1:]], None, 8)
        assert direct.closest_known(LEASE_KEY, careful=False) == nearest
        await count(peers[0])
        assert direct.closest_known(LEASE_KEY, careful=True) == nearest


async def test_who_knows_fewer_than_half_of_all_searches(autojump_clock: object) -> None:
    async with town() as here:
        peers = await settled(here)
        await count(peers[0])
        for peer in peers[1:7]:
            forget(peers[0], peer.id)
        for careful in (True, False):
            assert peers[0].dht._searches.direct.closest_known(LEASE_KEY, careful=careful) == []


async def stored(peers: Sequence[Peer]) -> Signed[Any]:
    """A manifest that the first of these has put."""
    made = manifest(peers[0].keys)
    await peers[0].dht.put_manifest(made)
    return made


async def test_who_may_be_dead_is_not_asked_and_with_too_few_others_it_takes_a_search(
    autojump_clock: object,
) -> None:
    async with town() as here:
        peers = await settled(here)
        direct = peers[0].dht._searches.direct
        nearest = direct.closest_known(LEASE_KEY, careful=False)
        peers[0].dht._contacts.connection(nearest[0], 0.0, broke=True)
        peers[0].dht.member_suspected(nearest[1])
        left = direct.closest_known(LEASE_KEY, careful=False)
        assert left[:-1] == nearest[2:]
        for peer in left[:3]:
            peers[0].dht.member_suspected(peer)
        assert direct.closest_known(LEASE_KEY, careful=False) == []


async def test_a_dead_holder_whose_connection_broke_costs_a_read_no_dial(
    autojump_clock: object,
) -> None:
    async with town() as here:
        peers = await settled(here)
        made, reader = await stored(peers), peers[1]
        nearest = reader.dht._searches.direct.closest_known(made.body.key, careful=False)
        dead = next(peer for peer in peers[2:] if peer.id == nearest[0])
        await here.kill(dead)
        assert reader.dht._contacts.doubtful(dead.id)
        asked = questions(reader)
        began = trio.current_time()
        assert await reader.dht.get_manifest(made.body.name) == made
        assert asked.count("dht.get") <= 3
        assert trio.current_time() - began < SLOW


async def test_of_the_closest_those_that_are_connected_are_asked_first(
    autojump_clock: object,
) -> None:
    async with town() as here:
        peers = await settled(here)
        made, reader = await stored(peers), peers[1]
        closest = [peer for peer in order(peers, made.body.key) if peer is not reader]
        dead = closest[0]
        for each in list(reader.pool._connections(dead.id)):
            each.retire()  # in order, which says nothing about the peer
        await trio.sleep(1)
        await here.kill(dead)
        assert not reader.pool.connected(dead.id)
        assert not reader.dht._contacts.doubtful(dead.id)
        asked = questions(reader)
        assert await reader.dht.get_manifest(made.body.name) == made
        assert asked.count("dht.get") <= 3


async def test_in_hostile_mode_nothing_is_read_or_written_directly(autojump_clock: object) -> None:
    async with town() as here:
        peers = await settled(here)
        one = await here.open(11, by=peers[:1], hostile=True)
        await count(one)
        for careful in (True, False):
            assert one.dht._searches.direct.closest_known(LEASE_KEY, careful=careful) == []


async def test_where_ids_crowd_around_the_key_it_takes_a_search(
    autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with town() as here:
        peers = await settled(here)
        one = peers[0]
        await count(one)
        assert one.dht._searches.direct.closest_known(LEASE_KEY, careful=True)
        for number in range(MOST_MEASURES):
            one.dht._searches.size._measures[place(number)] = _Measure(trio.current_time(), 17.0)
        monkeypatch.setattr("p2pmoe.dht.region.GROUND_BELOW", 1e9)  # as if all lay near
        assert one.dht._searches.direct.closest_known(LEASE_KEY, careful=True) == []


# --------------------------------------------------------------------------------- at what cost
async def test_a_read_asks_as_many_as_must_agree_and_a_read_of_nothing_the_holders(
    autojump_clock: object,
) -> None:
    async with town() as here:
        ranks = order(await settled(here), LEASE_KEY)
        await ranks[7].dht.claim(GRID, UID)
        await count(ranks[8])
        calls = questions(ranks[8])
        assert await seen(ranks[8]) == (ranks[7].id, 1)
        assert calls == ["dht.get"] * 3
        nothing = key_of(Kind.LEASE, GRID, "ffn.9.9")
        reader = order(ranks, nothing)[8]
        await count(reader)
        calls = questions(reader)
        assert await owner_of(reader, "ffn.9.9") is None
        assert calls == ["dht.get"] * MOST_HOLDERS


async def never(_call: IncomingCall) -> None:
    await trio.sleep_forever()


async def test_the_next_closest_takes_the_place_of_one_that_is_gone_and_of_a_slow_one(
    autojump_clock: object,
) -> None:
    async with town() as here:
        ranks = order(await settled(here), LEASE_KEY)
        owner, reader = ranks[7:9]
        await owner.dht.claim(GRID, UID)
        await count(reader)
        await here.kill(ranks[0])
        assert await seen(reader) == (owner.id, 1)
        ranks[1].pool.handlers["dht.get"] = never
        calls = questions(reader)
        began = trio.current_time()
        assert await seen(reader) == (owner.id, 1)
        assert SLOW <= trio.current_time() - began < 1.5 * SLOW
        assert calls.count("dht.get") == 6


async def test_what_a_slow_one_answers_late_still_counts(autojump_clock: object) -> None:
    """A dictionary, of which one of the slow ones knows more than all others."""
    async with town() as here:
        peers = await settled(here)
        key = key_of(Kind.PREFIX, GRID, "ffn")
        ranks = order(peers, key)
        reader = ranks[8]
        for peer in ranks[:5]:
            lie(peer, dictionary(ranks[7].keys, 3))
        lie(ranks[0], dictionary(ranks[6].keys, 4))
        delay(ranks[0], 1.4 * SLOW)
        delay(ranks[5], 0.8 * SLOW)
        calls = questions(reader)
        view = await reader.dht.get_prefix(GRID, "ffn")
        assert set(view.coordinates) == {3, 4}
        assert calls.count("dht.get") == 6


def delay(peer: Peer, seconds: float) -> None:
    get = peer.pool.handlers["dht.get"]

    async def later(call: IncomingCall) -> None:
        await trio.sleep(seconds)
        await pass_on(call, get)

    peer.pool.handlers["dht.get"] = later


async def test_where_all_are_slow_a_read_waits_for_them_and_asks_no_more(
    autojump_clock: object,
) -> None:
    async with town() as here:
        ranks = order(await settled(here), LEASE_KEY)
        await ranks[7].dht.claim(GRID, UID)
        reader = ranks[8]
        await count(reader)
        for peer in ranks:
            delay(peer, 1.2 * SLOW)
        calls = questions(reader)
        asked = []
        for _ in range(6):
            assert await seen(reader) == (ranks[7].id, 1)
            asked.append(len(calls))
            calls.clear()
        assert asked == [3] * 6


async def test_readers_of_one_key_share_a_read_whichever_of_them_goes_away(
    autojump_clock: object,
) -> None:
    async with town() as here:
        ranks = order(await settled(here), LEASE_KEY)
        owner, reader = ranks[7:9]
        await owner.dht.claim(GRID, UID)
        await count(reader)
        for gone in (0.0, 0.005):  # before its questions have left, and on their way
            calls = questions(reader)
            came: list[tuple[PeerId, int] | None] = []
            first = trio.CancelScope()

            async def read(scope: trio.CancelScope, came: list[Any] = came) -> None:
                with scope:
                    came.append(await seen(reader))

            async with trio.open_nursery() as readers:
                readers.start_soon(read, first)
                await trio.lowlevel.checkpoint()
                readers.start_soon(read, trio.CancelScope())
                await trio.sleep(gone)
                first.cancel()
            assert came == [(owner.id, 1)]
            assert calls == ["dht.get"] * 3


async def test_a_read_whose_reader_goes_away_goes_on_by_a_search_where_all_are_slow(
    autojump_clock: object,
) -> None:
    async with town() as here:
        ranks = order(await settled(here), LEASE_KEY)
        await ranks[7].dht.claim(GRID, UID)
        reader = ranks[8]
        await count(reader)
        for peer in ranks[:3]:
            peer.pool.handlers["dht.get"] = never
        calls = questions(reader)
        with trio.move_on_after(SLOW / 2):
            await seen(reader)
        assert len(calls) == 3
        await trio.sleep(SLOW)
        assert len(calls) == 3
        await trio.sleep(ALL_SLOW)
        assert len(calls) > 3
        assert reader.dht._searches._flights._flying == {}


async def test_a_read_ends_with_the_node_and_where_nothing_more_can_be_asked(
    autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with town() as here:
        ranks = order(await settled(here), LEASE_KEY)
        reader = ranks[8]
        await count(reader)
        with monkeypatch.context() as few:
            few.setattr("p2pmoe.dht.jobs.MOST_RUNNING", 1)
            with pytest.raises(PeerBusy):
                await seen(reader)
        assert reader.dht._searches._flights._flying == {}
        ended: list[NodeClosed] = []

        async def read() -> None:
            try:
                await seen(reader)
            except NodeClosed as error:
                ended.append(error)

        async with trio.open_nursery() as readers:
            readers.start_soon(read)
            await trio.sleep(0.005)
            await here.kill(reader)
        assert len(ended) == 1


# ----------------------------------------------------------------------------- in spite of liars
async def test_two_of_five_that_name_another_owner_or_an_older_lease_are_not_believed(
    autojump_clock: object,
) -> None:
    async with town() as here:
        ranks = order(await settled(here), LEASE_KEY)
        liars, owner, reader, stranger = ranks[:2], *ranks[7:10]
        await owner.dht.claim(GRID, UID)
        await owner.dht.withdraw([UID])
        view = await owner.dht.claim(GRID, UID)
        assert view.number > 1
        for one in (reader, stranger):
            await count(one)
        cards = [reader.dht._contacts.record(liar.id) for liar in liars]
        for liar in liars:
            lie(liar, lease(liars[0].keys, UID, number=99, version=99), list(filter(None, cards)))
        assert await seen(reader) == (owner.id, view.number)
        with pytest.raises(LeaseRefused):
            await stranger.dht.claim(GRID, UID)
        for liar in liars:
            lie(liar, lease(owner.keys, UID, number=1))
        assert await seen(reader) == (owner.id, view.number)


async def test_two_of_five_that_name_another_manifest_are_not_believed_nor_can_they_hide_one(
    autojump_clock: object,
) -> None:
    async with town() as here:
        peers = await settled(here)
        made = manifest(peers[0].keys)
        ranks = order(peers, made.body.key)
        await ranks[8].dht.put_manifest(made)
        for liar in ranks[:2]:
            lie(liar, manifest(liar.keys))
        forget(ranks[9], ranks[2].id)
        found = await ranks[9].dht._searches.read(Kind.MANIFEST, made.body.key)
        assert [peer.id for peer in ranks[:MOST_HOLDERS]] == found.holders
        for reader in ranks[5:]:
            assert await reader.dht.get_manifest("ffn") == made


async def test_a_holder_that_a_liar_hides_from_a_putter_is_named_by_the_others(
    autojump_clock: object,
) -> None:
    async with town() as here:
        peers = await settled(here)
        made = manifest(peers[0].keys)
        ranks = order(peers, made.body.key)
        lie(ranks[0], made)
        for hidden in ranks[1:3]:
            forget(ranks[9], hidden.id)
        receipt = await ranks[9].dht.put_manifest(made)
        assert set(receipt.stored) == {peer.id for peer in ranks[:MOST_HOLDERS]}
        assert holding(peers, made) >= {peer.id for peer in ranks[1:MOST_HOLDERS]}

"""Joining, dialling back, losing and finding peers again."""

import pytest
import trio

from p2pmoe.dht.neighbours import LOOK_AFTER, LOOK_WITHIN
from p2pmoe.dht.routing import PingOldest, RoutingParams, RoutingTable
from p2pmoe.errors import (
    LocalProtocolError,
    NodeClosed,
    PeerUnreachable,
)
from p2pmoe.net.pool import PeerConnected, PeerLost
from p2pmoe.wire.address import Address
from tests.dht.peers import UID, Peer, Town, owner_of, swarm, town
from tests.dht.swarm_of_ids import GRID, PEOPLE, card, manifest, place


async def test_a_swarm_of_one_stores_and_claims_at_once(autojump_clock) -> None:
    async with town() as here:
        one = await here.open(1)
        view = await one.dht.claim(GRID, UID)
        assert (view.peer, view.number) == (one.id, 1)
        assert await owner_of(one) == view
        receipt = await one.dht.put_manifest(manifest(PEOPLE[0]))
        assert receipt.stored == (one.id,)
        assert await one.dht.get_manifest("ffn") == manifest(PEOPLE[0])


async def test_two_peers_know_each_other_whoever_dialled(autojump_clock) -> None:
    async with town() as here:
        one, two = await swarm(here, 2)
        await trio.sleep(1)
        assert one.id in two.dht._contacts.table
        assert two.id in one.dht._contacts.table


async def test_a_peer_may_join_through_any_other_and_then_knows_all(autojump_clock) -> None:
    async with town() as here:
        peers: list[Peer] = []
        for number in range(1, 7):
            peers.append(await here.open(number, by=peers[-1:]))
        await trio.sleep(1)
        last = await here.open(7, by=[peers[3]])
        assert len(last.dht._contacts.table) == 6
        await trio.sleep(1)
        for peer in peers:
            assert last.id in peer.dht._contacts.table
            assert peer.dht.contact(last.id) == last.dht.contact(last.id)


async def test_soon_after_it_joined_a_peer_knows_how_many_there_are(autojump_clock) -> None:
    async with town() as here:
        one, *others = await swarm(here, 12)
        assert others[-1].dht._searches.size.estimate(trio.current_time()) is None
        await trio.sleep(LOOK_AFTER + 1)
        for peer in (one, *others):
            assert 6 < (peer.dht._searches.size.estimate(trio.current_time()) or 0) < 24


async def test_joining_where_nobody_listens_says_so_of_every_address(autojump_clock) -> None:
    async with town() as here:
        one = await here.open(1)
        with pytest.raises(PeerUnreachable) as caught:
            await one.dht.join([Address("h9", 1), Address("h8", 1)])
        assert caught.value.stage == "connect"
        assert all(address in str(caught.value) for address in ("h9:1", "h8:1"))
        with pytest.raises(PeerUnreachable, match="h9:1"):
            await one.dht.join([Address("h9", 1)])
        assert one.dht.grids() == set()


async def test_one_of_several_addresses_is_enough_to_join(autojump_clock) -> None:
    async with town() as here:
        one, two = await here.open(1), await here.open(2, by=[])
        assert await two.dht.join([Address("h9", 1), one.address]) == 1


async def test_a_client_reads_but_is_known_to_nobody_and_holds_nothing(autojump_clock) -> None:
    async with town() as here:
        peers = await swarm(here, 3)
        view = await peers[0].dht.claim(GRID, UID)
        client = await here.open(9, by=peers[:1], client=True)
        found = await owner_of(client)
        assert found is not None
        assert (found.peer, found.number) == (view.peer, view.number)
        assert client.dht.contact(view.peer) == peers[0].dht.contact(view.peer)
        assert client.dht.contact(client.id) is None
        for peer in peers:
            assert peer.dht.contact(client.id) is None
        with pytest.raises(LocalProtocolError):
            await client.dht.claim(GRID, UID)
        assert client.dht.stats()["dht_records"] == 0


async def test_a_peer_that_lost_everybody_finds_the_swarm_again(autojump_clock) -> None:
    async with town() as here:
        one, two = await swarm(here, 2)
        await here.kill(one)
        await trio.sleep(60)
        assert len(two.dht._contacts.table) == 0
        one = await here.open(1, by=[], epoch=2)
        await trio.sleep(45)
        assert one.id in two.dht._contacts.table
        assert two.id in one.dht._contacts.table


async def test_a_full_bucket_keeps_its_oldest_peer_while_that_answers(autojump_clock) -> None:
    async with town() as here:
        peers = await swarm(here, 6)
        await trio.sleep(1)
        contacts = peers[0].dht._contacts
        contacts.table = RoutingTable(peers[0].id, RoutingParams(k=1, check_after=0.0), 0.0)
        outcomes = [contacts.table.insert(peer.id, 0.0) for peer in peers[1:]]
        shut_out = next(outcome for outcome in outcomes if isinstance(outcome, PingOldest))
        newcomer = peers[1 + outcomes.index(shut_out)]
        record = contacts.record(newcomer.id)
        peers[0].pool.observers[0](PeerConnected(newcomer.id, record, outbound=True))
        await trio.sleep(1)
        assert shut_out.oldest in contacts.table
        (oldest,) = [peer for peer in peers if peer.id == shut_out.oldest]
        await here.kill(oldest)
        await trio.sleep(LOOK_WITHIN + 1)
        assert oldest.id not in contacts.table
        assert newcomer.id in contacts.table


async def test_a_peer_whose_connection_broke_is_soon_looked_for(autojump_clock) -> None:
    async with town() as here:
        one, two = await swarm(here, 2)
        await trio.sleep(60)
        one.pool.forget(two.id)
        await trio.sleep(LOOK_WITHIN + 1)
        assert one.pool.connected(two.id)
        assert two.id in one.dht._contacts.table


async def test_a_peer_that_is_connected_again_is_not_looked_for(
    autojump_clock, monkeypatch
) -> None:
    async with town() as here:
        one, two = await swarm(here, 2)
        await trio.sleep(60)
        looked_for = []
        monkeypatch.setattr(one.dht._neighbours, "_ping", looked_for.append)
        one.pool.observers[0](PeerLost(two.id, PeerUnreachable("its connection broke")))
        await trio.sleep(LOOK_WITHIN)
        assert looked_for == []


@pytest.mark.parametrize("suspected", [False, True])
async def test_a_dead_peer_is_looked_for_unless_the_membership_suspects_it(
    autojump_clock, monkeypatch, suspected: bool
) -> None:
    async with town() as here:
        one, two = await swarm(here, 2)
        await trio.sleep(60)
        looked_for = []

        async def ping(peer):
            looked_for.append(peer)

        monkeypatch.setattr(one.dht._neighbours, "_ping", ping)
        await here.kill(two)
        if suspected:
            one.dht.member_suspected(two.id)
        await trio.sleep(LOOK_WITHIN + 1)
        assert looked_for == ([] if suspected else [two.id])


async def test_a_peer_that_others_found_gone_is_avoided_for_a_while(autojump_clock) -> None:
    async with town() as here:
        one, two = await swarm(here, 2)
        await trio.sleep(1)
        one.dht.peer_failed(two.id)
        assert not one.dht.usable(two.id)
        assert two.id not in one.dht._contacts.table
        await trio.sleep(25)
        assert one.dht.usable(two.id)
        assert two.id in one.dht._contacts.table


async def test_a_node_that_is_closed_says_so_and_dials_nobody_back(autojump_clock) -> None:
    async with town() as here:
        one, two = await swarm(here, 2)
        await trio.sleep(1)
        one.scope.cancel()
        await one.closed.wait()
        with pytest.raises(NodeClosed):
            await one.dht.get_leases(GRID, [UID])
        one.dht._contacts.failed(two.id, trio.current_time())
        assert not await one.dht._neighbours.dial_back(two.id)
        one.pool.observers[0](PeerConnected(two.id, None, outbound=False))
        one.pool.observers[0](PeerConnected(two.id, card(two.keys, "h2:4747"), outbound=False))
        await one.dht._neighbours._look_up(place(1))


async def all_in_doubt(here: Town, peers: list[Peer], *groups: list[Peer]) -> None:
    """Part these for a while, in which each asks all in vain; no connection breaks of that."""
    here.network.partition(*([peer.host for peer in group] for group in groups))
    async with trio.open_nursery() as asks:
        for peer in peers:
            for other in peers:
                if other is not peer:
                    asks.start_soon(peer.dht.probe, other.id)
    here.network.heal()


def tables(peers: list[Peer]) -> list[int]:
    return [len(peer.dht._contacts.table) for peer in peers]


async def test_two_peers_that_dial_each_other_at_once_beside_a_connection_find_each_other(
    autojump_clock,
) -> None:
    async with town() as here:
        one, two = await swarm(here, 2)
        await trio.sleep(60)  # of the connections whose dials crossed one is left
        await all_in_doubt(here, [one, two], [one])
        assert tables([one, two]) == [0, 0]
        async with trio.open_nursery() as looks:
            for peer in (one, two):
                looks.start_soon(peer.dht._neighbours._find_again)
        await trio.sleep(60)
        assert tables([one, two]) == [1, 1]


async def test_two_halves_that_were_apart_for_seconds_are_one_swarm_again(autojump_clock) -> None:
    async with town() as here:
        peers = await swarm(here, 4)
        await trio.sleep(60)
        assert tables(peers) == [3, 3, 3, 3]
        await all_in_doubt(here, peers, peers[:2])
        assert tables(peers) == [1, 1, 1, 1]
        await trio.sleep(60)
        assert tables(peers) == [3, 3, 3, 3]


async def test_a_peer_that_moved_is_not_there_because_of_a_connection_to_where_it_was(
    autojump_clock,
) -> None:
    async with town() as here:
        one, two = await swarm(here, 2)
        await trio.sleep(60)
        moved = card(two.keys, "h9:4747", incarnation=2)
        one.dht.member_alive(moved)
        await trio.sleep(60)
        assert one.pool.connected(two.id)
        assert not one.dht._contacts.was_dialled(two.id)
        assert two.id not in one.dht._contacts.table

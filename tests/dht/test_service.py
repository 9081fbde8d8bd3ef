"""Dictionaries, manifests and searches, over whole peers."""

import pytest
import trio

from p2pmoe.dht.service import MOST_ABSENT
from p2pmoe.errors import (
    QuorumNotReached,
)
from tests.dht.peers import UID, Peer, full, held, owner_of, pass_on, swarm, town
from tests.dht.swarm_of_ids import GRID, manifest


async def test_what_is_held_is_announced_under_every_prefix(autojump_clock) -> None:
    async with town() as here:
        peers = await swarm(here, 4)
        for peer, uid in zip(peers, ("ffn.3.5", "ffn.3.2", "ffn.1.0"), strict=False):
            await peer.dht.claim(GRID, uid)
        await trio.sleep(1)
        top = await peers[3].dht.get_prefix(GRID, "ffn")
        assert top.coordinates == {
            1: (peers[2].id,),
            3: tuple(sorted((peers[0].id, peers[1].id))),
        }
        assert 0 < top.expires_at - trio.current_time() <= 60
        inner = await peers[3].dht.get_prefix(GRID, "ffn.3")
        assert inner.coordinates == {2: (peers[1].id,), 5: (peers[0].id,)}
        await trio.sleep(100)
        assert (await peers[3].dht.get_prefix(GRID, "ffn.3")).coordinates == inner.coordinates


async def test_a_dead_publishers_coordinates_end_and_a_withdrawn_ones_at_once(
    autojump_clock,
) -> None:
    async with town() as here:
        peers = await swarm(here, 4)
        await peers[0].dht.claim(GRID, "ffn.0.0")
        await peers[1].dht.claim(GRID, "ffn.0.1")
        await trio.sleep(1)
        await peers[0].dht.withdraw(["ffn.0.0"])
        assert (await peers[2].dht.get_prefix(GRID, "ffn.0")).coordinates == {1: (peers[1].id,)}
        await here.kill(peers[1])
        await trio.sleep(61)
        empty = await peers[2].dht.get_prefix(GRID, "ffn.0")
        assert empty.coordinates == {}
        assert empty.expires_at <= trio.current_time() + 5


async def test_a_manifest_is_found_by_its_name_and_outlives_its_creator(autojump_clock) -> None:
    async with town() as here:
        peers = await swarm(here, 4)
        made = manifest(peers[0].keys)
        receipt = await peers[0].dht.put_manifest(made)
        assert set(receipt.stored) == {peer.id for peer in peers}
        assert receipt.failed == ()
        assert receipt.manifest == made
        assert await peers[1].dht.get_manifest("ffn") == made
        await here.kill(peers[0])
        assert await peers[2].dht.get_manifest("ffn") == made
        assert await peers[2].dht.get_manifest("other") is None


async def test_two_creators_of_one_name_agree_on_one_manifest(autojump_clock) -> None:
    async with town() as here:
        peers = await swarm(here, 5)
        winners = []

        async def create(peer: Peer) -> None:
            receipt = await peer.dht.put_manifest(manifest(peer.keys))
            winners.append(receipt.manifest)

        async with trio.open_nursery() as creations:
            for peer in peers[:3]:
                creations.start_soon(create, peer)
        await trio.sleep(2)
        seen = {winner.digest for winner in winners}
        for peer in peers[3:]:
            found = await peer.dht.get_manifest("ffn")
            assert found is not None
            seen.add(found.digest)
        assert len(seen) == 1


async def test_a_manifest_in_use_is_put_again_where_it_is_missing(autojump_clock) -> None:
    async with town() as here:
        peers = await swarm(here, 2)
        made = manifest(peers[0].keys)
        await peers[0].dht.put_manifest(made)
        await peers[1].dht.get_manifest("ffn")
        await peers[1].dht.claim(made.digest, UID)
        await here.kill(peers[0])
        late = await here.open(3, by=peers[1:])
        await trio.sleep(65)
        await here.kill(peers[1])
        assert await late.dht.get_manifest("ffn") == made


async def test_a_manifest_that_nobody_takes_is_an_error(autojump_clock) -> None:
    async with town() as here:
        one = await here.open(1)
        client = await here.open(2, client=True)
        for name in ("a", "b", "c"):
            one.dht._store.put(manifest(one.keys, name), trio.current_time())

        one.pool.handlers["dht.put"] = full
        with pytest.raises(QuorumNotReached, match="nobody stored"):
            await client.dht.put_manifest(manifest(client.keys))


async def test_equal_searches_share_one_and_questions_travel_together(autojump_clock) -> None:
    async with town() as here:
        peers = await swarm(here, 4)
        await trio.sleep(5)
        calls: dict[str, int] = {}
        for method, handler in list(peers[1].pool.handlers.items()):

            async def counted(call, method=method, handler=handler) -> None:
                calls[method] = calls.get(method, 0) + 1
                await pass_on(call, handler)

            peers[1].pool.handlers[method] = counted
        uids = [f"ffn.0.{index}" for index in range(20)]
        async with trio.open_nursery() as reads:
            for _ in range(5):
                reads.start_soon(peers[0].dht.get_leases, GRID, uids)
        assert calls == {"dht.get": 1}
        await peers[0].dht.get_leases(GRID, uids)  # "nothing" is believed for a moment
        assert calls == {"dht.get": 1}


async def test_a_peer_that_answers_nonsense_is_avoided(autojump_clock) -> None:
    async with town() as here:
        peers = await swarm(here, 3)
        await trio.sleep(1)

        async def nonsense(call) -> None:
            await call.send(b"\xa0")

        peers[1].pool.handlers["dht.get"] = nonsense
        assert await owner_of(peers[0]) is None
        assert not peers[0].dht.usable(peers[1].id)
        assert peers[0].dht.usable(peers[2].id)


async def test_a_silent_peer_costs_one_limit_and_is_then_avoided(autojump_clock) -> None:
    async with town() as here:
        peers = await swarm(here, 5)
        await peers[0].dht.claim(GRID, UID)

        async def silent(call) -> None:
            await trio.sleep_forever()

        for method in ("dht.get", "dht.find", "dht.put"):
            peers[3].pool.handlers[method] = silent
        began = trio.current_time()
        assert await owner_of(peers[1]) is not None
        assert trio.current_time() - began < 1
        began = trio.current_time()
        assert await owner_of(peers[1], "ffn.0.0") is None
        assert trio.current_time() - began < 3.5
        for _ in range(60):
            await trio.sleep(1)
            assert held(peers[0]) == 1


async def test_what_is_remembered_to_be_nothing_is_bounded(autojump_clock) -> None:
    async with town() as here:
        one = await here.open(1)
        for start in range(0, MOST_ABSENT + 512, 512):
            await one.dht.get_leases(GRID, [f"ffn.0.{start + each}" for each in range(512)])
        assert len(one.dht._absent) == MOST_ABSENT


async def test_readers_that_are_cancelled_leave_nothing_in_flight(autojump_clock) -> None:
    async with town() as here:
        peers = await swarm(here, 5)

        async def silent(call) -> None:
            await trio.sleep_forever()

        for peer in peers[1:]:
            peer.pool.handlers["dht.get"] = silent
        with trio.move_on_after(0.5):
            await peers[0].dht.get_leases(GRID, [f"ffn.0.{number}" for number in range(50)])
        await trio.sleep(11)  # a search ends by itself after ten seconds
        assert not peers[0].dht._searches._flights._flying
        assert not peers[0].dht._asks._gets._gathering

"""Who holds what was put: what is put again, and when."""

import pytest
import trio

from p2pmoe.dht import replicas
from p2pmoe.dht.messages import key_of
from p2pmoe.dht.replicas import Replicas
from p2pmoe.identity import PeerId
from p2pmoe.wire.envelope import Kind
from tests.dht.peers import UID, Peer, Town, held, owner_of, town
from tests.dht.swarm_of_ids import GRID, PEOPLE, lease, manifest
from tests.dht.test_direct import order, settled

PEERS = [PeerId(bytes([number]) * 32) for number in range(5)]
ANN, BOB = PEOPLE[:2]


def test_a_record_is_put_again_when_one_of_its_holders_is_left() -> None:
    kept, record = Replicas(), lease(ANN)
    kept.put(record, PEERS)
    assert [kept.lost(peer) for peer in PEERS[:3]] == [[], [], []]
    assert kept.lost(PEERS[3]) == [record]
    assert kept.lost(PEERS[3]) == []  # gone once
    assert kept.lost(PEERS[4]) == []  # it is on its way to others


def test_what_was_put_last_under_a_key_counts_and_what_is_forgotten_does_not() -> None:
    kept, old, new = Replicas(), lease(ANN), lease(ANN, version=2)
    kept.put(old, PEERS[:2])
    kept.put(new, PEERS[2:4])
    assert kept.lost(PEERS[0]) == []
    assert kept.lost(PEERS[2]) == [new]
    kept.forget(new)
    kept.forget(new)
    assert kept.lost(PEERS[3]) == []


def test_the_records_put_first_are_forgotten_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "MOST", 2)
    kept = Replicas()
    records = [lease(BOB, uid) for uid in ("ffn.1.1", "ffn.1.2", "ffn.1.3")]
    for record in records:
        kept.put(record, PEERS[:1])
    assert len(kept) == 2
    assert kept.lost(PEERS[0]) == records[1:]


# ---------------------------------------------------------------------------------- over peers
async def lose(here: Town, peers: list[Peer], key: bytes, spared: list[Peer]) -> list[Peer]:
    """End all holders of a key at once; who is left. The publisher is none of them."""
    holders = order(peers, key)[:5]
    assert not set(map(id, spared)) & set(map(id, holders))
    async with trio.open_nursery() as ends:
        for peer in holders:
            ends.start_soon(here.kill, peer)
    return [peer for peer in peers if peer not in holders]


async def bereft(here: Town, *, remembered: int) -> tuple[Peer, list[Peer]]:
    """The owner of a lease whose holders have just died, and all who are left.

    Of these the others may remember the number of a lease, as holders of long ago do.
    """
    peers = await settled(here, 14)
    key = key_of(Kind.LEASE, GRID, UID)
    owner = order(peers, key)[9]
    await owner.dht.claim(GRID, UID)
    now = trio.current_time()
    for peer in order(peers, key)[5:] if remembered else []:
        peer.dht._store.restore(lease(owner.keys, UID, number=remembered), 0.0, 600.0, now)
    return owner, await lose(here, peers, key, [owner])


@pytest.mark.parametrize(("remembered", "number"), [(0, 2), (1, 2), (4, 5)])
async def test_a_lease_of_which_all_holders_die_at_once_is_back_in_a_second(
    remembered: int, number: int, autojump_clock: object
) -> None:
    """Under the next number: others may remember the last one, and not whose it was."""
    async with town() as here:
        owner, left = await bereft(here, remembered=remembered)
        await trio.sleep(1)
        assert held(owner) == number
        for peer in left:
            view = await owner_of(peer)
            assert view is not None
            assert (view.peer, view.number) == (owner.id, number)


@pytest.mark.parametrize("remembered", [0, 1, 4])
async def test_a_read_right_after_all_holders_died_waits_for_the_owner(
    remembered: int, autojump_clock: object
) -> None:
    async with town() as here:
        owner, left = await bereft(here, remembered=remembered)
        with trio.fail_after(1):
            view = await owner_of(left[0])
        assert view is not None
        assert view.peer == owner.id


async def test_where_holders_died_with_their_owner_a_read_says_so_within_a_second(
    autojump_clock: object,
) -> None:
    async with town() as here:
        peers = await settled(here, 14)
        key = key_of(Kind.LEASE, GRID, UID)
        owner = order(peers, key)[0]
        await owner.dht.claim(GRID, UID)
        left = await lose(here, peers, key, [])
        began = trio.current_time()
        assert await owner_of(left[0]) is None
        assert 0.75 <= trio.current_time() - began < 1
        began = trio.current_time()
        assert await left[0].dht.get_leases(GRID, ["ffn.9.9"]) == {}
        assert trio.current_time() - began < 0.25


async def test_a_lease_that_is_withdrawn_while_it_is_claimed_anew_stays_withdrawn(
    autojump_clock: object,
) -> None:
    async with town() as here:
        owner, left = await bereft(here, remembered=4)
        while not owner.dht._owner._claiming:
            await trio.sleep(0.001)
        await owner.dht.withdraw([UID])
        await trio.sleep(2)
        assert held(owner) is None
        for peer in left:
            assert await owner_of(peer) is None


async def test_a_manifest_and_a_dictionary_of_which_all_holders_die_are_back_in_a_second(
    autojump_clock: object,
) -> None:
    async with town() as here:
        peers = await settled(here, 18)
        made = manifest(peers[0].keys)
        maker = order(peers, made.body.key)[9]
        made = manifest(maker.keys)
        await maker.dht.put_manifest(made)
        left = await lose(here, peers, made.body.key, [maker])
        await trio.sleep(1)
        for peer in left:
            assert await peer.dht.get_manifest(made.body.name) == made
        key = key_of(Kind.PREFIX, GRID, "ffn.1")
        owner = order(left, key)[9]
        await owner.dht.claim(GRID, "ffn.1.2")
        await trio.sleep(1)
        left = await lose(here, left, key, [owner])
        await trio.sleep(1)
        for peer in left:
            view = await peer.dht.get_prefix(GRID, "ffn.1")
            assert set(view.coordinates) == {2}

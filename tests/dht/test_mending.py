"""Read repair, copies along the path, what comes back after a restart, and hostile surroundings."""

from pathlib import Path

import pytest
import trio

from p2pmoe.dht.leases import holders
from p2pmoe.dht.messages import MEND, MendKey, MendRequest, key_of
from p2pmoe.dht.reading import never
from p2pmoe.dht.region import MOST_MEASURES, _Measure
from p2pmoe.dht.search import HOSTILE_PATHS, MOST_MENDED
from p2pmoe.wire import schema
from p2pmoe.wire.envelope import Kind
from tests.dht.peers import UID, Peer, owner_of, swarm, town
from tests.dht.swarm_of_ids import GRID, manifest, place

LEASE_KEY = key_of(Kind.LEASE, GRID, UID)
PREFIX_KEY = key_of(Kind.PREFIX, GRID, "ffn")


def by_distance(peers: list[Peer], key: bytes) -> list[Peer]:
    order = sorted(
        peers, key=lambda peer: int.from_bytes(peer.id.raw, "big") ^ int.from_bytes(key, "big")
    )
    assert [peer.id for peer in order][:5] == holders(key, [peer.id for peer in peers], None)
    return order


def ends(peer: Peer, key: bytes) -> float | None:
    found = peer.dht._store.get(key, trio.current_time())
    return found[0].expires_at if found else None


def forget(peer: Peer, key: bytes) -> None:
    for sub in list(peer.dht._store.shelves.at(key)):
        peer.dht._store.shelves.remove((key, sub))


async def test_a_holder_that_lost_a_lease_has_it_again_after_one_read_and_no_longer(
    autojump_clock: object,
) -> None:
    async with town() as here:
        peers = await swarm(here, 7)
        order = by_distance(peers, LEASE_KEY)
        await order[6].dht.claim(GRID, UID)
        await trio.sleep(2)
        before = [ends(peer, LEASE_KEY) for peer in order]
        assert all(before[:5])
        assert not any(before[5:])
        forget(order[0], LEASE_KEY)
        await order[5].dht._searches.read(Kind.LEASE, LEASE_KEY, never)  # which hears all
        await trio.sleep(1)
        after = [ends(peer, LEASE_KEY) for peer in order]
        assert after[0] is not None
        assert after[0] <= max(filter(None, before))
        assert after[1:] == before[1:]  # nobody beyond the holders keeps a lease


async def test_a_dictionary_is_kept_along_the_path_and_ends_there_with_the_others(
    autojump_clock: object,
) -> None:
    async with town() as here:
        peers = await swarm(here, 8)
        order = by_distance(peers, PREFIX_KEY)
        owner = order[7]
        await owner.dht.claim(GRID, UID)
        await trio.sleep(1)
        assert ends(order[5], PREFIX_KEY) is None
        reader = order[6]
        await here.kill(owner)
        await reader.dht._searches.inspect(PREFIX_KEY)
        assert ends(order[5], PREFIX_KEY) is None  # who only looks changes nothing
        found = await reader.dht._searches.read(Kind.PREFIX, PREFIX_KEY, lambda *_: False)
        await trio.sleep(1)
        latest = max(copy.expires_at for copy in found.copies())
        kept = ends(order[5], PREFIX_KEY)
        assert kept is not None
        assert kept <= latest
        for peer in order[:5]:
            await here.kill(peer)
        assert (await reader.dht.get_prefix(GRID, "ffn")).coordinates == {3: (owner.id,)}
        await trio.sleep(latest - trio.current_time() + 1)
        assert (await reader.dht.get_prefix(GRID, "ffn")).coordinates == {}


async def test_whoever_says_that_others_have_more_is_not_believed(autojump_clock: object) -> None:
    async with town() as here:
        peers = await swarm(here, 3)
        client = await here.open(9, by=peers[:1], client=True)
        keys = tuple(
            MendKey(kind="lease", key=key_of(Kind.LEASE, GRID, f"ffn.0.{each}"))
            for each in range(32)
        )
        contact = peers[0].dht._contacts.contact(peers[1].id)
        assert contact is not None
        for _ in range(5):
            await client.pool.call(contact, MEND, schema.encode(MendRequest(keys=keys)))
        await trio.sleep(5)
        assert len(peers[1].dht._store) == 0
        assert not peers[1].dht._holder._mending


async def test_a_client_is_told_nothing_that_it_would_have_to_keep(autojump_clock: object) -> None:
    async with town() as here:
        peers = await swarm(here, 3)
        client = await here.open(9, by=peers[:1], client=True)
        await peers[0].dht.claim(GRID, UID)
        await owner_of(client)
        assert len(client.dht._store) == 0


async def test_a_manifest_comes_back_to_a_holder_that_lacks_it(autojump_clock: object) -> None:
    async with town() as here:
        peers = await swarm(here, 4)
        made = manifest(peers[0].keys)
        await peers[0].dht.put_manifest(made)
        forget(peers[2], made.body.key)
        assert await peers[2].dht.get_manifest("ffn") == made
        await trio.sleep(1)
        assert ends(peers[2], made.body.key) is not None


async def test_whom_it_told_lately_is_remembered_within_bounds(autojump_clock: object) -> None:
    async with town() as here:
        one, two = await swarm(here, 2)
        searches = one.dht._searches
        for number in range(MOST_MENDED):
            searches._mended[two.id, number.to_bytes(32, "big")] = 0.0
        await one.dht.claim(GRID, UID)
        forget(two, LEASE_KEY)
        await two.dht._searches.read(Kind.LEASE, LEASE_KEY, lambda *_: False)
        assert len(searches._mended) <= MOST_MENDED


# ------------------------------------------------------------------------------------- restarts
async def test_a_node_that_comes_back_dials_those_it_knew_and_has_what_it_held(
    autojump_clock: object, tmp_path: Path
) -> None:
    async with town() as here:
        one = await here.open(1)
        two = await here.open(2, by=[one], folder=tmp_path)
        await trio.sleep(1)
        await one.dht.claim(GRID, UID)
        await trio.sleep(3)
        await here.kill(two)
        await trio.sleep(1)
        two = await here.open(2, by=[], epoch=2, amnesia=True, folder=tmp_path)
        assert one.id in {each.signer for each in map(two.dht._contacts.record, [one.id]) if each}
        assert two.dht._store.number(LEASE_KEY) == 1
        await trio.sleep(1)
        assert one.id in two.dht._contacts.table  # nobody told it where to join


# ------------------------------------------------------------------------------------- negatives
async def test_nothing_is_believed_no_longer_once_something_is_here(autojump_clock: object) -> None:
    async with town() as here:
        one, two = await swarm(here, 2)
        assert await owner_of(one) is None  # believed for a while
        await two.dht.claim(GRID, UID)
        view = await owner_of(one)
        assert view is not None
        assert view.peer == two.id


# --------------------------------------------------------------------------------- hostile mode
async def test_in_hostile_mode_everything_goes_by_four_paths_and_nothing_stops_early(
    autojump_clock: object,
) -> None:
    async with town() as here:
        peers = await swarm(here, 7)
        assert peers[0].dht._searches._width(careful=True).paths == 1  # a small swarm
        searches = (await here.open(8, by=peers[:1], hostile=True)).dht._searches
        assert searches._width(careful=False).paths == HOSTILE_PATHS
        await peers[1].dht.claim(GRID, UID)
        found = await searches.read(Kind.LEASE, LEASE_KEY)
        assert len(found.answers) == 8
        assert found.summary is not None
        assert found.summary.answered == 7


async def test_a_key_that_is_crowded_is_searched_for_in_its_region(
    autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with town() as here:
        peers = await swarm(here, 12)
        await trio.sleep(1)
        reader = peers[0].dht
        size = reader._searches.size
        for _ in range(8):
            near = [peer.id for peer in peers[1:9]]
            size.found(near[0].raw, near, trio.current_time())
        monkeypatch.setattr("p2pmoe.dht.region.GROUND_BELOW", 1e9)  # as if all lay near
        now = trio.current_time()
        for number in range(MOST_MEASURES):
            size._measures[place(number)] = _Measure(now, 20.0)
        await peers[1].dht.claim(GRID, UID)
        found = await reader._searches.read(Kind.LEASE, LEASE_KEY)
        assert found.summary is not None
        assert found.summary.answered > 8  # a whole region, and not the k closest
        assert await owner_of(peers[0]) is not None

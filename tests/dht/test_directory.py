"""A grid read and watched, over whole peers."""

import pytest
import trio

from p2pmoe.dht.directory import GridReading, GridWatch, read_grid
from p2pmoe.dht.neighbours import Sign
from p2pmoe.errors import ExpertUnavailable
from tests.dht.peers import UID, Peer, Town, swarm, town
from tests.dht.swarm_of_ids import manifest

CELLS = ["ffn.0.0", "ffn.0.3", "ffn.2.1", "ffn.3.3"]


async def grid_of(here: Town, *, servers: int = 3) -> tuple[list[Peer], bytes]:
    """Servers that hold CELLS in turn, in a grid of 4 by 4."""
    peers: list[Peer] = []
    for number in range(1, servers + 1):
        peers.append(await here.open(number, by=peers[:1]))
    await trio.sleep(1)
    made = manifest(peers[0].keys)
    await peers[0].dht.put_manifest(made)
    for index, uid in enumerate(CELLS):
        await peers[index % servers].dht.claim(made.digest, uid)
    await trio.sleep(1)
    return peers, made.digest


def cells(watch: GridWatch) -> list[str]:
    return [] if watch.current is None else list(watch.current.cells)


async def until(watch: GridWatch, wanted: list[str], within: float) -> float:
    """Wait until the watch shows these cells; how many seconds that took."""
    began = trio.current_time()
    with trio.fail_after(within):
        while cells(watch) != wanted:
            await watch.changed()
    return trio.current_time() - began


# -------------------------------------------------------------------------------------- reading
async def test_a_reading_names_every_served_cell_its_server_and_where_that_is(
    autojump_clock,
) -> None:
    async with town() as here:
        peers, grid = await grid_of(here)
        client = await here.open(9, by=peers[:1], client=True)
        reading = await read_grid(client.dht, "ffn")
        assert (reading.manifest.digest, reading.grid) == (grid, grid)
        assert list(reading.cells) == CELLS
        assert [reading.cells[uid].peer for uid in CELLS] == [
            peers[index % 3].id for index in range(4)
        ]
        assert {peer.id: reading.contacts[peer.id].addresses for peer in peers} == {
            peer.id: (peer.address,) for peer in peers
        }


async def test_a_server_reads_its_own_cells_too(autojump_clock) -> None:
    async with town() as here:
        peers, _ = await grid_of(here, servers=1)
        reading = await read_grid(peers[0].dht, "ffn")
        assert list(reading.cells) == CELLS
        assert set(reading.contacts) == {peers[0].id}


async def test_an_unknown_grid_says_so(autojump_clock) -> None:
    async with town() as here:
        one = await here.open(1)
        with pytest.raises(ExpertUnavailable, match="no grid is named ffn"):
            await read_grid(one.dht, "ffn")


async def test_a_cell_beyond_the_grid_is_left_out(autojump_clock) -> None:
    async with town() as here:
        peers, grid = await grid_of(here)
        await peers[0].dht.claim(grid, "ffn.0.4")
        await peers[0].dht.claim(grid, "ffn.9.0")
        await trio.sleep(1)
        assert list((await read_grid(peers[1].dht, "ffn")).cells) == CELLS


async def test_a_cell_whose_lease_ended_is_left_out_though_a_prefix_names_it(
    autojump_clock,
) -> None:
    async with town() as here:
        peers, grid = await grid_of(here)
        await here.kill(peers[1])
        await trio.sleep(31)
        assert 0 in (await peers[0].dht.get_prefix(grid, "ffn")).coordinates
        reading = await read_grid(peers[0].dht, "ffn")
        assert list(reading.cells) == ["ffn.0.0", "ffn.2.1", "ffn.3.3"]
        assert peers[1].id not in reading.contacts


async def test_leases_with_time_left_are_not_read_again(autojump_clock) -> None:
    async with town() as here:
        peers, _ = await grid_of(here)
        client = await here.open(9, by=peers[:1], client=True)
        first = await read_grid(client.dht, "ffn")
        asked: list[str] = []
        get_leases = client.dht.get_leases

        async def counted(grid: bytes, uids: list[str]) -> object:
            asked.extend(uids)
            return await get_leases(grid, uids)

        client.dht.get_leases = counted
        again = await read_grid(client.dht, "ffn", first.cells)
        assert asked == []
        assert again.cells == first.cells
        await trio.sleep(20)
        await read_grid(client.dht, "ffn", first.cells)
        assert asked == CELLS


# ------------------------------------------------------------------------------------- watching
async def test_a_watch_shows_a_grid_when_it_appears_and_cells_as_they_come(
    autojump_clock,
) -> None:
    async with town() as here, trio.open_nursery() as watches:
        one = await here.open(1)
        client = await here.open(9, by=[one], client=True)
        watch = GridWatch(client.dht, "ffn")
        await watches.start(watch.run)
        await trio.sleep(1)
        assert watch.current is None
        made = manifest(one.keys)
        await one.dht.put_manifest(made)
        await until(watch, [], within=7)
        await one.dht.claim(made.digest, "ffn.1.1")
        assert await until(watch, ["ffn.1.1"], within=7) <= 5.5
        watches.cancel_scope.cancel()


async def test_a_poke_reads_at_once_and_many_pokes_read_a_few_times(autojump_clock) -> None:
    async with town() as here, trio.open_nursery() as watches:
        peers, grid = await grid_of(here)
        client = await here.open(9, by=peers[:1], client=True)
        watch = GridWatch(client.dht, "ffn")
        await watches.start(watch.run)
        await until(watch, CELLS, within=2)
        await peers[0].dht.claim(grid, "ffn.3.2")
        await trio.sleep(1.5)
        watch.poke()
        assert await until(watch, [*CELLS[:3], "ffn.3.2", "ffn.3.3"], within=2) < 0.5
        reads = 0
        get_manifest = client.dht.get_manifest

        async def counted(name: str) -> object:
            nonlocal reads
            reads += 1
            return await get_manifest(name)

        client.dht.get_manifest = counted
        for _ in range(200):
            watch.poke()
            await trio.sleep(0.01)
        assert reads <= 8
        watches.cancel_scope.cancel()


async def test_a_killed_servers_cells_vanish_at_once_and_return_with_it(autojump_clock) -> None:
    async with town() as here, trio.open_nursery() as watches:
        peers, grid = await grid_of(here)
        client = await here.open(9, by=peers[:1], client=True)
        watch = GridWatch(client.dht, "ffn")
        await watches.start(watch.run)
        await until(watch, CELLS, within=2)
        await here.kill(peers[1])
        without = [uid for uid in CELLS if uid != "ffn.0.3"]
        assert await until(watch, without, within=1) < 0.1
        for _ in range(25):
            await trio.sleep(1)
            assert cells(watch) == without
        again = await here.open(2, by=peers[:1], epoch=2)
        await trio.sleep(5)
        await again.dht.claim(grid, "ffn.0.3")
        await until(watch, CELLS, within=40)
        assert watch.current is not None
        assert watch.current.cells["ffn.0.3"].number == 2
        watches.cancel_scope.cancel()


async def test_a_server_that_lost_only_a_connection_is_back_within_a_second(
    autojump_clock,
) -> None:
    async with town() as here, trio.open_nursery() as watches:
        peers, _ = await grid_of(here)
        client = await here.open(9, by=peers[:1], client=True)
        watch = GridWatch(client.dht, "ffn")
        await watches.start(watch.run)
        await until(watch, CELLS, within=2)
        here.network.cut("h9", "h2")
        await until(watch, [uid for uid in CELLS if uid != "ffn.0.3"], within=1)
        assert await until(watch, CELLS, within=2) <= 1
        watches.cancel_scope.cancel()


async def test_a_server_that_says_goodbye_stays_in_view_until_it_refuses(autojump_clock) -> None:
    async with town() as here, trio.open_nursery() as watches:
        peers, _ = await grid_of(here)
        client = await here.open(9, by=peers[:1], client=True)
        watch = GridWatch(client.dht, "ffn")
        await watches.start(watch.run)
        await until(watch, CELLS, within=2)
        seen: list[GridReading | None] = []

        async def look() -> None:
            while True:
                await watch.changed()
                seen.append(watch.current)

        watches.start_soon(look)
        client.dht._changed(peers[1].id, Sign.QUIET)  # it closed an idle connection
        await trio.sleep(1)
        assert cells(watch) == CELLS
        assert all(one is not None and list(one.cells) == CELLS for one in seen)
        peers[1].scope.cancel()  # it leaves: its port closes, then its connections
        await trio.sleep(0.1)
        await until(watch, [uid for uid in CELLS if uid != "ffn.0.3"], within=6)
        watches.cancel_scope.cancel()


async def test_a_server_that_is_avoided_is_not_shown(autojump_clock) -> None:
    async with town() as here, trio.open_nursery() as watches:
        peers, _ = await grid_of(here)
        client = await here.open(9, by=peers[:1], client=True)
        client.dht.peer_failed(peers[2].id)
        watch = GridWatch(client.dht, "ffn")
        await watches.start(watch.run)
        await until(watch, [uid for uid in CELLS if uid != "ffn.2.1"], within=2)
        await until(watch, CELLS, within=20)
        watches.cancel_scope.cancel()


async def test_without_the_swarm_a_watch_keeps_what_is_valid_and_no_longer(
    autojump_clock,
) -> None:
    async with town() as here, trio.open_nursery() as watches:
        peers, _ = await grid_of(here)
        client = await here.open(9, by=peers[:1], client=True)
        watch = GridWatch(client.dht, "ffn")
        await watches.start(watch.run)
        await until(watch, CELLS, within=2)
        here.network.partition(["h9"])
        await trio.sleep(2)
        assert cells(watch) == CELLS
        await until(watch, [], within=45)
        here.network.heal()
        await until(watch, CELLS, within=90)
        watches.cancel_scope.cancel()


async def test_what_the_membership_says_of_a_server_changes_the_view_at_once(
    autojump_clock,
) -> None:
    async with town() as here, trio.open_nursery() as watches:
        peers, _ = await grid_of(here)
        client = await here.open(9, by=peers[:1], client=True)
        watch = GridWatch(client.dht, "ffn")
        await watches.start(watch.run)
        await until(watch, CELLS, within=2)
        assert watch.current is not None
        record = client.dht._contacts.record(peers[1].id)
        assert record is not None
        client.dht.member_suspected(peers[1].id)
        assert watch.current.doubted == {peers[1].id}
        assert cells(watch) == CELLS
        client.dht.member_alive(record)
        assert watch.current.doubted == set()
        without = [uid for uid in CELLS if uid != "ffn.0.3"]
        for gone in (client.dht.member_failed, client.dht.member_left):
            gone(peers[1].id)
            assert cells(watch) == without
            client.dht.member_alive(record)
            assert cells(watch) == CELLS
        watches.cancel_scope.cancel()


async def test_a_lease_that_turned_out_wrong_is_read_again_until_it_is_another(
    autojump_clock,
) -> None:
    async with town() as here:
        peers = await swarm(here, 4)
        made = manifest(peers[0].keys, cells=(8, 8))
        await peers[0].dht.put_manifest(made)
        grid = made.digest
        await peers[0].dht.claim(grid, UID)
        await trio.sleep(1)
        watch = GridWatch(peers[3].dht, "ffn")
        async with trio.open_nursery() as tasks:
            await tasks.start(watch.run)
            await watch.changed()
            assert watch.current is not None
            peers[1].dht.on_transfer = lambda _grid, _uid, _owner: True
            assert await peers[0].dht.transfer(grid, UID, peers[1].id)
            await peers[1].dht.claim(grid, UID)
            watch.poke([UID])  # its first lease would be believed for 20 seconds
            await trio.sleep(1.5)
            assert watch.current.cells[UID].peer == peers[1].id
            assert watch.current.cells[UID].number == 2
            watch.poke([UID, "ffn.9.9"])
            await trio.sleep(20)
            assert list(watch._wrong) == [UID]  # it may be another any moment
            await trio.sleep(20)
            assert not watch._wrong
            tasks.cancel_scope.cancel()

"""Records put at the closest peers without a search: who gets them, and what it costs."""

from typing import Any

import trio

from p2pmoe.dht.leases import MOST_HOLDERS
from p2pmoe.dht.messages import Manifest
from p2pmoe.dht.writing import SLOW
from p2pmoe.identity import PeerId
from p2pmoe.net.connection import Connection
from p2pmoe.wire.envelope import Kind, Signed
from tests.dht.peers import Peer, full, swarm, town
from tests.dht.swarm_of_ids import manifest


def named(peer: Peer, name: str) -> Signed[Manifest]:
    return manifest(peer.keys, name=name)


def closest(peers: list[Peer], record: Signed[Any]) -> list[PeerId]:
    key = int.from_bytes(record.body.key, "big")
    ids = sorted((peer.id for peer in peers), key=lambda each: each.number ^ key)
    return ids[:MOST_HOLDERS]


def holding(peers: list[Peer], record: Signed[Any]) -> set[PeerId]:
    now = trio.current_time()
    return {peer.id for peer in peers if peer.dht._store.get(record.body.key, now)}


def questions(peer: Peer) -> list[str]:
    """The methods of the calls that a peer makes from now on."""
    calls, open_connection, call = list[str](), peer.pool.open_connection, peer.pool.call

    class Noted:
        """A connection that notes what is asked."""

        def __init__(self, connection: Connection) -> None:
            self.connection = connection

        def __getattr__(self, name: str) -> Any:
            return getattr(self.connection, name)

        def ask(self, method: str, *rest: Any) -> Any:
            calls.append(method)
            return self.connection.ask(method, *rest)

    def noted_connection(to: Any, *, bulk: bool) -> Noted | None:
        connection = open_connection(to, bulk=bulk)
        return Noted(connection) if connection else None

    async def noted_call(to: Any, method: str, body: bytes) -> Any:
        calls.append(method)
        return await call(to, method, body)

    peer.pool.open_connection, peer.pool.call = noted_connection, noted_call
    return calls


async def test_who_knows_everybody_puts_a_manifest_without_a_search_and_without_a_read(
    autojump_clock: object,
) -> None:
    async with town() as here:
        peers = await swarm(here, 9)
        await trio.sleep(2)
        record = named(peers[0], "grid_a")
        calls = questions(peers[0])
        receipt = await peers[0].dht.put_manifest(record)
        others = set(closest(peers, record)) - {peers[0].id}
        assert calls == ["dht.put"] * len(others)
        assert holding(peers, record) == set(receipt.stored) == set(closest(peers, record))
        assert receipt.manifest == record
        calls = questions(peers[1])
        assert await peers[1].dht.get_manifest("grid_a") == record
        assert calls == ["dht.get"] * (3 - (peers[1].id in receipt.stored))


async def test_who_should_hold_a_record_and_was_not_known_is_named_by_the_others(
    autojump_clock: object,
) -> None:
    async with town() as here:
        peers = await swarm(here, 9)
        await trio.sleep(2)
        record = named(peers[0], "grid_a")
        wanted = closest(peers[1:], record)[0]
        contacts = peers[0].dht._contacts
        contacts.table.remove(wanted)
        del contacts._known[wanted]
        receipt = await peers[0].dht.put_manifest(record)
        assert wanted in receipt.stored
        assert set(receipt.stored) == set(closest(peers, record))


async def test_the_next_closest_takes_the_place_of_one_that_is_dead_or_silent(
    autojump_clock: object,
) -> None:
    async with town() as here:
        peers = await swarm(here, 9)
        await trio.sleep(2)
        record = named(peers[0], "grid_a")
        dead, silent = (
            next(peer for peer in peers if peer.id == each)
            for each in [each for each in closest(peers, record) if each != peers[0].id][:2]
        )
        await here.kill(dead)

        async def never(_call: object) -> None:
            await trio.sleep_forever()

        silent.pool.handlers["dht.put"] = never
        began = trio.current_time()
        receipt = await peers[0].dht.put_manifest(record)
        assert SLOW <= trio.current_time() - began < 2 * SLOW
        rest = [peer for peer in peers if peer not in (dead, silent)]
        assert set(receipt.stored) == set(closest(rest, record))


async def test_a_manifest_behind_another_of_its_name_is_read_to_see_where_the_name_leads(
    autojump_clock: object,
) -> None:
    async with town() as here:
        peers = await swarm(here, 6)
        await trio.sleep(2)
        first, second = named(peers[0], "grid_a"), named(peers[1], "grid_a")
        await peers[0].dht.put_manifest(first)
        votes = await peers[1].dht._owner._writer.put_at([peers[2].id, peers[1].id], second)
        said = {(vote.outcome, vote.why) for vote in votes.values()}
        assert ("stored", "later") in said
        receipt = await peers[1].dht.put_manifest(second)
        assert receipt.manifest == first


async def test_who_finds_no_holders_by_itself_looks_for_them(autojump_clock: object) -> None:
    async with town() as here:
        peers = await swarm(here, 4)
        await trio.sleep(2)
        record = named(peers[0], "grid_a")
        for peer in peers[2:]:
            await here.kill(peer)
        peers[1].pool.handlers["dht.put"] = full
        stored, failed, _ = await peers[0].dht._owner.store(record)
        assert stored == (peers[0].id,)
        assert failed == (peers[1].id,)
        held = peers[0].dht._store.get(record.body.key, trio.current_time(), kind=Kind.MANIFEST)
        assert [each.signed for each in held] == [record]

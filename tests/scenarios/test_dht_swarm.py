"""Many real nodes on the loopback, a third of them killed: every get succeeds, and soon."""

from __future__ import annotations

import math
import sys
from statistics import median

import pytest
import trio

from p2pmoe.dht.leases import LeaseRefused
from p2pmoe.errors import QuorumNotReached
from p2pmoe.wire.envelope import Kind, seal
from tests.dht.swarm_of_ids import GRID, manifest
from tests.scenarios.dht_nodes import READY_LIMIT, Here, begin, calm, gets, processes, uncollected
from tests.scenarios.dht_peer import claim


@pytest.mark.parametrize(
    ("count", "apart", "at_once", "later"),
    [(4, 2, math.inf, math.inf), pytest.param(64, 16, 1.0, 1.0, marks=pytest.mark.soak)],
)
async def test_with_a_third_of_the_swarm_killed_every_get_succeeds(
    count: int, apart: int, at_once: float, later: float
) -> None:
    """Of many nodes, on a machine with nothing else to do, at the first attempt.

    Seconds that a get may take: at once, while the survivors in this one thread find out about all
    that were killed, and when they have.
    """
    async with trio.open_nursery() as tasks:
        here = Here(tasks)
        with trio.fail_after(READY_LIMIT):
            await here.open_many(count)
        maker = here.nodes[1]
        body = manifest(maker.keys).body
        made = seal(maker.keys, body, kind=Kind.MANIFEST, network=maker.network)
        await maker.dht.put_manifest(made)
        address = str(here.nodes[0].address)
        with processes() as begun, uncollected():
            with trio.fail_after(READY_LIMIT):
                elsewhere = await begin(address, apart, begun)
            for process in begun[: math.ceil(apart / 3)]:
                process.kill()
            killed = {f"ffn.{number}.1" for number in range(math.ceil(apart / 3))}
            await here.kill(here.nodes[2 : 2 + math.ceil(count / 3)])
            alive = here.uids | {who: uid for who, uid in elsewhere.items() if uid not in killed}
            for when, within in (("at once", at_once), ("later", later)):
                done = await gets(here.nodes, alive, made)
                middle, longest = median(done.seconds) * 1000, max(done.seconds) * 1000
                sys.stdout.write(
                    f"{count} + {apart} nodes, a third killed, {when}: {len(done.seconds)} gets,"
                    f" median {middle:.0f} ms, longest {longest:.0f} ms, {done.repeated} repeated\n"
                )
                assert max(done.seconds) <= within
                assert within == math.inf or not done.repeated
                if within < math.inf:
                    await calm()
        tasks.cancel_scope.cancel()


async def test_strangers_do_not_take_over_a_live_uid() -> None:
    """Real nodes, real time: three strangers try again and again while holders come and go."""
    async with trio.open_nursery() as tasks:
        here = Here(tasks)
        with trio.fail_after(READY_LIMIT):
            await here.open_many(5)
        owner = here.nodes[0]
        uid = here.uids[owner.id.hex]
        for number in range(3):
            if number % 2:
                await here.kill(here.nodes[-1:])
                await here.open(10 + number)
            for stranger in here.nodes[1:4]:
                with pytest.raises((LeaseRefused, QuorumNotReached)):
                    await stranger.dht.claim(GRID, uid)
            for reader in here.nodes:
                views = await reader.dht.get_leases(GRID, [uid])
                assert views[uid].peer == owner.id
            assert owner.dht.lease_number(GRID, uid, trio.current_time()) == 1
        tasks.cancel_scope.cancel()


async def test_after_a_hand_over_the_old_number_is_good_nowhere() -> None:
    """Real nodes: what a server checks each call against, and what callers read, both move on."""
    async with trio.open_nursery() as tasks:
        here = Here(tasks)
        with trio.fail_after(READY_LIMIT):
            await here.open_many(4)
        owner, heir = here.nodes[:2]
        uid = here.uids[owner.id.hex]
        assert owner.dht.lease_number(GRID, uid, trio.current_time()) == 1
        await owner.dht.withdraw([uid])
        await claim(heir, uid)
        numbers = {
            node.id: number
            for node in here.nodes
            if (number := node.dht.lease_number(GRID, uid, trio.current_time())) is not None
        }
        assert numbers == {heir.id: 2}
        for reader in here.nodes:
            view = (await reader.dht.get_leases(GRID, [uid]))[uid]
            assert (view.peer, view.number) == (heir.id, 2)
        tasks.cancel_scope.cancel()

"""What the membership says, over whole peers: who failed, left, is suspected, is back."""

from typing import Any

import pytest
import trio

from p2pmoe.dht.leases import LeaseRefused
from tests.dht.peers import UID, Peer, held, owner_of, swarm, town
from tests.dht.swarm_of_ids import GRID


def tell(peers: list[Peer], member: str, *about: Any) -> None:
    """All of these peers' memberships say the same at once."""
    for peer in peers:
        getattr(peer.dht, f"member_{member}")(*about)


async def test_the_leases_of_a_member_that_failed_are_vacant_after_five_seconds(
    autojump_clock: object,
) -> None:
    async with town() as here:
        peers = await swarm(here, 6)
        owner, *others = peers
        await owner.dht.claim(GRID, UID)
        await trio.sleep(1)
        await here.kill(owner)
        tell(others, "failed", owner.id)
        assert not others[0].dht.usable(owner.id)
        assert owner.id not in others[0].dht._contacts.table
        await trio.sleep(4)
        with pytest.raises(LeaseRefused):
            await others[0].dht.claim(GRID, UID)
        await trio.sleep(1)
        assert (await others[0].dht.claim(GRID, UID)).number == 2


async def test_the_leases_of_a_member_that_left_are_vacant_at_once(autojump_clock: object) -> None:
    async with town() as here:
        owner, *others = await swarm(here, 6)
        await owner.dht.claim(GRID, UID)
        await here.kill(owner)
        tell(others, "left", owner.id)
        assert (await others[0].dht.claim(GRID, UID)).number == 2


async def test_an_owner_that_renews_was_not_gone(autojump_clock: object) -> None:
    async with town() as here:
        owner, *others = await swarm(here, 6)
        await owner.dht.claim(GRID, UID)
        tell(others, "failed", owner.id)
        tell(others, "alive", owner.dht._own_record())
        await trio.sleep(7)
        with pytest.raises(LeaseRefused):
            await others[0].dht.claim(GRID, UID)
        tell(others, "failed", owner.id)
        await trio.sleep(4)  # it renews before the five seconds are over
        for _ in range(3):
            await trio.sleep(10)
            assert held(owner) == 1
            view = await owner_of(others[0])
            assert view is not None
            assert view.peer == owner.id


async def test_a_suspected_member_is_asked_last_until_it_is_alive(autojump_clock: object) -> None:
    async with town() as here:
        one, two, three = await swarm(here, 3)
        tell([one], "suspected", two.id)
        assert one.dht._contacts.suspected(two.id)
        assert one.dht.usable(two.id)
        tell([one], "alive", two.dht._own_record())
        assert not one.dht._contacts.suspected(two.id)
        tell([one], "failed", three.id)
        assert not one.dht.usable(three.id)
        tell([one], "alive", three.dht._own_record())
        assert one.dht.usable(three.id)

"""Leases over whole peers: claims, renewals, restarts, and an owner's bad days."""

import pytest
import trio

from p2pmoe.dht.leases import LeaseRefused, LeaseView
from p2pmoe.dht.reading import Searched
from p2pmoe.dht.records import Others
from p2pmoe.errors import (
    PeerBusy,
    QuorumNotReached,
)
from tests.dht.peers import UID, Peer, abstain, full, held, owner_of, swarm, town
from tests.dht.swarm_of_ids import GRID, PEOPLE, lease


async def test_a_lease_is_seen_by_everybody_and_renewed_for_ever(autojump_clock) -> None:
    async with town() as here:
        peers = await swarm(here, 6)
        await peers[2].dht.claim(GRID, UID)
        for _ in range(5):
            for peer in peers:
                view = await owner_of(peer)
                assert view is not None
                assert (view.peer, view.number) == (peers[2].id, 1)
                assert 0 < view.expires_at - trio.current_time() <= 30
            assert held(peers[2]) == 1
            await trio.sleep(61)


async def test_a_second_claimant_is_told_who_has_it(autojump_clock) -> None:
    async with town() as here:
        peers = await swarm(here, 4)
        await peers[0].dht.claim(GRID, UID)
        with pytest.raises(LeaseRefused) as caught:
            await peers[1].dht.claim(GRID, UID)
        assert caught.value.owner == peers[0].id
        assert held(peers[1]) is None
        assert (await peers[0].dht.claim(GRID, UID)).number == 1  # it has it already


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8])
async def test_of_claimants_at_once_exactly_one_gets_it(count: int, autojump_clock) -> None:
    async with town() as here:
        peers = await swarm(here, count)
        await trio.sleep(1)
        winners: list[Peer] = []
        losers: list[Peer] = []

        async def claim(peer: Peer) -> None:
            try:
                await peer.dht.claim(GRID, UID)
            except (LeaseRefused, QuorumNotReached):
                losers.append(peer)
            else:
                winners.append(peer)

        async with trio.open_nursery() as claims:
            for peer in peers:
                claims.start_soon(claim, peer)
        assert len(winners) == 1
        assert len(losers) == count - 1
        await trio.sleep(2)
        for peer in peers:
            view = await owner_of(peer)
            assert view is not None
            assert view.peer == winners[0].id


async def test_one_peer_may_claim_a_cell_several_times_at_once(autojump_clock) -> None:
    async with town() as here:
        peers = await swarm(here, 4)
        views: list[LeaseView] = []
        refusals: list[LeaseRefused] = []

        async def claim(peer: Peer) -> None:
            try:
                views.append(await peer.dht.claim(GRID, UID))
            except LeaseRefused as error:
                refusals.append(error)

        async with trio.open_nursery() as claims:
            for peer in peers[:2] * 5:
                claims.start_soon(claim, peer)
        (winner,) = {view.peer for view in views}
        assert (len(views), len(refusals)) == (5, 5)
        for peer in peers:
            view = await owner_of(peer)
            assert view is not None
            assert view.peer == winner


async def test_many_cells_are_claimed_at_once_and_never_twice(autojump_clock) -> None:
    uids = [f"ffn.{row}.{column}" for row in range(4) for column in range(4)]
    async with town() as here:
        peers = await swarm(here, 4)
        owners: dict[str, list[Peer]] = {uid: [] for uid in uids}

        async def claim(peer: Peer, uid: str) -> None:
            try:
                await peer.dht.claim(GRID, uid)
            except (LeaseRefused, QuorumNotReached):
                return
            owners[uid].append(peer)

        async with trio.open_nursery() as claims:
            for peer in peers:
                for uid in uids:
                    claims.start_soon(claim, peer, uid)
        assert {uid: len(who) for uid, who in owners.items()} == dict.fromkeys(uids, 1)


async def test_a_killed_owners_lease_ends_and_another_takes_it_with_the_next_number(
    autojump_clock,
) -> None:
    async with town() as here:
        peers = await swarm(here, 5)
        await peers[4].dht.claim(GRID, UID)
        await here.kill(peers[4])
        await trio.sleep(10)
        with pytest.raises(LeaseRefused):
            await peers[0].dht.claim(GRID, UID)
        await trio.sleep(21)
        assert await owner_of(peers[1]) is None
        view = await peers[0].dht.claim(GRID, UID)
        assert view.number == 2


async def test_leases_survive_the_death_of_most_of_their_holders(autojump_clock) -> None:
    async with town() as here:
        peers = await swarm(here, 8)
        await peers[0].dht.claim(GRID, UID)
        for peer in peers[2:]:
            await here.kill(peer)
            await trio.sleep(11)
            assert held(peers[0]) == 1
        view = await owner_of(peers[1])
        assert view is not None
        assert view.peer == peers[0].id


async def test_leases_are_written_to_holders_that_come_later(autojump_clock) -> None:
    async with town() as here:
        (one,) = await swarm(here, 1)
        await one.dht.claim(GRID, UID)
        others = [await here.open(number, by=[one]) for number in (2, 3, 4)]
        await trio.sleep(25)
        for other in others:
            assert other.dht.stats()["dht_records"] >= 1
            with pytest.raises(LeaseRefused):
                await other.dht.claim(GRID, UID)


async def test_an_owner_that_one_holder_alone_remembers_still_has_it(autojump_clock) -> None:
    async with town() as here:
        peers = await swarm(here, 4)
        theirs = lease(PEOPLE[6], UID)
        peers[3].dht._store.decide(theirs, Others(), trio.current_time())
        with pytest.raises(LeaseRefused) as caught:
            await peers[0].dht.claim(GRID, UID)
        assert caught.value.owner == theirs.signer


async def test_a_holder_that_fails_at_a_put_has_no_vote(autojump_clock) -> None:
    async with town() as here:
        peers = await swarm(here, 4)

        async def busy(call) -> None:
            raise PeerBusy("no room")

        peers[3].pool.handlers["dht.put"] = busy
        assert (await peers[0].dht.claim(GRID, UID)).number == 1
        peers[2].pool.handlers["dht.put"] = busy
        with pytest.raises(QuorumNotReached, match="2 of 4 holders") as caught:
            await peers[0].dht.claim(GRID, "ffn.0.0")
        assert (caught.value.answered, caught.value.needed) == (2, 3)
        assert await owner_of(peers[1], "ffn.0.0") is None


async def test_a_withdrawn_lease_is_free_at_once(autojump_clock) -> None:
    async with town() as here:
        peers = await swarm(here, 4)
        await peers[0].dht.claim(GRID, UID)
        await trio.sleep(1)
        await peers[0].dht.withdraw([UID, "ffn.9.9"])
        assert held(peers[0]) is None
        assert await owner_of(peers[1]) is None
        assert (await peers[1].dht.claim(GRID, UID)).number == 2
        await trio.sleep(60)
        view = await owner_of(peers[2])
        assert view is not None
        assert view.peer == peers[1].id


async def test_an_owner_that_was_cut_off_serves_nothing_after_its_ttl(autojump_clock) -> None:
    """In a partition of three against one, the one has no quorum until it counts itself alone."""
    async with town() as here:
        peers = await swarm(here, 4)
        await peers[0].dht.claim(GRID, UID)
        here.network.partition(["h1"])
        began = trio.current_time()
        with trio.fail_at(began + 35):
            while await owner_of(peers[1]) is not None:
                await trio.sleep(1)
        view = await peers[1].dht.claim(GRID, UID)
        assert view.number == 2
        here.network.heal()
        await trio.sleep(75)
        owners = [peer for peer in peers if held(peer) is not None]
        assert len(owners) <= 1
        assert held(peers[1]) == 2


async def test_one_publisher_gets_a_bounded_number_of_cells(autojump_clock) -> None:
    async with town() as here:
        peers = await swarm(here, 3, cells=2)
        await peers[0].dht.claim(GRID, "ffn.0.0")
        await peers[0].dht.claim(GRID, "ffn.0.1")
        with pytest.raises(QuorumNotReached, match="cells"):
            await peers[0].dht.claim(GRID, "ffn.0.2")
        await peers[1].dht.claim(GRID, "ffn.0.2")


async def test_a_holder_that_restarted_grants_nothing_for_thirty_seconds(autojump_clock) -> None:
    async with town() as here:
        one = await here.open(1, amnesia=True)
        with pytest.raises(QuorumNotReached, match="restarted") as caught:
            await one.dht.claim(GRID, UID)
        assert (caught.value.answered, caught.value.needed) == (0, 1)
        await trio.sleep(30)
        await one.dht.claim(GRID, UID)


async def test_a_holder_that_restarted_among_four_grants_at_once(autojump_clock) -> None:
    async with town() as here:
        peers = await swarm(here, 4)
        await here.kill(peers[3])
        again = await here.open(4, by=peers[:1], amnesia=True, epoch=2)
        await trio.sleep(1)
        assert (await again.dht.claim(GRID, UID)).number == 1


async def test_the_restart_of_the_only_other_holder_does_not_end_a_lease(autojump_clock) -> None:
    async with town() as here:
        one, two = await swarm(here, 2)
        await one.dht.claim(GRID, UID)
        await here.kill(two)
        await trio.sleep(1)
        again = await here.open(2, by=[one], amnesia=True, epoch=2)
        for _ in range(60):
            await trio.sleep(1)
            assert held(one) == 1
        with pytest.raises(LeaseRefused):
            await again.dht.claim(GRID, UID)


async def test_a_publisher_that_restarted_gets_its_own_cell_back_under_a_new_number(
    autojump_clock,
) -> None:
    async with town() as here:
        peers = await swarm(here, 4)
        await peers[3].dht.claim(GRID, UID)
        await here.kill(peers[3])
        again = await here.open(4, by=peers[:1], amnesia=True, epoch=2)
        await trio.sleep(1)
        assert (await again.dht.claim(GRID, UID)).number == 2


async def test_an_owner_that_a_quorum_names_another_for_gives_up_at_once(autojump_clock) -> None:
    async with town() as here:
        peers = await swarm(here, 4)
        await peers[0].dht.claim(GRID, UID)
        theirs = lease(PEOPLE[6], UID, number=9)
        for peer in peers[1:]:
            store = peer.dht._store
            store.expire(trio.current_time() + 9999)
            store.put(theirs, trio.current_time())
            store.decide(theirs, Others(), trio.current_time())
        began = trio.current_time()
        with trio.fail_at(began + 11):
            while held(peers[0]) is not None:
                await trio.sleep(0.5)


async def test_a_renewal_that_cannot_be_asked_for_is_tried_again(autojump_clock) -> None:
    async with town() as here:
        peers = await swarm(here, 3)
        await peers[0].dht.claim(GRID, UID)
        find = peers[0].dht._searches.find

        async def busy(target: bytes) -> Searched:
            raise PeerBusy("too much to do")

        peers[0].dht._searches.find = busy
        await trio.sleep(25)
        peers[0].dht._searches.find = find
        for _ in range(60):
            await trio.sleep(1)
            assert held(peers[0]) == 1


async def test_a_renewal_of_which_most_abstain_stands_and_they_are_told_again_soon(
    autojump_clock,
) -> None:
    async with town() as here:
        peers = await swarm(here, 5)
        await peers[0].dht.claim(GRID, UID)
        handlers = [peer.pool.handlers["dht.put"] for peer in peers[1:]]
        for peer in peers[1:]:
            peer.pool.handlers["dht.put"] = abstain
        await trio.sleep(10.5)
        own = peers[0].dht._owner.book._own
        assert held(peers[0]) == 1
        assert own[GRID, UID].renew_at - trio.current_time() <= 2
        for peer, handler in zip(peers[1:], handlers, strict=True):
            peer.pool.handlers["dht.put"] = handler
        await trio.sleep(3)
        assert held(peers[0]) == 1
        assert own[GRID, UID].renew_at - trio.current_time() > 5


@pytest.mark.parametrize("after", [10.2, 11.2, 11.7, 12.2])
async def test_a_lease_that_is_withdrawn_while_it_is_renewed_stays_withdrawn(
    after: float, autojump_clock
) -> None:
    async with town(delay=0.5) as here:
        peers = await swarm(here, 3)
        view = await peers[0].dht.claim(GRID, UID)
        await trio.sleep_until(view.expires_at - 30 + after)
        await peers[0].dht.withdraw([UID])
        await trio.sleep(5)
        assert held(peers[0]) is None
        assert await owner_of(peers[1]) is None


async def test_a_lease_that_nobody_renews_lapses(autojump_clock) -> None:
    async with town() as here:
        peers = await swarm(here, 3)
        await peers[0].dht.claim(GRID, UID)

        for peer in peers[1:]:
            peer.pool.handlers["dht.put"] = full
        await trio.sleep(29)
        assert held(peers[0]) == 1
        await trio.sleep(2)
        assert held(peers[0]) is None
        assert peers[0].dht.stats()["dht_leases"] == 0
        with pytest.raises(QuorumNotReached):
            await peers[0].dht.claim(GRID, UID)

"""Experts whose server is lost go on at another one, with the state that was saved last."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock

from p2pmoe.errors import ExpertUnavailable
from p2pmoe.experts.saving import SaveParams
from p2pmoe.experts.serving import Server, ServerConfig
from p2pmoe.experts.uid import Grid
from p2pmoe.node import Node
from p2pmoe.wire.peer_record import Contact
from tests.experts.calls import FakeCall, backward, read_replies
from tests.experts.world import FIRST, JOINER, World, same, state_of, teach

WITHIN = 45.0  # seconds from a kill until an expert must be served again
SOON = 15.0  # seconds that it should take
NONE = replace(FIRST, experts=0)
State = dict[str, torch.Tensor]


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def own(tmp_path: Path) -> Callable[..., ServerConfig]:
    """Gives a server a folder for what it saves, by its number."""

    def configured(number: int, config: ServerConfig = JOINER, **saving: object) -> ServerConfig:
        params = SaveParams(**saving)  # type: ignore[arg-type]  # of several types
        return replace(config, folder=tmp_path / str(number), saving=params)

    return configured


async def until(true: Callable[[], bool], within: float = WITHIN) -> float:
    """Wait until something holds; how many seconds that took."""
    began = trio.current_time()
    with trio.fail_after(within):
        while not true():
            await trio.sleep(0.1)
    return trio.current_time() - began


def states(server: Server) -> dict[str, State]:
    return {uid: state_of(server, uid) for uid in server.uids}


def has(server: Server, expected: dict[str, State]) -> bool:
    """Whether a server serves these experts, equal bit for bit."""
    return all(
        uid in server.uids and same(state_of(server, uid), expected[uid]) for uid in expected
    )


async def test_the_experts_of_a_killed_server_go_on_at_exactly_one_other_bit_for_bit(
    autojump_clock: MockClock, world: World, own: Callable[..., ServerConfig]
) -> None:
    async with (
        world.server(1, own(1, NONE)) as (node, _),
        world.server(2, own(2), node) as (_, lost),
        world.server(3, own(3), node) as (_, other),
        world.server(4, own(4), node) as (_, one),
        world.server(5, own(5), node) as (_, two),
    ):
        assert len(lost.uids) == len(other.uids) == 2
        assert one.uids == two.uids == ()
        teach(lost, 3)
        await lost.save()
        saved = states(lost)
        teach(lost)  # which is lost
        world.network.kill("host2")
        took = await until(lambda: set(one.uids + two.uids) == set(saved))
        assert took < SOON
        assert len(one.uids + two.uids) == 2
        assert has(one, {uid: saved[uid] for uid in one.uids})
        assert has(two, {uid: saved[uid] for uid in two.uids})
        await trio.sleep(5.0)
        assert len(one.uids + two.uids) == 2


async def test_an_update_whose_answer_was_lost_with_its_server_is_not_applied_again_by_the_heir(
    autojump_clock: MockClock, world: World, own: Callable[..., ServerConfig]
) -> None:
    """What is repeated names the number of the lease that it was made under; the heir's is new."""
    async with (
        world.server(1, own(1, NONE)) as (client, _),
        world.server(2, own(2), client) as (owner, lost),
        world.server(3, own(3), client),
        world.server(4, own(4), client) as (node, heir),
    ):
        uid = lost.uids[0]
        rows, grads = torch.ones(2, 4), torch.ones(2, 4)
        lease = owner.dht.lease_number(lost.service.experts[uid].grid, uid, trio.current_time())
        assert lease is not None
        update = backward((uid, rows, grads), lease=lease)
        assert await code_of(update, client, owner) == ""
        await lost.save()
        saved = states(lost)
        world.network.kill("host2")
        await until(lambda: uid in heir.uids)
        assert await code_of(update, client, node) == "lease"
        assert has(heir, {uid: saved[uid]})
        assert heir.service.experts[uid].backend.step == 1


async def code_of(call: FakeCall, client: Node, server: Node) -> str:
    """What became of the one part of a call; empty if it went well."""
    assert server.address is not None
    to = Contact(server.id, (server.address,))
    async with client.pool.open_call(to, call.method, call.body, [call.payload], bulk=True) as it:
        answers = [(part.body, part.payload) async for part in it]
    return read_replies(call, answers)[0][0].code


async def test_an_expert_that_nobody_saved_begins_again_and_the_log_says_so(
    autojump_clock: MockClock, world: World, own: Callable[..., ServerConfig]
) -> None:
    async with (
        world.server(1, own(1, NONE)) as (node, _),
        world.server(2, own(2), node) as (_, lost),
        world.server(3, own(3), node),
        world.server(4, own(4), node) as (_, spare),
    ):
        first = states(lost)
        teach(lost)
        world.network.kill("host2")
        with capture_logs() as events:
            await until(lambda: set(first) <= set(spare.uids))
        assert has(spare, first)
        warned = [event for event in events if event["event"] == "expert.updates.lost"]
        assert {str(event["expert"]) for event in warned} == set(first)
        assert all(event["log_level"] == "warning" and event["advice"] for event in warned)


async def test_who_leaves_hands_its_experts_over_with_what_they_learned_last(
    autojump_clock: MockClock,
    world: World,
    own: Callable[..., ServerConfig],
    nursery: trio.Nursery,
) -> None:
    async with world.server(1, own(1, NONE)) as (node, _):
        leave = trio.Event()

        async def leaver(*, task_status: trio.TaskStatus[Server]) -> None:
            async with world.server(2, own(2), node) as (_, server):
                task_status.started(server)
                await leave.wait()

        leaving = await nursery.start(leaver)
        async with world.server(3, own(3), node), world.server(4, own(4), node) as (_, heir):
            teach(leaving, 2)
            learned = states(leaving)
            await trio.sleep(3.0)  # until all have heard of each other
            assert heir.uids == ()
            leave.set()
            with capture_logs() as events:
                took = await until(lambda: has(heir, learned))
            handed = [event for event in events if event["event"] == "expert.handed_over"]
            assert {str(event["expert"]) for event in handed} == set(learned)
            assert took < 2.0


async def test_who_joins_goes_on_with_what_a_server_left_when_nobody_had_room(
    autojump_clock: MockClock, world: World, own: Callable[..., ServerConfig]
) -> None:
    async with world.server(1, own(1, FIRST)) as (node, _):
        async with world.server(2, own(2), node) as (_, leaver):
            teach(leaver, 2)
            learned = states(leaver)
        await trio.sleep(300)  # no dictionary names them any more
        async with world.server(3, own(3), node) as (_, joiner):
            assert has(joiner, learned)


async def test_cells_that_were_served_come_before_those_that_never_were(
    autojump_clock: MockClock, world: World, own: Callable[..., ServerConfig]
) -> None:
    wide = replace(FIRST, grids=(Grid("ffn", (8, 8)),))
    async with world.server(1, own(1, wide)) as (node, _):
        async with world.server(2, own(2), node) as (_, leaver):
            teach(leaver)
            learned = states(leaver)
        async with world.server(3, own(3), node) as (_, joiner):
            assert has(joiner, learned)


async def test_who_comes_back_has_the_same_cells_as_it_left_them(
    autojump_clock: MockClock, world: World, own: Callable[..., ServerConfig]
) -> None:
    wide = replace(FIRST, grids=(Grid("ffn", (8, 8)),))
    async with world.server(1, own(1, wide)) as (node, _):
        async with world.server(2, own(2, copies=0), node) as (_, server):
            teach(server)
            learned = states(server)
        async with world.server(2, own(2, copies=0), node) as (_, again):
            assert has(again, learned)
        async with world.server(2, own(2, restore=False), node) as (_, anew):
            assert not any(has(anew, {uid: learned[uid]}) for uid in learned)


async def test_a_whole_swarm_comes_back_from_its_disks(
    autojump_clock: MockClock, world: World, own: Callable[..., ServerConfig]
) -> None:
    async with (
        world.server(1, own(1, FIRST)) as (node, first),
        world.server(2, own(2), node) as (_, second),
    ):
        teach(first, 2)
        teach(second)
        await first.save()
        await second.save()
        learned = states(first), states(second)
        world.network.kill("host1")
        world.network.kill("host2")
    await trio.sleep(3600)
    world.network.revive("host1")
    world.network.revive("host2")
    async with (
        world.server(1, own(1, FIRST)) as (node, first),
        world.server(2, own(2), node) as (_, second),
    ):
        assert has(first, learned[0])
        assert has(second, learned[1])


async def test_a_server_whose_swarm_is_gone_goes_on_with_the_grid_that_it_served(
    autojump_clock: MockClock, world: World, own: Callable[..., ServerConfig]
) -> None:
    async with (
        world.server(1, own(1, FIRST)) as (node, _),
        world.server(2, own(2), node) as (_, server),
    ):
        teach(server)
        await server.save()
        learned = states(server)
        world.network.kill("host1")
        world.network.kill("host2")
    world.network.revive("host2")
    with pytest.raises(ExpertUnavailable):
        async with world.server(2, own(2)):
            pass
    with pytest.raises(ExpertUnavailable):
        async with world.server(2, replace(own(2, restore=False), goes_on=True)):
            pass
    async with world.server(2, replace(own(2), goes_on=True)) as (_, again):
        assert has(again, learned)

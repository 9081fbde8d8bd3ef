"""Whole nodes that serve experts, on a network in memory and under its clock."""

from __future__ import annotations

from dataclasses import replace

import pytest
import trio
from trio.testing import MockClock

from p2pmoe.errors import ConfigurationError, ExpertUnavailable, PeerUnreachable
from p2pmoe.experts import serving
from p2pmoe.experts.serving import ServerConfig, serve_experts
from p2pmoe.experts.uid import ExpertUid, Grid
from p2pmoe.node import Node
from tests.experts.world import FIRST, GRID, JOINER, PARAMS, World


@pytest.fixture
def world() -> World:
    return World()


async def refusal(world: World, config: ServerConfig, *peers: Node) -> str:
    """What a server that joins with this configuration is told."""
    with pytest.raises(ConfigurationError) as refused:
        async with world.server(9, config, *peers):
            raise AssertionError("it serves")
    return str(refused.value)


async def test_who_begins_creates_the_grid_and_who_joins_takes_the_cells_left(
    autojump_clock: MockClock, world: World
) -> None:
    async with world.server(1, FIRST) as (first_node, first):
        assert len(first.uids) == 2
        async with world.server(2, JOINER, first_node) as (_, second):
            assert second.grids == (GRID,)
            assert sorted(first.uids + second.uids) == [str(uid) for uid in GRID.uids()]
            async with world.server(3, JOINER, first_node) as (_, third):
                assert third.uids == ()


async def test_cells_are_free_again_as_soon_as_their_server_has_left(
    autojump_clock: MockClock, world: World
) -> None:
    async with world.server(1, FIRST) as (node, _):
        async with world.server(2, JOINER, node) as (_, second):
            had = second.uids
        async with world.server(3, JOINER, node) as (_, third):
            assert third.uids == had


async def test_a_server_may_name_its_cells(autojump_clock: MockClock, world: World) -> None:
    only = (ExpertUid.parse("ffn.1.0"),)
    async with world.server(1, replace(FIRST, experts=0)) as (node, first):
        assert first.uids == ()
        async with world.server(2, replace(JOINER, experts=0, only=only), node) as (_, second):
            assert second.uids == ("ffn.1.0",)


async def test_a_swarm_may_have_two_grids(autojump_clock: MockClock, world: World) -> None:
    both = (Grid("high", (2,)), Grid("low", (2,)))
    async with world.server(1, replace(FIRST, grids=both, experts=1)) as (node, first):
        assert len(first.uids) == 2
        async with world.server(2, replace(JOINER, experts=1), node) as (_, second):
            assert second.grids == both
            assert sorted(first.uids + second.uids) == ["high.0", "high.1", "low.0", "low.1"]


async def test_a_node_says_in_its_record_and_status_what_it_serves(
    autojump_clock: MockClock, world: World
) -> None:
    async with world.server(1, FIRST) as (node, server):
        assert node.record is not None
        assert node.record.body.grids == ("ffn",)
        assert tuple(row.name for row in node.sections()["experts"]) == server.uids


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"grids": (Grid("ffn", (4, 4)),)}, "grid ffn.[0:2].[0:2] has cells (2, 2), not (4, 4)"),
        ({"expert_class": "transformer"}, "has expert_class ffn, not transformer"),
        ({"hidden_dim": 8}, "has hidden_dim 4, not 8"),
        ({"dtype": "float64"}, "has dtype float32, not float64"),
        ({"only": (ExpertUid.parse("ffn.5.5"),)}, "ffn.5.5 is not a cell"),
    ],
)
async def test_an_option_that_contradicts_the_manifest_is_refused(
    autojump_clock: MockClock, world: World, change: dict[str, object], said: str
) -> None:
    async with world.server(1, FIRST) as (node, _):
        assert said in await refusal(world, replace(JOINER, **change), node)


async def test_an_option_that_agrees_with_the_manifest_is_fine(
    autojump_clock: MockClock, world: World
) -> None:
    agreed = replace(JOINER, grids=(GRID,), expert_class="ffn", hidden_dim=4, dtype="float32")
    async with world.server(1, FIRST) as (node, _), world.server(2, agreed, node) as (_, second):
        assert len(second.uids) == 2


async def test_a_new_grid_needs_its_width(autojump_clock: MockClock, world: World) -> None:
    assert "hidden-dim" in await refusal(world, replace(FIRST, hidden_dim=None))


async def test_a_grid_that_nobody_serves_is_not_waited_for_for_ever(
    autojump_clock: MockClock, world: World
) -> None:
    async with world.node(1) as node:
        began = trio.current_time()
        with pytest.raises(ExpertUnavailable, match="no grid any"):
            async with world.server(2, JOINER, node):
                raise AssertionError("it serves")
        assert trio.current_time() - began < 15.0


async def test_a_server_may_come_before_the_grid_that_it_waits_for(
    autojump_clock: MockClock, world: World
) -> None:
    async with world.node(1) as node, trio.open_nursery() as servers:
        found: list[str] = []

        async def join() -> None:
            async with world.server(2, replace(JOINER, grids=(GRID,)), node) as (_, second):
                found.extend(second.uids)

        servers.start_soon(join)
        await trio.sleep(3.0)
        async with serve_experts(node, FIRST, world.dice):
            while not found:
                await trio.sleep(0.5)
    assert len(found) == 2


async def test_without_grid_and_experts_there_is_nothing_to_serve(
    autojump_clock: MockClock, world: World
) -> None:
    nothing = ServerConfig(params=PARAMS)
    async with world.node(1) as node, world.server(2, nothing, node) as (_, server):
        assert server.uids == ()
        assert server.grids == ()


class Heirs:
    """A node whose leases other peers take, refuse, or do not answer for."""

    def __init__(self, **takes: object) -> None:
        self.dht, self.takes, self.asked = self, takes, list[str]()

    async def transfer(self, grid: bytes, uid: str, to: str) -> bool:
        await trio.lowlevel.checkpoint()
        self.asked.append(to)
        answer = self.takes[to]
        if isinstance(answer, Exception):
            raise answer
        return bool(answer)


@pytest.mark.parametrize(
    ("takes", "asked"),
    [
        ({"one": True, "two": True}, ["two"]),
        ({"one": True, "two": False}, ["two", "one"]),
        ({"one": False, "two": PeerUnreachable("gone")}, ["two", "one"]),
        ({"none": True}, []),
    ],
)
async def test_a_lease_goes_to_whoever_has_most_room_and_takes_it(
    takes: dict[str, object], asked: list[str]
) -> None:
    heirs = Heirs(**takes)
    free = {name: room for name, room in (("one", 2), ("two", 5), ("none", 0)) if name in takes}
    await serving._hand_over(heirs, bytes(32), "ffn.0.0", free)  # type: ignore[arg-type]  # as much as it needs
    assert heirs.asked == asked


async def test_a_node_that_serves_no_longer_has_no_task_of_it(
    autojump_clock: MockClock, world: World
) -> None:
    def tasks() -> int:
        return trio.lowlevel.current_statistics().tasks_living

    async with world.node(1) as node:
        at_first = tasks()
        for number in range(2):
            async with serve_experts(node, replace(FIRST, create=not number), world.dice):
                assert tasks() > at_first
            await trio.sleep(1)
            assert tasks() == at_first


async def test_what_was_asked_before_a_server_left_is_computed(autojump_clock: MockClock) -> None:
    class Service:
        idle, computing = True, False

        async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
            self.computing = True
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self.computing = False

    service, left, seen = Service(), trio.Event(), list[bool]()
    async with trio.open_nursery() as parts:
        await parts.start(serving._compute, service, left)
        for service.idle, leaves in ((True, False), (False, True), (True, True)):
            if leaves:
                left.set()
            await trio.sleep(1)
            seen.append(service.computing)
    assert seen == [True, True, False]

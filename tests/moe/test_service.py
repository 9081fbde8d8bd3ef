"""The view holds what servers have vouched for; a crossing waits as its quorum says."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import trio
from torch import nn

from p2pmoe.dht.messages import Manifest, TensorSchema
from p2pmoe.errors import ExpertUnavailable, MalformedMessage, RemoteError
from p2pmoe.experts.messages import FORWARD, INFO, Answer, TensorSpec
from p2pmoe.moe.calls import Ask, Crossing
from p2pmoe.moe.quorum import QuorumParams
from p2pmoe.moe.service import ASK_AGAIN, MixtureService
from tests.moe.fakes import LEASE, NAME, Dht, Expert, Pool, Watch, done, peer

ROW = TensorSpec(dtype="float32", shape=(3,))
MANIFEST = Manifest(
    name=NAME,
    cells=(8,),
    expert_class="x",
    dtype="float32",
    hidden_dim=3,
    inputs=(TensorSchema(dtype="float32", shape=(3,)),),
    outputs=(TensorSchema(dtype="float32", shape=(3,)),),
    created_ms=0,
)


def experts(count: int = 4) -> dict[str, Expert]:
    return {f"ffn.{i}": Expert(nn.Identity(), peer(i % 2)) for i in range(count)}


def leases(pool: Pool) -> dict[str, Any]:
    return {uid: (one.peer, one.lease) for uid, one in pool.experts.items()}


@asynccontextmanager
async def running(pool: Pool, watch: Watch) -> AsyncIterator[MixtureService]:
    node: Any = SimpleNamespace(
        pool=pool, dht=Dht(pool.experts), describe=lambda name, section: None
    )
    service = MixtureService(node, watch)
    async with trio.open_nursery() as parts:
        await parts.start(service.run)
        yield service
        parts.cancel_scope.cancel()


def crossing(pool: Pool, wait: QuorumParams, rows: int = 2) -> Crossing:
    """Each of the experts is asked about every row."""
    asks = {
        index: Ask(one.peer, uid, one.lease, (torch.ones(rows, 3),), (ROW,))
        for index, (uid, one) in enumerate(sorted(pool.experts.items(), key=lambda i: i[1].peer))
    }
    return Crossing(FORWARD, asks, {i: np.arange(rows) for i in asks}, rows, wait)


WAIT = QuorumParams(k_min=1, grace=0.5, patience=3.0, timeout=10.0)


async def test_a_cell_is_in_the_view_when_its_server_has_spoken_of_it(autojump_clock) -> None:
    pool, watch = Pool(experts(), ((ROW,), (ROW,))), Watch()
    async with running(pool, watch) as service:
        with pytest.raises(ExpertUnavailable, match="nobody knows a grid ffn after 5 s"):
            await service.manifest(5.0)
        watch.tell(MANIFEST, leases(pool))
        assert await service.manifest(5.0) is MANIFEST
        assert service.view.uids == ("ffn.0", "ffn.2", "ffn.1", "ffn.3")
        assert service.view.leases == (LEASE,) * 4
        assert sorted(pool.calls) == [(INFO, peer(0), 2), (INFO, peer(1), 2)]
        watch.tell(MANIFEST, leases(pool))
        await trio.sleep(60)
        assert len(pool.calls) == 2


async def test_a_grid_without_experts_is_known_at_once(autojump_clock) -> None:
    pool, watch = Pool({}, ((ROW,), (ROW,))), Watch()
    async with running(pool, watch) as service, trio.open_nursery() as tellings:
        began = trio.current_time()
        tellings.start_soon(_tell_after, 2.0, watch)
        assert await service.manifest(30.0) is MANIFEST
        assert trio.current_time() - began == pytest.approx(2.0)


async def _tell_after(seconds: float, watch: Watch) -> None:
    await trio.sleep(seconds)
    watch.tell(MANIFEST, {})


async def test_a_server_that_does_not_answer_is_asked_again_when_it_may_be(autojump_clock) -> None:
    pool, watch = Pool(experts(), ((ROW,), (ROW,))), Watch()
    pool.dead = {peer(1)}
    watch.tell(MANIFEST, leases(pool))
    async with running(pool, watch) as service:
        await service.manifest(5.0)
        assert service.view.uids == ("ffn.0", "ffn.2")
        pool.resting = {peer(1)}
        pool.calls.clear()
        await trio.sleep(30)
        assert not pool.calls
        pool.dead, pool.resting = set(), set()
        await trio.sleep(1.5 * ASK_AGAIN)
        assert len(service.view) == 4
        assert (await service.refilled(1.0, "ffn.3")) is service.view


async def test_an_expert_of_another_kind_than_the_grids_is_left_out(autojump_clock) -> None:
    other = TensorSpec(dtype="float32", shape=(4,))
    pool, watch = Pool(experts(), ((other,), (other,))), Watch()
    watch.tell(MANIFEST, leases(pool))
    async with running(pool, watch) as service:
        await service.manifest(5.0)
        assert not service.view.uids
        with pytest.raises(ExpertUnavailable, match="nobody serves ffn after 2 s"):
            await service.refilled(2.0, "")


async def test_what_a_server_says_of_others_experts_is_not_believed(autojump_clock) -> None:
    pool, watch = Pool(experts(), ((ROW,), (ROW,))), Watch()
    watch.tell(MANIFEST, {"ffn.0": (peer(0), LEASE)})
    pool.talkative = True
    async with running(pool, watch) as service:
        await service.manifest(5.0)
        watch.tell(MANIFEST, {"ffn.0": (peer(0), LEASE), "ffn.1": (peer(1), LEASE)})
        assert service.view.uids == ("ffn.0",)
        await service.refilled(1.0, "ffn.1")
        assert [to for _, to, _ in pool.calls] == [peer(0), peer(1)]


async def test_a_peer_without_an_address_is_not_reached(autojump_clock) -> None:
    pool, watch = Pool(experts(2), ((ROW,), (ROW,))), Watch()
    watch.tell(MANIFEST, leases(pool))
    async with running(pool, watch) as service:
        await service.manifest(5.0)
        service._node.dht.contact = lambda peer: None
        watch.current.contacts[peer(0)] = Dht({}).contact(peer(0))
        outcome = await service.cross(crossing(pool, WAIT))
        assert list(outcome.answers) == [0]
        assert outcome.errors[1].code == "unreachable"


async def test_a_new_lease_makes_its_holder_speak_again(autojump_clock) -> None:
    pool, watch = Pool(experts(2), ((ROW,), (ROW,))), Watch()
    watch.tell(MANIFEST, leases(pool))
    async with running(pool, watch) as service:
        await service.manifest(5.0)
        pool.experts["ffn.1"].peer, pool.experts["ffn.1"].lease = peer(5), LEASE + 1
        watch.tell(MANIFEST, leases(pool))
        await service.refilled(1.0, "ffn.0")
        await trio.sleep(0.1)
        assert service.view.peers == (peer(0), peer(5))
        assert service.view.leases == (LEASE, LEASE + 1)
        del pool.experts["ffn.0"]
        watch.tell(MANIFEST, leases(pool))
        await trio.sleep(0.1)
        assert service.view.uids == ("ffn.1",)


async def test_cells_of_a_server_in_doubt_are_marked_until_it_is_well(autojump_clock) -> None:
    pool, watch = Pool(experts(), ((ROW,), (ROW,))), Watch()
    watch.tell(MANIFEST, leases(pool))
    async with running(pool, watch) as service:
        await service.manifest(5.0)
        assert not service.view.doubted_C.any()
        watch.doubted = frozenset({peer(1)})
        watch.tell(MANIFEST, leases(pool))
        await trio.sleep(0.1)
        assert service.view.uids == ("ffn.0", "ffn.2", "ffn.1", "ffn.3")
        assert service.view.doubted_C.tolist() == [False, False, True, True]
        watch.doubted = frozenset()
        watch.tell(MANIFEST, leases(pool))
        await trio.sleep(0.1)
        assert not service.view.doubted_C.any()
        assert len(pool.calls) == 2


async def test_all_parts_are_waited_for_as_long_as_grace_allows(autojump_clock) -> None:
    pool, watch = Pool(experts(), ((ROW,), (ROW,))), Watch()
    watch.tell(MANIFEST, leases(pool))
    for delay, one in zip([1.0, 1.2, 1.4, 9.0], pool.experts.values(), strict=True):
        one.delay = delay
    async with running(pool, watch) as service:
        began = trio.current_time()
        outcome = await service.cross(crossing(pool, WAIT))
        assert trio.current_time() - began == pytest.approx(1.5)
        assert outcome.waited == pytest.approx(1.0)
        assert outcome.seconds == pytest.approx(1.5)
        assert (len(outcome.answers), outcome.served) == (3, 2)
        assert [error.code for error in outcome.errors.values()] == ["timeout"]
        assert pool.cancelled == 1
        began = trio.current_time()
        await service.cross(crossing(pool, QuorumParams(1, 20.0, 3.0, 30.0)))
        assert trio.current_time() - began == pytest.approx(9.0)


async def test_rows_without_answers_are_waited_for_as_long_as_patience_allows(
    autojump_clock,
) -> None:
    pool, watch = Pool(experts(), ((ROW,), (ROW,))), Watch()
    watch.tell(MANIFEST, leases(pool))
    for one in pool.experts.values():
        one.delay = 60.0
    pool.experts["ffn.1"].error = RemoteError("broken")
    pool.experts["ffn.1"].delay = 1.0
    async with running(pool, watch) as service:
        outcome = await service.cross(crossing(pool, WAIT))
        assert outcome.seconds == pytest.approx(3.0)
        assert (outcome.answers, outcome.served) == ({}, 0)
        assert sorted(error.code for error in outcome.errors.values()) == [
            "internal",
            "timeout",
            "timeout",
            "timeout",
        ]


@pytest.mark.parametrize(("index", "failures"), [(0, 2), (5, 4)])
async def test_a_call_that_is_answered_wrongly_fails_for_what_is_left_of_it(
    index: int, failures: int, autojump_clock
) -> None:
    pool, watch = Pool(experts(), ((ROW,), (ROW,))), Watch()
    pool.reply = lambda answer: Answer(parts=(done(index),), tensors=answer.tensors)
    watch.tell(MANIFEST, leases(pool))
    async with running(pool, watch) as service:
        outcome = await service.cross(crossing(pool, WAIT))
        assert len(outcome.errors) == failures
        assert all(isinstance(error, MalformedMessage) for error in outcome.errors.values())


async def test_a_part_that_is_never_answered_does_not_hang(autojump_clock) -> None:
    pool, watch = Pool(experts(2), ((ROW,), (ROW,))), Watch()
    watch.tell(MANIFEST, leases(pool))
    async with running(pool, watch) as service:
        pool.silent = {"ffn.1"}
        outcome = await service.cross(crossing(pool, WAIT))
        assert [str(error) for error in outcome.errors.values()] == [
            "the answer ended before this part"
        ]
        assert outcome.seconds < 1

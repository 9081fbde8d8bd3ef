"""Servers take free cells without a clash, keep them, and replace those that they lose."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import pytest
import trio
from structlog.testing import capture_logs

from p2pmoe.dht.leases import LeaseRefused
from p2pmoe.dht.messages import SnapshotRecord
from p2pmoe.errors import PeerBusy, PeerUnreachable, QuorumNotReached
from p2pmoe.experts.backend import TrainParams
from p2pmoe.experts.compute import ComputeParams
from p2pmoe.experts.jobs import ServedExpert
from p2pmoe.experts.manifest import offer_for
from p2pmoe.experts.service import ExpertService, ServeParams
from p2pmoe.experts.tenancy import LOOK_AFTER, LOOK_AROUND, LOOK_SOON, Tenancy
from p2pmoe.experts.uid import ExpertUid
from p2pmoe.identity import PeerId
from p2pmoe.wire.envelope import Signed
from tests.experts.calls import client, manifest
from tests.experts.saved import file_of, statement

FILE = file_of()


@dataclass
class Directory:
    """Who holds what, as all servers see it; a lease that was lost may be taken by anybody."""

    owners: dict[str, PeerId] = field(default_factory=dict)
    down: bool = False
    busy: bool = False
    claims: int = 0
    asked: trio.Event = field(default_factory=trio.Event)


@dataclass
class View:
    coordinates: dict[int, tuple[PeerId, ...]]


class FakeDht:
    """The DHT as one server sees it."""

    def __init__(self, directory: Directory, me: PeerId) -> None:
        self.directory, self.me = directory, me
        self.rng = random.Random(me.raw)

    def lease_number(self, grid: bytes, uid: str, now: float) -> int | None:
        return 1 if self.directory.owners.get(uid) == self.me else None

    async def get_prefix(self, grid: bytes, prefix: str) -> View:
        await trio.sleep(self.rng.random())
        if self.directory.busy:
            raise PeerBusy("too many questions at once")
        found: dict[int, list[PeerId]] = {}
        for uid, peer in self.directory.owners.items():
            if uid.startswith(f"{prefix}."):
                found.setdefault(int(uid.removeprefix(prefix).split(".")[1]), []).append(peer)
        return View({coordinate: tuple(peers) for coordinate, peers in found.items()})

    async def get_leases(self, grid: bytes, uids: Iterable[str]) -> dict[str, PeerId]:
        return {uid: self.directory.owners[uid] for uid in uids if uid in self.directory.owners}

    async def claim(self, grid: bytes, uid: str, above: int = 0) -> None:
        self.directory.claims += 1
        self.directory.asked.set()
        await trio.sleep(self.rng.random())
        if self.directory.down:
            raise self.rng.choice([QuorumNotReached(), PeerUnreachable("nobody answers")])
        owner = self.directory.owners.setdefault(uid, self.me)
        if owner != self.me:
            raise LeaseRefused(owner=owner, expert=uid)


@dataclass
class Saved:
    """What was saved: of `here` on this server's disk, of `elsewhere` at other peers."""

    here: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)  # what was restored and had been served

    def saved_here(self, grid: bytes) -> list[str]:
        return self.here

    def highest_lease(self, grid: bytes, uid: str) -> int:
        return 0

    async def known(self, grid: bytes, uid: str) -> list[Signed[SnapshotRecord]]:
        return [statement(FILE, uid=uid)] if uid in self.elsewhere else []

    async def restore(self, expert: ServedExpert, known: object, *, was_served: bool) -> None:
        await trio.sleep(0.1)
        if was_served:
            self.orphans.append(expert.uid)


def tenancy(
    directory: Directory,
    peer: int,
    count: int,
    only: tuple[str, ...] = (),
    saved: Saved | None = None,
) -> tuple[Tenancy, ExpertService]:
    me, params = (
        client(peer),
        ServeParams(compute=ComputeParams(threaded=False), train=TrainParams(optimizer="sgd")),
    )
    dht = FakeDht(directory, me)
    service = ExpertService({}, dht, params)
    offer = offer_for(manifest(), count, only=tuple(map(ExpertUid.parse, only)))
    return Tenancy(dht, service, saved or Saved(), offer, me, dht.rng), service  # type: ignore[arg-type]  # as much as it needs


@pytest.mark.parametrize("counts", [(4,), (5, 5, 5), (2, 3, 4, 7), (9, 9)])
async def test_servers_that_start_at_once_share_the_cells(
    autojump_clock: object, counts: tuple[int, ...]
) -> None:
    directory = Directory()
    servers = [tenancy(directory, peer, count) for peer, count in enumerate(counts)]
    async with trio.open_nursery() as starts:
        for one, _ in servers:
            starts.start_soon(one.acquire)
    held = [uid for one, _ in servers for uid in one.held]
    assert len(held) == len(set(held)) == min(16, sum(counts))
    for one, service in servers:
        assert sorted(service.experts) == sorted(one.held)
        assert {directory.owners[uid] for uid in one.held} <= {one._me}


async def test_a_joiner_reads_what_is_taken_and_asks_only_for_what_is_free(
    autojump_clock: object,
) -> None:
    directory = Directory()
    await tenancy(directory, 1, 12)[0].acquire()
    directory.claims = 0
    late, _ = tenancy(directory, 2, 12)
    assert len(await late.acquire()) == directory.claims == 4


async def test_named_cells_are_taken_or_left(autojump_clock: object) -> None:
    directory = Directory(owners={"ffn.0.0": client(9)})
    one, _ = tenancy(directory, 1, 0, only=("ffn.0.0", "ffn.1.1"))
    assert await one.acquire() == ("ffn.1.1",)


async def test_claims_wait_until_a_quorum_answers(
    autojump_clock: object, nursery: trio.Nursery
) -> None:
    directory = Directory(down=True)
    one, _ = tenancy(directory, 1, 3)
    nursery.start_soon(one.acquire)
    await trio.sleep(60)
    assert one.held == ()
    assert directory.claims < 100
    directory.down = False
    await trio.sleep(15)
    assert len(one.held) == 3


async def test_what_was_not_granted_in_time_is_claimed_later(
    autojump_clock: object, nursery: trio.Nursery
) -> None:
    directory = Directory()
    one, _ = tenancy(directory, 1, 16)
    async with trio.open_nursery() as starts:
        starts.start_soon(one.acquire)
        await directory.asked.wait()
        starts.cancel_scope.cancel()
    assert len(one.held) < 16
    await nursery.start(one.run)
    await trio.sleep(LOOK_AFTER + 4)
    assert len(one.held) == 16


async def test_a_lost_lease_is_claimed_again_and_its_expert_kept(
    autojump_clock: object, nursery: trio.Nursery
) -> None:
    directory = Directory()
    one, service = tenancy(directory, 1, 3)
    uid = (await one.acquire())[0]
    expert = service.experts[uid]
    await nursery.start(one.run)
    del directory.owners[uid]
    with capture_logs() as events:
        await trio.sleep(LOOK_AFTER + 2)
    assert [event["event"] for event in events if event["log_level"] == "warning"] == [
        "expert.lease.lost"
    ]
    assert directory.owners[uid] == client(1)
    assert service.experts[uid] is expert


async def test_a_cell_lost_to_another_server_is_replaced_by_a_free_one(
    autojump_clock: object, nursery: trio.Nursery
) -> None:
    directory = Directory()
    one, service = tenancy(directory, 1, 3)
    uid = (await one.acquire())[0]
    await nursery.start(one.run)
    directory.owners[uid] = client(2)
    await trio.sleep(LOOK_AFTER + 4)
    assert uid not in one.held
    assert sorted(service.experts) == sorted(one.held)
    assert len(one.held) == 3


async def test_cells_that_become_vacant_are_taken_by_a_server_that_wants_more(
    autojump_clock: object, nursery: trio.Nursery
) -> None:
    directory = Directory()
    first, _ = tenancy(directory, 1, 14)
    second, _ = tenancy(directory, 2, 6)
    await first.acquire()
    assert len(await second.acquire()) == 2
    await nursery.start(second.run)
    for uid in first.held:
        del directory.owners[uid]
    await trio.sleep(LOOK_AROUND + 5)
    assert len(second.held) == 6


async def test_cells_saved_here_come_first_then_those_saved_elsewhere(
    autojump_clock: object,
) -> None:
    saved = Saved(here=["ffn.3.3"], elsewhere=["ffn.0.1", "ffn.3.3"])
    one, _ = tenancy(Directory(), 1, 2, saved=saved)
    assert await one.acquire() == ("ffn.0.1", "ffn.3.3")
    assert set(saved.orphans) == {"ffn.0.1", "ffn.3.3"}
    other, _ = tenancy(Directory(), 1, 1, saved=Saved(here=["ffn.3.3"], elsewhere=["ffn.0.1"]))
    assert await other.acquire() == ("ffn.3.3",)


async def test_an_expert_is_served_when_it_is_restored_and_not_before(
    autojump_clock: object, nursery: trio.Nursery
) -> None:
    one, service = tenancy(Directory(), 1, 1)
    nursery.start_soon(one.acquire)
    await until(lambda: "ffn" in str(one._placement._asked))
    await until(lambda: one._placement.held)
    assert list(service.experts) == list(one.held)


async def test_the_loss_of_a_member_makes_a_server_look_again_and_again(
    autojump_clock: object, nursery: trio.Nursery
) -> None:
    saved, directory = Saved(), Directory()
    first, _ = tenancy(directory, 1, 14)
    second, _ = tenancy(directory, 2, 6, saved=saved)
    await first.acquire()
    await second.acquire()
    await nursery.start(second.run)
    await trio.sleep(3)
    second.look_now()
    await trio.sleep(5)  # which finds nothing yet
    assert len(second.held) == 2
    orphans = set(first.held)
    for uid in first.held:
        del directory.owners[uid]
    await trio.sleep(LOOK_SOON + 6)
    assert len(second.held) == 6
    assert len(orphans.intersection(second.held)) == 4
    assert len(saved.orphans) == 4


async def test_a_cell_that_is_handed_over_is_claimed_at_once(
    autojump_clock: object, nursery: trio.Nursery
) -> None:
    directory = Directory()
    first, _ = tenancy(directory, 1, 16)
    second, service = tenancy(directory, 2, 1)
    await first.acquire()
    await second.acquire()
    await nursery.start(second.run)
    assert second.missing == 1
    del directory.owners["ffn.2.2"]
    assert second.handed("ffn.2.2")
    assert not second.handed("ffn.2.3")
    await trio.sleep(1.5)
    assert second.held == tuple(service.experts) == ("ffn.2.2",)
    assert second.missing == 0


async def test_a_look_that_fails_is_made_again(
    autojump_clock: object, nursery: trio.Nursery
) -> None:
    directory = Directory(busy=True)
    one, _ = tenancy(directory, 1, 2)
    assert len(await one.acquire()) == 2
    directory.owners.clear()
    await nursery.start(one.run)
    one.look_now()
    await trio.sleep(10)
    assert len(one.held) == 2


async def until(true: Callable[[], object]) -> None:
    with trio.fail_after(60):
        while not true():
            await trio.sleep(0.01)

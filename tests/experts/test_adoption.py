"""An expert begins as the newest state that survives anywhere, whoever lies or is gone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock

from p2pmoe.dht.messages import SnapshotRecord
from p2pmoe.errors import PeerBusy
from p2pmoe.experts.adoption import Adoption, AdoptionParts
from p2pmoe.experts.archive_store import Folder
from p2pmoe.experts.backend import TrainParams
from p2pmoe.experts.jobs import ServedExpert, build
from p2pmoe.experts.snapshot import Disk
from p2pmoe.identity import KeyPair, PeerId
from p2pmoe.net.calls import Part
from p2pmoe.wire.envelope import Signed
from tests.experts.calls import client, offer
from tests.experts.keepers import Keeper, Pool
from tests.experts.saved import GRID, NETWORK, OWNER, Packed, equal, learn, pack, statement, weights

UID = "ffn.0.0"
OFFER = offer()
ONE, TWO = client(1), client(2)
DEVICE = torch.device("cpu")


def expert() -> ServedExpert:
    """The expert with its first weights."""
    return build(OFFER, UID, TrainParams(), DEVICE)


def after(steps: int) -> Packed:
    """The file of the expert when it has learned so often."""
    return pack(learn(expert().backend, steps))


OLD, NEW = after(1), after(2)


class Dht:
    """What the DHT knows to be saved, if it answers."""

    def __init__(self, *saved: Signed[SnapshotRecord]) -> None:
        self.saved = list(saved)
        self.error: Exception | None = None
        self.silent = False
        self.unusable: set[PeerId] = set()

    async def snapshots(self, grid: bytes, uid: str) -> list[Signed[SnapshotRecord]]:
        await trio.lowlevel.checkpoint()
        if self.silent:
            await trio.sleep_forever()
        if self.error is not None:
            raise self.error
        return [one for one in self.saved if (one.body.grid, one.body.uid) == (grid, uid)]

    def usable(self, peer: PeerId) -> bool:
        return peer not in self.unusable


class World:
    """A server that adopts, two keepers, and the DHT."""

    def __init__(self, root: Path) -> None:
        self.own, self.kept = Folder(root / "own", NETWORK), Folder(root / "copies", NETWORK)
        self.dht = Dht()
        keepers = {peer: Keeper(root / peer.short) for peer in (ONE, TWO)}
        self.pool = Pool(client(7), keepers)

    def adoption(self, *, restore: bool = True) -> Adoption:
        folders = self.own, self.kept
        parts = AdoptionParts(self.dht, folders, self.pool.copies(), Disk(threaded=False))
        return Adoption(parts, restore=restore)

    async def adopt(self, *, was_served: bool = True, restore: bool = True) -> ServedExpert:
        """The expert that a server has after it; what it says is in `events`."""
        made, adoption = expert(), self.adoption(restore=restore)
        with capture_logs() as self.events:
            known = await adoption.known(GRID, UID)
            await adoption.restore(made, known, was_served=was_served)
        return made

    def keep(self, packed: Packed, *peers: PeerId, **facts: object) -> Signed[SnapshotRecord]:
        """Have it saved by these keepers, and say so in the DHT."""
        named = tuple(peer.raw for peer in peers)
        signed = statement(packed, keepers=named, **facts)  # type: ignore[arg-type]  # passed on
        for peer in peers:
            self.pool.keepers[peer].copies.write(signed, packed.data)
        self.dht.saved.insert(0, signed)
        return signed

    @property
    def warnings(self) -> list[str]:
        return [str(event["then"]) for event in self.events if event["log_level"] == "warning"]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def is_at(made: ServedExpert, packed: Packed) -> bool:
    return pack(made.backend) == packed


async def test_an_expert_goes_on_from_the_newest_copy(world: World) -> None:
    world.keep(OLD, ONE)
    world.keep(NEW, TWO)
    made = await world.adopt()
    assert is_at(made, NEW)
    assert world.warnings == []
    other = expert()
    learn(other.backend, 2)
    assert equal(weights(learn(made.backend)), weights(learn(other.backend)))


async def test_what_lies_here_is_used_before_anybody_is_asked(world: World) -> None:
    signed = world.keep(NEW, ONE)
    world.own.write(signed, NEW.data)
    assert is_at(await world.adopt(), NEW)
    assert world.pool.asked == []


async def test_a_copy_kept_for_another_peer_counts_as_well(world: World) -> None:
    world.kept.write(world.keep(NEW, keys=OWNER), NEW.data)
    assert is_at(await world.adopt(), NEW)
    assert world.pool.asked == []


async def test_a_newer_copy_elsewhere_counts_more_than_an_older_one_here(world: World) -> None:
    world.own.write(statement(OLD), OLD.data)
    world.keep(NEW, ONE)
    assert is_at(await world.adopt(), NEW)


async def test_a_newer_file_here_counts_more_than_an_older_one_elsewhere(world: World) -> None:
    world.keep(OLD, ONE)
    world.own.write(statement(NEW), NEW.data)
    assert is_at(await world.adopt(), NEW)
    assert world.adoption().saved_here(GRID) == [UID]


async def test_a_later_owner_counts_more_than_more_updates(world: World) -> None:
    world.own.write(statement(NEW, lease=3), NEW.data)
    world.keep(OLD, ONE, lease=4)
    assert is_at(await world.adopt(), OLD)
    assert world.adoption().highest_lease(GRID, UID) == 3


async def test_what_the_dht_doubts_is_tried_last(world: World) -> None:
    world.keep(NEW, ONE, lease=2**60, keys=KeyPair.from_seed(bytes([5]) * 32))
    world.keep(OLD, TWO)  # comes first now, as from a quorum
    assert is_at(await world.adopt(), OLD)


async def test_a_dht_that_fails_or_is_silent_costs_only_what_it_knows(
    autojump_clock: MockClock, world: World
) -> None:
    world.own.write(statement(OLD), OLD.data)
    world.dht.error = PeerBusy("later")
    assert is_at(await world.adopt(), OLD)
    world.dht.error, world.dht.silent = None, True
    assert is_at(await world.adopt(), OLD)


async def test_a_keeper_that_lies_is_passed_over_for_another_one(world: World) -> None:
    world.keep(NEW, ONE, TWO)
    world.pool.change[ONE] = flipped
    assert is_at(await world.adopt(), NEW)
    refused = [event for event in world.events if event["event"] == "expert.snapshot.refused"]
    assert [event["source"] for event in refused] == [ONE.short]
    assert world.warnings == []


async def test_when_every_keeper_lies_or_is_gone_the_next_older_one_is_used(world: World) -> None:
    world.keep(OLD, TWO)
    world.keep(NEW, ONE)
    world.pool.change[ONE] = flipped
    assert is_at(await world.adopt(), OLD)
    assert world.warnings == ["it goes on from step 1"]
    world.pool.change, world.pool.dead = {}, {ONE}
    world.dht.unusable = {ONE}
    assert is_at(await world.adopt(), OLD)


async def test_a_damaged_file_here_is_passed_over_for_a_copy(world: World) -> None:
    signed = world.keep(NEW, ONE)
    saved = world.own.write(signed, NEW.data)
    saved.path.write_bytes(NEW.data[:-1])
    assert is_at(await world.adopt(), NEW)
    saved.path.unlink()
    assert is_at(await world.adopt(), NEW)


async def test_a_statement_of_a_size_that_cannot_be_is_not_fetched(world: World) -> None:
    world.keep(NEW, ONE, bytes=2**40)
    assert is_at(await world.adopt(), pack(expert().backend))
    assert world.pool.asked == []


async def test_without_any_copy_it_begins_anew_and_says_what_was_lost(world: World) -> None:
    first = pack(expert().backend)
    assert is_at(await world.adopt(), first)
    assert world.warnings == ["it begins again with its first weights"]
    world.keep(NEW, ONE)
    world.pool.dead.add(ONE)
    assert is_at(await world.adopt(was_served=False), first)
    assert world.warnings == ["it begins again with its first weights"]
    assert world.events[-1]["saved_step"] == 2


async def test_an_expert_that_nobody_ever_served_begins_without_a_word(world: World) -> None:
    await world.adopt(was_served=False)
    assert world.events == []


async def test_who_restores_never_uses_nothing_that_was_saved(world: World) -> None:
    world.own.write(world.keep(NEW, ONE), NEW.data)
    assert is_at(await world.adopt(restore=False), pack(expert().backend))
    assert world.warnings == []
    assert world.adoption(restore=False).saved_here(GRID) == []


def flipped(_: str, part: Part) -> Part:
    """The answer with one bit of its last byte turned."""
    if not part.payload:
        return part
    data = bytearray(part.payload)
    data[-1] ^= 1
    return Part(part.body, memoryview(data))

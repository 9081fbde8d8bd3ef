"""A server saves what has learned, has copies kept, and loses nothing to a full disk."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock

from p2pmoe.dht.messages import SnapshotRecord
from p2pmoe.errors import QuorumNotReached
from p2pmoe.experts import archive_store
from p2pmoe.experts.archive_store import Folder
from p2pmoe.experts.jobs import ServedExpert
from p2pmoe.experts.saving import SaveParams, Saver, SaverParts
from p2pmoe.experts.snapshot import Disk
from p2pmoe.identity import PeerId
from p2pmoe.wire.envelope import Kind, Signed, seal
from tests.experts.calls import client
from tests.experts.keepers import Keeper, Pool
from tests.experts.saved import GRID, NETWORK, OWNER, backend, learn, pack

UID = "ffn.0.0"
ONE, TWO, THREE = (client(number) for number in (1, 2, 3))


class Server:
    """One that serves an expert, with three keepers about, and the DHT."""

    def __init__(self, root: Path, *, folder: bool = True, **saving: object) -> None:
        self.folder = Folder(root / "own", NETWORK) if folder else None
        self.pool = Pool(
            OWNER.peer_id, {peer: Keeper(root / peer.short) for peer in (ONE, TWO, THREE)}
        )
        self.expert = ServedExpert(
            uid=UID, grid=GRID, expert_class="ffn", inputs=(), outputs=(), backend=backend()
        )
        self.lease: int | None = 1
        self.told: list[Signed[SnapshotRecord]] = []
        self.deaf = False
        self.slow = 0.0  # seconds that a statement takes
        self.now = 1.7e9
        parts = SaverParts(
            dht=self,
            experts=lambda: [self.expert],
            folder=self.folder,
            copies=self.pool.copies(),
            disk=Disk(threaded=False),
            sign=lambda body: seal(OWNER, body, kind=Kind.SNAPSHOT, network=NETWORK),
            wall_clock=lambda: self.now,
        )
        self.saver = Saver(parts, SaveParams(**saving))  # type: ignore[arg-type]  # of several types

    def lease_number(self, grid: bytes, uid: str, now: float) -> int | None:
        return self.lease

    async def put_snapshot(self, record: Signed[SnapshotRecord]) -> None:
        await trio.sleep(self.slow)
        if self.deaf:
            raise QuorumNotReached("nobody is there")
        self.told.append(record)

    @property
    def saved(self) -> list[int]:
        """The steps that lie on its disk, the newest first."""
        assert self.folder is not None
        key = self.told[0].body.key if self.told else b""
        return [saved.signed.body.step for saved in self.folder.of(key)]

    def holders(self) -> list[PeerId]:
        digest = self.told[-1].body.hash
        return [peer for peer, one in self.pool.keepers.items() if one.copies.find(digest)]


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path)


async def test_an_expert_that_learned_is_saved_copied_and_told_of(server: Server) -> None:
    learn(server.expert.backend, 2)
    await server.saver.save()
    (told,) = server.told
    packed = pack(server.expert.backend)
    assert (told.body.step, told.body.lease, told.body.hash) == (2, 1, packed.hash)
    assert (told.body.bytes, told.body.saved_ms) == (len(packed.data), 1_700_000_000_000)
    assert [PeerId(raw) for raw in told.body.keepers] == server.holders()
    assert len(server.holders()) == 2
    assert server.saved == [2]


async def test_what_did_not_learn_is_not_saved_again_but_told_of(server: Server) -> None:
    await server.saver.save()
    assert server.told == []
    learn(server.expert.backend)
    for _ in range(3):
        await server.saver.save()
    assert len({told.raw for told in server.told}) == 1
    assert len(server.told) == 3
    assert server.saved == [1]
    assert len(server.pool.asked) == 4


async def test_the_newest_few_files_stay(tmp_path: Path) -> None:
    server = Server(tmp_path, keep=2)
    for _ in range(4):
        learn(server.expert.backend)
        await server.saver.save()
    assert server.saved == [4, 3]


async def test_without_its_lease_an_expert_is_not_saved(server: Server) -> None:
    learn(server.expert.backend)
    server.lease = None
    await server.saver.save()
    assert server.told == []


async def test_under_a_new_lease_it_is_saved_anew(server: Server) -> None:
    learn(server.expert.backend)
    await server.saver.save()
    server.lease = 2
    await server.saver.save()
    assert [told.body.lease for told in server.told] == [1, 2]


async def test_when_a_keeper_is_lost_another_one_gets_a_copy(server: Server) -> None:
    learn(server.expert.backend)
    await server.saver.save()
    gone, stays = server.holders()
    del server.pool.keepers[gone]
    server.saver._parts = _again(server)
    await server.saver.save()
    assert stays in server.holders()
    assert len(server.holders()) == 2
    asked = len(server.pool.asked)
    await server.saver.save()
    assert len(server.pool.asked) == asked


def _again(server: Server) -> SaverParts:
    """The parts of its saver, now that others are there."""
    parts = server.saver._parts
    return SaverParts(
        parts.dht,
        parts.experts,
        parts.folder,
        server.pool.copies(),
        parts.disk,
        parts.sign,
        parts.wall_clock,
    )


async def test_a_server_without_a_folder_has_others_keep_copies(tmp_path: Path) -> None:
    server = Server(tmp_path, folder=False)
    learn(server.expert.backend)
    await server.saver.save()
    assert len(server.holders()) == 2


async def test_a_full_disk_loses_nothing_that_was_saved_and_says_so_once(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    learn(server.expert.backend)
    await server.saver.save()
    with capture_logs() as events, monkeypatch.context() as disk:
        disk.setattr(archive_store, "_write", full)
        for _ in range(3):
            learn(server.expert.backend)
            await server.saver.save()
    said = [event for event in events if event["event"] == "expert.not_saved"]
    assert len(said) == 1
    assert said[0]["log_level"] == "warning"
    assert said[0]["error"] == "No space left on device"
    assert "free some space" in said[0]["advice"]
    assert server.saved == [1]
    learn(server.expert.backend)
    await server.saver.save()
    assert server.saved == [5, 1]
    assert server.told[-1].body.step == 5


async def test_an_expert_that_is_not_finite_leaves_what_was_saved(server: Server) -> None:
    learn(server.expert.backend)
    await server.saver.save()
    learn(server.expert.backend)
    with torch.no_grad():
        next(iter(server.expert.backend.module.parameters())).fill_(torch.nan)
    with capture_logs() as events:
        await server.saver.save()
    assert [event["log_level"] for event in events] == ["warning"]
    assert server.saved == [1]
    assert len(server.told) == 1


async def test_a_dht_that_does_not_take_it_is_told_again(server: Server) -> None:
    learn(server.expert.backend)
    server.deaf = True
    await server.saver.save()
    server.deaf = False
    await server.saver.save()
    assert [told.body.step for told in server.told] == [1]


async def test_it_saves_now_and_then(
    autojump_clock: MockClock, tmp_path: Path, nursery: trio.Nursery
) -> None:
    server = Server(tmp_path, every=60.0)
    await nursery.start(server.saver.run)
    await trio.sleep(6)
    learn(server.expert.backend)
    await trio.sleep(58)
    assert server.told == []
    await trio.sleep(2)
    assert len(server.told) == 1


async def test_what_takes_long_to_save_is_saved_as_often(
    tmp_path: Path, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    server = Server(tmp_path, every=10.0, keep=9)
    server.slow = 4.0
    await nursery.start(server.saver.run)
    await trio.sleep(4.5)
    for _ in range(6):
        learn(server.expert.backend)
        await trio.sleep(10.0)
    assert server.saved == [6, 5, 4, 3, 2, 1]


async def test_what_it_begins_with_is_saved_and_told_soon(
    autojump_clock: MockClock, tmp_path: Path, nursery: trio.Nursery
) -> None:
    server = Server(tmp_path, every=60.0)
    learn(server.expert.backend)  # as one that was restored
    await nursery.start(server.saver.run)
    await trio.sleep(6)
    assert len(server.told) == 1

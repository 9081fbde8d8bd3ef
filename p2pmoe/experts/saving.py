"""Saves the experts of a server now and then: on disk, at other peers, and says so in the DHT.

An expert is saved when it has learned since it was last, or when too few of the peers that keep its
copy are left. A disk that is full loses nothing that lies there; copies are placed all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import msgspec
import trio

from p2pmoe import telemetry
from p2pmoe.dht.messages import MAX_KEEPERS, SnapshotRecord
from p2pmoe.errors import NonFiniteError, P2PMoEError
from p2pmoe.experts.archive_store import Folder
from p2pmoe.experts.copies_placing import Copies
from p2pmoe.experts.copies_rules import RoomParams
from p2pmoe.experts.jobs import ServedExpert
from p2pmoe.experts.snapshot import Disk, Packed, pack
from p2pmoe.identity import PeerId
from p2pmoe.wire.envelope import Signed

SOON = 5.0  # seconds until the first round; a guess
TELL_WITHIN = 10.0  # seconds to put a statement into the DHT; a guess


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveParams:
    """How a server saves its experts. `every` is in seconds.

    It keeps `keep` files of each, and has `copies` other peers keep the newest. Without `restore`
    nothing that was saved is used, here or elsewhere. `room` is what it has for others' copies.
    """

    every: float = 300.0
    keep: int = 3
    copies: int = 2
    restore: bool = True
    room: RoomParams = RoomParams()  # noqa: RUF009  frozen


class Statements(Protocol):
    """What a saver asks of the DHT."""

    def lease_number(self, grid: bytes, uid: str, now: float) -> int | None:
        """The number under which this server holds a uid now; `None` when it does not."""
        ...

    async def put_snapshot(self, record: Signed[SnapshotRecord]) -> object:
        """Tell what was saved; `QuorumNotReached` when nobody stored it."""
        ...


@dataclass(frozen=True, slots=True)
class SaverParts:
    """What a saver works with. Without a `folder` only copies are made.

    `experts` are those served now, `sign` seals a statement, `wall_clock` is seconds since 1970.
    """

    dht: Statements
    experts: Callable[[], Iterable[ServedExpert]]
    folder: Folder | None
    copies: Copies
    disk: Disk
    sign: Callable[[SnapshotRecord], Signed[SnapshotRecord]]
    wall_clock: Callable[[], float]


@dataclass(slots=True)
class Latest:
    """The last snapshot of an expert: what was said of it, and who keeps it."""

    signed: Signed[SnapshotRecord]
    keepers: frozenset[PeerId]


class Saver:
    """Saves what a server serves. `run` does so every now and then."""

    def __init__(self, parts: SaverParts, params: SaveParams) -> None:
        self._parts, self._params = parts, params
        self._latest: dict[tuple[bytes, str], Latest] = {}  # of experts served here
        self._one_at_a_time = trio.Lock()
        self._disk_full = False

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Save until cancelled, so often however long it takes."""
        task_status.started()
        soon = min(SOON, self._params.every)  # what was restored is told soon under its new lease
        due = trio.current_time() + soon
        while True:
            await trio.sleep_until(due)
            due = trio.current_time() + self._params.every
            await self.save()

    async def save(self) -> None:
        """Save every expert that has learned since it was saved last."""
        async with self._one_at_a_time:
            experts = list(self._parts.experts())
            served = {(expert.grid, expert.uid) for expert in experts}
            self._latest = {name: one for name, one in self._latest.items() if name in served}
            for expert in experts:
                await self._save(expert)

    def latest(self, expert: ServedExpert) -> Latest | None:
        """The last snapshot of an expert, if it is of the present step."""
        latest = self._latest.get((expert.grid, expert.uid))
        if latest is None or latest.signed.body.step != expert.backend.step:
            return None
        return latest

    async def _save(self, expert: ServedExpert) -> None:
        now = trio.current_time()
        lease = self._parts.dht.lease_number(expert.grid, expert.uid, now)
        if lease is None or not expert.backend.step:  # first weights follow from the seed
            return
        latest = self.latest(expert)
        if latest is not None and latest.signed.body.lease == lease and self._enough(latest):
            await self._tell(latest.signed)
            return
        try:
            packed: Packed = await self._parts.disk.run(pack, expert.backend)
        except NonFiniteError as error:
            advice = "what was saved before stays; lower --lr, or bound --clip-grad-norm"
            _warn("expert.not_saved", expert=expert.uid, error=error, advice=advice)
            return
        signed = self._parts.sign(
            SnapshotRecord(
                grid=expert.grid,
                uid=expert.uid,
                lease=lease,
                step=packed.step,
                saved_ms=max(0, int(self._parts.wall_clock() * 1000)),
                hash=packed.hash,
                bytes=len(packed.data),
            )
        )
        await self._write(signed, packed.data)
        await self._place(signed, packed.data)

    def _enough(self, latest: Latest) -> bool:
        """Whether as many peers keep it as could, of those that are there."""
        there = self._parts.copies.possible(latest.signed.body.grid)
        return len(there & latest.keepers) >= min(self._params.copies, len(there))

    async def _write(self, signed: Signed[SnapshotRecord], data: bytes) -> None:
        folder = self._parts.folder
        if folder is None:
            return
        try:
            await self._parts.disk.run(folder.write, signed, data)
            await self._parts.disk.run(folder.prune, signed.body.key, self._params.keep)
        except OSError as error:
            if not self._disk_full:
                _warn(
                    "expert.not_saved",
                    expert=signed.body.uid,
                    error=error.strerror or error,
                    advice="free some space in the state folder; what was saved before is there",
                )
            self._disk_full = True
        else:
            self._disk_full = False

    async def _place(self, signed: Signed[SnapshotRecord], data: bytes) -> None:
        body = signed.body
        kept = await self._parts.copies.place(signed, data, min(self._params.copies, MAX_KEEPERS))
        keepers = tuple(peer.raw for peer in sorted(kept))
        told = self._parts.sign(msgspec.structs.replace(body, keepers=keepers)) if kept else signed
        self._latest[body.grid, body.uid] = Latest(told, kept)
        telemetry.emit("expert.saved", expert=body.uid, step=body.step, copies=len(kept))
        await self._tell(told)

    async def _tell(self, signed: Signed[SnapshotRecord]) -> None:
        try:
            with trio.fail_after(TELL_WITHIN):
                await self._parts.dht.put_snapshot(signed)
        except (P2PMoEError, trio.TooSlowError) as error:
            telemetry.emit("expert.snapshot.untold", expert=signed.body.uid, error=error)


_warn = partial(telemetry.emit, level="warning")

"""Fetches the newest snapshot of every expert of a swarm into a folder, as a client.

Rules: what is known to be saved comes from the DHT; its bytes come from whoever owns the expert or
keeps a copy, piece by piece into a file, and count only with the hash that was signed. A file that
nobody has whole is passed over for the next older one. An expert that has learned nothing has none.
What could not be had is named; the rest is exported all the same.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import trio

from p2pmoe.dht.directory import GridReading, read_grid
from p2pmoe.dht.messages import SnapshotRecord
from p2pmoe.errors import P2PMoEError, SnapshotRefused
from p2pmoe.experts.archive_store import Folder, Incoming, Saved
from p2pmoe.experts.copies_placing import Copies
from p2pmoe.experts.exports import (
    ExportedExpert,
    ExportedGrid,
    ExportManifest,
    MissingExpert,
    write_manifest,
)
from p2pmoe.experts.grids_kept import keep_grid
from p2pmoe.experts.messages import INFO, InfoReply, InfoRequest
from p2pmoe.experts.uid import Grid
from p2pmoe.identity import PeerId
from p2pmoe.node import Node
from p2pmoe.wire import schema
from p2pmoe.wire.envelope import Signed

AT_ONCE = 4  # experts that are fetched; a guess
MOST_ASKED = 1024  # cells of a grid that are asked for when nobody serves them; a guess
MOST_BYTES = 8 << 30  # of one expert's file; a guess
INFO_WITHIN = 5.0  # seconds to ask an owner how many updates an expert has

Progress = Callable[[int, int], None]  # cells looked at, and cells there are


@dataclass(slots=True)
class _Found:
    """What came of it so far."""

    grids: list[ExportedGrid] = field(default_factory=list)
    experts: list[ExportedExpert] = field(default_factory=list)
    untrained: list[str] = field(default_factory=list)
    missing: list[MissingExpert] = field(default_factory=list)
    done: int = 0  # cells looked at


class Export:
    """One export of the grids with these names, or of all that peers serve, into a folder."""

    def __init__(self, node: Node, folder: Path, progress: Progress) -> None:
        self._node, self._root, self._progress = node, folder, progress
        self._folder = Folder(folder, node.network)
        dice = random.Random()  # noqa: S311  orders peers, keeps no secret
        self._copies = Copies(node.pool, node.dht.contact, lambda _: (), dice)
        self._found = _Found()
        self._slots = trio.CapacityLimiter(AT_ONCE)

    async def run(self, names: tuple[str, ...]) -> ExportManifest:
        """Export, and write down what there is. Raises `ExpertUnavailable` for an unknown grid."""
        dht, found = self._node.dht, self._found
        self._folder.load()
        cells: list[tuple[GridReading, str]] = []
        for name in names or tuple(sorted(dht.grids())):
            reading = await read_grid(dht, name)
            body = reading.manifest.body
            keep_grid(self._root, reading.manifest)
            found.grids.append(
                ExportedGrid(name=name, grid=reading.grid.hex(), cells=tuple(body.cells))
            )
            cells += [(reading, uid) for uid in _cells_of(reading)]
        async with trio.open_nursery() as fetches:
            for reading, uid in cells:
                fetches.start_soon(self._export, reading, uid, len(cells))
        manifest = ExportManifest(
            network=self._node.network.hex(),
            created_ms=int(self._node.wall_clock() * 1000),
            grids=tuple(found.grids),
            experts=tuple(sorted(found.experts, key=lambda each: (each.grid, each.uid))),
            untrained=tuple(sorted(found.untrained)),
            missing=tuple(sorted(found.missing, key=lambda each: each.uid)),
        )
        write_manifest(self._root, manifest)
        return manifest

    async def _export(self, reading: GridReading, uid: str, count: int) -> None:
        async with self._slots:
            why = await self._fetch(reading, uid)
            if why:
                self._found.missing.append(MissingExpert(uid=uid, why=why))
            self._found.done += 1
            self._progress(self._found.done, count)

    async def _fetch(self, reading: GridReading, uid: str) -> str:
        """Get the newest file of one expert; why not, if not."""
        try:
            known = await self._node.dht.snapshots(reading.grid, uid)
            if not known:
                return await self._without_file(reading, uid)
        except P2PMoEError as error:
            return str(error)
        why = "nobody has what was saved"
        for signed in known:
            for peer in dict.fromkeys([signed.signer, *map(PeerId, signed.body.keepers)]):
                try:
                    saved = self._folder.find(signed.body.hash) or await self._from(peer, signed)
                except (P2PMoEError, OSError) as error:
                    why = str(error)
                else:
                    self._found.experts.append(_expert(saved))
                    return ""
        return why

    async def _without_file(self, reading: GridReading, uid: str) -> str:
        """An expert of which nothing was saved: nothing is missing if it has learned nothing."""
        view = reading.cells.get(uid)
        if view is None:  # neither served nor saved: there is no such expert
            return ""
        request = schema.encode(InfoRequest(uids=(uid,)))
        with trio.move_on_after(INFO_WITHIN):
            part = await self._node.pool.call(reading.contacts[view.peer], INFO, request)
            infos = schema.decode(part.body, InfoReply).experts
            if infos and infos[0].step:
                return f"{infos[0].step} updates, none saved yet: try again after --save-every"
            if infos:
                self._found.untrained.append(uid)
                return ""
        return "its server does not say whether it has learned"

    async def _from(self, peer: PeerId, signed: Signed[SnapshotRecord]) -> Saved:
        if not 0 < signed.body.bytes <= MOST_BYTES:
            raise SnapshotRefused("size", f"{signed.body.bytes} bytes")
        await self._node.dht.locate(peer)
        incoming = Incoming(self._folder, signed)
        try:
            async for piece in self._copies.pieces(peer, signed.body):
                incoming.add(piece)  # some 10 ms of a process that has nothing else to do
            return incoming.finish()
        finally:
            incoming.drop()


def _cells_of(reading: GridReading) -> list[str]:
    """The cells that are served, and in a small grid all others: they may have been."""
    grid = Grid(reading.manifest.body.name, reading.manifest.body.cells)
    others = map(str, grid.uids()) if grid.size <= MOST_ASKED else ()
    return list(dict.fromkeys([*reading.cells, *others]))


def _expert(saved: Saved) -> ExportedExpert:
    body = saved.signed.body
    return ExportedExpert(
        uid=body.uid,
        grid=body.grid.hex(),
        step=body.step,
        lease=body.lease,
        saved_ms=body.saved_ms,
        sha256=body.hash.hex(),
        bytes=body.bytes,
        signer=saved.signed.signer.hex,
    )

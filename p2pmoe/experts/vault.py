"""What a server saves, keeps for others and restores from, put together for one node.

    <folder>/snapshots   its own experts
    <folder>/copies      those of other peers

Without a folder it keeps nothing, but has others keep copies of what it serves.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import trio

from p2pmoe.dht.contacts import networks_of
from p2pmoe.dht.messages import SnapshotRecord
from p2pmoe.errors import P2PMoEError
from p2pmoe.experts.adoption import Adoption, AdoptionParts
from p2pmoe.experts.archive_store import Folder
from p2pmoe.experts.copies_keeper import CopyKeeper, KeeperParts
from p2pmoe.experts.copies_placing import Copies
from p2pmoe.experts.copies_rules import Candidate
from p2pmoe.experts.saving import SaveParams, Saver, SaverParts
from p2pmoe.experts.service import ExpertService
from p2pmoe.experts.snapshot import Disk
from p2pmoe.identity import PeerId
from p2pmoe.node import Node
from p2pmoe.wire.envelope import Kind, Signed, seal
from p2pmoe.wire.peer_record import Contact, contact_of

OWNED_WITHIN = 5.0  # seconds to learn whether who offers a copy has the lease; a guess


@dataclass(frozen=True, slots=True, kw_only=True)
class VaultParams:
    """`names` are the grids served, by their digests; `folder` is where experts are saved."""

    names: dict[bytes, str]
    saving: SaveParams
    folder: Path | None
    threaded: bool = True


class Vault:
    """The saved experts of a node: its own, and copies. Made by `open_vault`; `run` must run."""

    def __init__(
        self, node: Node, service: ExpertService, params: VaultParams, rng: random.Random
    ) -> None:
        self._node, self._names = node, params.names
        disk = Disk(threaded=params.threaded)
        self.copies = copies = Copies(node.pool, self._contact, self._candidates, rng)
        self._folders: tuple[Folder, ...] = ()
        self._keeper: CopyKeeper | None = None
        if params.folder is not None:
            own, kept = (Folder(params.folder / name, node.network) for name in _FOLDERS)
            self._folders = own, kept
            parts = KeeperParts(kept, own, disk, node.network, self._owns)
            self._keeper = CopyKeeper(node.pool.handlers, parts, params.saving.room)
        self.adoption = Adoption(
            AdoptionParts(node.dht, self._folders, copies, disk), restore=params.saving.restore
        )
        self.saver = Saver(
            SaverParts(
                dht=node.dht,
                experts=service.experts.values,
                folder=self._folders[0] if self._folders else None,
                copies=copies,
                disk=disk,
                sign=self._sign,
                wall_clock=node.wall_clock,
            ),
            params.saving,
        )
        self._disk = disk

    async def load(self) -> None:
        """Find what was saved before."""
        for folder in self._folders:
            await self._disk.run(folder.load)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Save, and keep for others, until cancelled."""
        async with trio.open_nursery() as parts:
            if self._keeper is not None:
                parts.start_soon(self._keeper.run)
            parts.start_soon(self.saver.run)
            task_status.started()

    def _sign(self, record: SnapshotRecord) -> Signed[SnapshotRecord]:
        return seal(self._node.keys, record, kind=Kind.SNAPSHOT, network=self._node.network)

    def _contact(self, peer: PeerId) -> Contact | None:
        known = (m.record for m in self._node.members() if m.peer == peer)
        return self._node.dht.contact(peer) or next(map(contact_of, known), None)

    def _candidates(self, grid: bytes) -> list[Candidate]:
        """All members that are there; one that has just come may not yet be known to serve."""
        name = self._names.get(grid)
        return [
            Candidate(
                member.peer,
                name in member.record.body.grids,
                networks_of(contact_of(member.record)),
            )
            for member in self._node.members()
            if member.state == "alive" and member.peer != self._node.id
        ]

    async def _owns(self, peer: PeerId, record: SnapshotRecord) -> bool:
        """Whether a peer holds the lease under which it says that it saved an expert."""
        try:
            with trio.fail_after(OWNED_WITHIN):
                views = await self._node.dht.get_leases(record.grid, [record.uid])
        except (P2PMoEError, trio.TooSlowError):
            return False
        view = views.get(record.uid)
        return view is not None and (view.peer, view.number) == (peer, record.lease)


_FOLDERS = "snapshots", "copies"


async def open_vault(
    node: Node, service: ExpertService, params: VaultParams, rng: random.Random
) -> Vault:
    """A vault that knows what was saved before."""
    vault = Vault(node, service, params, rng)
    await vault.load()
    return vault

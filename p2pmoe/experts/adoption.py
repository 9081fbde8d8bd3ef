"""Finds the newest surviving state of an expert and gives it to the server that has its lease.

What is saved is looked for in this server's own folders and in the DHT; its bytes come from here,
else from the peers that are named as keepers. What is damaged, false or gone is passed over: for
another keeper first, then for the next older snapshot. An expert of which nothing is left begins
with its first weights, and the log says what was lost.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import trio

from p2pmoe import telemetry
from p2pmoe.dht.messages import SnapshotRecord, key_of
from p2pmoe.errors import P2PMoEError, SnapshotRefused
from p2pmoe.experts.archive import check_size, rank
from p2pmoe.experts.archive_store import Folder
from p2pmoe.experts.copies_placing import Copies
from p2pmoe.experts.jobs import ServedExpert
from p2pmoe.experts.snapshot import Disk, layout_of, unpack
from p2pmoe.identity import PeerId
from p2pmoe.wire.envelope import Kind, Signed

READ_WITHIN = 10.0  # seconds to hear from the DHT what is saved; a guess
MOST_TRIED = 8  # snapshots of one expert that are tried, the newest; a guess

Statement = Signed[SnapshotRecord]
Read = Callable[[], Awaitable[bytes]]


class Snapshots(Protocol):
    """What an adoption asks of the DHT."""

    async def snapshots(self, grid: bytes, uid: str) -> Sequence[Statement]:
        """What is known to be saved of an expert, the best first."""
        ...

    def usable(self, peer: PeerId) -> bool:
        """Whether a call to this peer may succeed."""
        ...


@dataclass(frozen=True, slots=True)
class AdoptionParts:
    """What an adoption works with. `folders` are this server's own files and its copies, if any."""

    dht: Snapshots
    folders: tuple[Folder, ...]
    copies: Copies
    disk: Disk


class Adoption:
    """Restores experts. With `restore` off, all of them begin with their first weights."""

    def __init__(self, parts: AdoptionParts, *, restore: bool = True) -> None:
        self._parts, self._restore = parts, restore

    async def known(self, grid: bytes, uid: str) -> list[Statement]:
        """What is said to be saved of an expert, here or in the DHT; the one to try first is first.

        The DHT puts last what few of its holders name; what lies here goes where its age puts it.
        """
        if not self._restore:
            return []
        found: list[Statement] = []
        try:
            with trio.fail_after(READ_WITHIN):
                found += await self._parts.dht.snapshots(grid, uid)
        except (P2PMoEError, trio.TooSlowError) as error:
            telemetry.emit("expert.snapshots.unread", expert=uid, error=error)
        hashes = {signed.body.hash for signed in found}
        for signed in self._here(grid, uid):
            if signed.body.hash not in hashes:
                older = (rank(each.body) < rank(signed.body) for each in found)
                at = next((at for at, is_older in enumerate(older) if is_older), len(found))
                found.insert(at, signed)
        return found

    def highest_lease(self, grid: bytes, uid: str) -> int:
        """The highest lease number under which a file that lies here was saved; 0 for none."""
        return max((signed.body.lease for signed in self._here(grid, uid)), default=0)

    def _here(self, grid: bytes, uid: str) -> list[Statement]:
        key = key_of(Kind.LEASE, grid, uid)
        return [saved.signed for folder in self._parts.folders for saved in folder.of(key)]

    def saved_here(self, grid: bytes) -> list[str]:
        """The uids of a grid that this server saved when it last served them, the latest first."""
        own = self._parts.folders[:1] if self._restore else ()
        saved = [saved.signed.body for folder in own for saved in folder.all()]
        mine = [record for record in saved if record.grid == grid]
        mine.sort(key=lambda record: record.saved_ms, reverse=True)
        return list(dict.fromkeys(record.uid for record in mine))

    async def restore(
        self, expert: ServedExpert, known: Sequence[Statement], *, was_served: bool
    ) -> None:
        """Give an expert the newest state that survives; it is not served meanwhile."""
        lost: list[Statement] = []
        for signed in known[:MOST_TRIED]:
            source = await self._restored_from(expert, signed)
            if source is not None:
                telemetry.emit(
                    "expert.restored",
                    level="info",
                    expert=expert.uid,
                    step=signed.body.step,
                    source=source,
                )
                break
            lost.append(signed)
        else:
            if known or (was_served and self._restore):
                _tell_loss(expert.uid, lost, "it begins again with its first weights")
            return
        if lost:
            _tell_loss(expert.uid, lost, f"it goes on from step {signed.body.step}")

    async def _restored_from(self, expert: ServedExpert, signed: Statement) -> str | None:
        """Where the file came from that the expert has now; None when no source had it whole."""
        try:
            check_size(signed.body.bytes, layout_of(expert.backend))
        except SnapshotRefused as error:
            _tell_refused(signed, "its statement", error)
            return None
        for source, read in self._sources(signed.body, signed.signer):
            try:
                await self._parts.disk.run(unpack, expert.backend, await read(), signed.body)
            except (P2PMoEError, OSError) as error:
                _tell_refused(signed, source, error)
            else:
                return source
        return None

    def _sources(self, body: SnapshotRecord, signer: PeerId) -> Iterator[tuple[str, Read]]:
        """Who may have a file, and how to get it: this server, then the keepers, then its owner."""
        disk = self._parts.disk
        for folder in self._parts.folders:
            saved = folder.find(body.hash)
            if saved is not None:
                yield "disk", partial(disk.run, folder.read, saved, 0, body.bytes + 1)
        peers = dict.fromkeys([*map(PeerId, body.keepers), signer])
        for peer in sorted(peers, key=lambda peer: not self._parts.dht.usable(peer)):
            yield peer.short, partial(self._parts.copies.fetch, peer, body)


def _tell_refused(signed: Statement, source: str, error: Exception) -> None:
    telemetry.emit(
        "expert.snapshot.refused",
        level="info",
        expert=signed.body.uid,
        step=signed.body.step,
        source=source,
        error=error,
    )


def _tell_loss(uid: str, lost: Sequence[Statement], then: str) -> None:
    telemetry.emit(
        "expert.updates.lost",
        level="warning",
        expert=uid,
        saved_step=lost[0].body.step if lost else "none",
        then=then,
        advice="keep more copies (--copies) or save more often (--save-every)",
    )

"""Keepers without a network: a pool whose calls go straight to their handlers."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import trio

from p2pmoe.dht.messages import SnapshotRecord
from p2pmoe.errors import PeerUnreachable
from p2pmoe.experts.archive_store import Folder
from p2pmoe.experts.copies_keeper import CopyKeeper, KeeperParts
from p2pmoe.experts.copies_placing import Copies
from p2pmoe.experts.copies_rules import Candidate, RoomParams
from p2pmoe.experts.snapshot import Disk
from p2pmoe.identity import PeerId
from p2pmoe.net.calls import Part
from p2pmoe.wire.address import Address
from p2pmoe.wire.peer_record import Contact
from tests.experts.saved import NETWORK, OWNER


@dataclass
class Asked:
    """A call as a keeper gets it."""

    peer: PeerId
    body: bytes
    payload: memoryview = field(default_factory=lambda: memoryview(b""))
    answer: Part | None = None

    async def send(self, body: bytes, payload: Iterable[bytes] = ()) -> None:
        await trio.lowlevel.checkpoint()
        self.answer = Part(body, memoryview(b"".join(payload)))


class Keeper:
    """One that keeps copies in a folder, for the owners of leases that a test names."""

    def __init__(self, root: Path, **room: int) -> None:
        self.owners: set[tuple[PeerId, str, int]] = {(OWNER.peer_id, "ffn.0.0", 1)}
        self.free = 0
        self.handlers: dict[str, Callable[[Asked], object]] = {}
        self.copies, self.own = Folder(root / "copies", NETWORK), Folder(root / "own", NETWORK)
        parts = KeeperParts(self.copies, self.own, Disk(threaded=False), NETWORK, self.owns)
        self.keeper = CopyKeeper(self.handlers, parts, RoomParams(**room))  # type: ignore[arg-type]  # as much as it needs

    def close(self) -> None:
        """Drop what is half done, as `run` does at its end."""
        for name in list(self.keeper._uploads):
            self.keeper._drop(name)

    async def owns(self, peer: PeerId, record: SnapshotRecord) -> bool:
        await trio.lowlevel.checkpoint()
        return (peer, record.uid, record.lease) in self.owners


Change = Callable[[str, Part], Part]


class Pool:
    """Calls of one peer. `change` may falsify the answers of a keeper; some are dead, or hang."""

    def __init__(self, me: PeerId, keepers: dict[PeerId, Keeper]) -> None:
        self.me, self.keepers = me, keepers
        self.change: dict[PeerId, Change] = {}
        self.dead: set[PeerId] = set()
        self.hanging: set[PeerId] = set()
        self.asked: list[tuple[PeerId, str]] = []

    async def call(
        self,
        to: Contact,
        method: str,
        body: bytes,
        payload: Iterable[memoryview] = (),
        *,
        bulk: bool = False,
    ) -> Part:
        await trio.lowlevel.checkpoint()
        self.asked.append((to.peer, method))
        if to.peer in self.dead:
            raise PeerUnreachable("it is gone")
        if to.peer in self.hanging:
            await trio.sleep_forever()
        call = Asked(self.me, body, memoryview(b"".join(payload)))
        await self.keepers[to.peer].handlers[method](call)  # type: ignore[misc]  # a handler is awaited
        assert call.answer is not None
        return self.change.get(to.peer, lambda _, part: part)(method, call.answer)

    def copies(self) -> Copies:
        """What the peer does with them; all of them serve the grid."""

        def contact(peer: PeerId) -> Contact | None:
            return Contact(peer, (Address("host", 1),)) if peer in self.keepers else None

        candidates = [Candidate(peer, serves=True) for peer in self.keepers]
        return Copies(self, contact, lambda _: candidates, random.Random(1))  # type: ignore[arg-type]  # as much as it needs

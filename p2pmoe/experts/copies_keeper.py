"""Keeps copies of other peers' experts, and hands out what lies here. The answering half.

A copy is offered by whoever owns the expert now: its statement is verified, its lease is looked up,
and there must be room (`copies_rules`). Its bytes come in pieces and in order into a file of their
own, which counts only once it is whole and has the hash that was signed. What older copies it takes
the place of goes then, not before. Files are given to anybody who names their hash, a few at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import trio

from p2pmoe import telemetry
from p2pmoe.dht.messages import SnapshotRecord
from p2pmoe.errors import (
    ExpertUnavailable,
    MalformedMessage,
    NotAllowed,
    PeerBusy,
    SnapshotRefused,
)
from p2pmoe.experts.archive import rank
from p2pmoe.experts.archive_store import Folder, Incoming, Saved
from p2pmoe.experts.copies import (
    COPY_GET,
    COPY_OFFER,
    COPY_PUT,
    MAX_COPY_CHUNK,
    CopyChunk,
    CopyGet,
    CopyOffer,
    CopyPut,
    CopyTaken,
    CopyVerdict,
)
from p2pmoe.experts.copies_rules import Item, RoomParams, make_room
from p2pmoe.experts.snapshot import Disk
from p2pmoe.identity import PeerId
from p2pmoe.net.incoming import Handler, IncomingCall
from p2pmoe.wire import schema
from p2pmoe.wire.envelope import Kind, Signed, open_envelope

IDLE = 60.0  # seconds without a piece, then an upload is given up; as long as one may take
LOOK = 15.0  # seconds between looks for those; a guess
READS, READS_A_PEER = 16, 4  # pieces in memory for those who fetch; a guess


@dataclass(frozen=True, slots=True)
class KeeperParts:
    """What a keeper works with.

    `copies` are others' files and `own` this server's. `owns` says whether a peer holds the lease
    of a statement.
    """

    copies: Folder
    own: Folder
    disk: Disk
    network: bytes
    owns: Callable[[PeerId, SnapshotRecord], Awaitable[bool]]


class _Upload:
    """A file on its way in."""

    def __init__(self, incoming: Incoming) -> None:
        self.incoming = incoming
        self.heard = trio.current_time()
        self.busy = False


class CopyKeeper:
    """Answers `expert.copy.*`. `run` must be running."""

    def __init__(self, handlers: dict[str, Handler], parts: KeeperParts, room: RoomParams) -> None:
        self._parts, self._room = parts, room
        self._uploads: dict[tuple[PeerId, bytes], _Upload] = {}  # by publisher and hash
        self._reading: Counter[PeerId] = Counter()
        self._closed = False
        handlers |= {COPY_OFFER: self._offer, COPY_PUT: self._put, COPY_GET: self._get}

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Give up uploads that do not go on, and all of them when cancelled."""
        task_status.started()
        try:
            while True:
                await trio.sleep(LOOK)
                now = trio.current_time()
                for name, upload in list(self._uploads.items()):
                    if now - upload.heard > IDLE and not upload.busy:
                        self._drop(name)
        finally:
            self._closed = True
            for name in list(self._uploads):
                self._drop(name)

    # ------------------------------------------------------------------ taking copies
    async def _offer(self, call: IncomingCall) -> None:
        offer = schema.decode(call.body, CopyOffer)
        signed = open_envelope(
            offer.record, SnapshotRecord, kind=Kind.SNAPSHOT, network=self._parts.network
        )
        if signed.signer != call.peer:
            raise NotAllowed("a copy is offered by the owner of the expert")
        why = await self._why_not(signed)
        said: dict[str, Literal["send", "have"]] = {"": "send", "have": "have"}
        verdict = CopyVerdict(verdict=said.get(why, "refused"), why="" if why in said else why)
        await call.send(schema.encode(verdict))

    async def _why_not(self, signed: Signed[SnapshotRecord]) -> str:
        """Begin an upload, or say why not."""
        name = signed.signer, signed.body.hash
        if self._parts.copies.find(signed.body.hash) is not None:
            return "have"
        room = make_room(list(map(_item, self._parts.copies.all())), _item(signed), self._room)
        if isinstance(room, str):
            return room
        mine = sum(publisher == signed.signer for publisher, _ in self._uploads)
        full = len(self._uploads) >= self._room.uploads or mine >= self._room.uploads_a_publisher
        if full or self._closed:
            return "busy"
        if not await self._parts.owns(signed.signer, signed.body):
            return "lease"
        try:
            incoming = await self._parts.disk.run(Incoming, self._parts.copies, signed)
        except OSError as error:
            _complain(error)
            return "disk"
        if name in self._uploads or self._closed:  # it was offered twice, or too late
            incoming.drop()
            return "busy"
        self._uploads[name] = _Upload(incoming)
        return ""

    async def _put(self, call: IncomingCall) -> None:
        piece = schema.decode(call.body, CopyPut)
        name = call.peer, piece.hash
        upload = self._uploads.get(name)
        if upload is None:
            raise ExpertUnavailable("this file was not offered, or its upload took too long")
        incoming = upload.incoming
        if upload.busy or piece.offset != incoming.received:
            raise PeerBusy(f"{incoming.received} bytes are here: pieces come one after another")
        if len(call.payload) > MAX_COPY_CHUNK:
            raise MalformedMessage("copy.too_long", f"{len(call.payload)} bytes")
        upload.busy, upload.heard = True, trio.current_time()
        whole = False
        try:
            await self._parts.disk.run(incoming.add, call.payload)
            whole = incoming.received == incoming.signed.body.bytes
            if whole:
                await self._finish(incoming)
        except OSError as error:
            self._drop(name)
            _complain(error)
            raise PeerBusy("the disk of this peer does not take it") from None
        except SnapshotRefused as error:
            self._drop(name)
            raise MalformedMessage("copy.content", str(error)) from None
        finally:
            upload.busy = False
        if whole:
            del self._uploads[name]
        await call.send(schema.encode(CopyTaken(received=incoming.received, whole=whole)))

    async def _finish(self, incoming: Incoming) -> None:
        """Put a whole file in its place; what it pushes out goes after it."""
        kept = self._parts.copies.all()
        await self._parts.disk.run(incoming.finish)
        gone = make_room(list(map(_item, kept)), _item(incoming.signed), self._room)
        for saved in kept:
            if not isinstance(gone, str) and _item(saved) in gone:
                await self._parts.disk.run(self._parts.copies.remove, saved)
        body = incoming.signed.body
        telemetry.emit("expert.copy.kept", expert=body.uid, step=body.step, bytes=body.bytes)

    def _drop(self, name: tuple[PeerId, bytes]) -> None:
        self._uploads.pop(name).incoming.drop()

    # ------------------------------------------------------------------ handing out
    async def _get(self, call: IncomingCall) -> None:
        wanted = schema.decode(call.body, CopyGet)
        saved = self._parts.copies.find(wanted.hash) or self._parts.own.find(wanted.hash)
        if saved is None:
            raise ExpertUnavailable("this peer does not have that file")
        with self._a_read(call.peer):
            read = self._parts.own.read  # of either folder: a file knows where it is
            try:
                data = await self._parts.disk.run(read, saved, wanted.offset, wanted.length)
            except OSError as error:
                _complain(error)
                raise ExpertUnavailable("that file cannot be read here") from None
            await call.send(schema.encode(CopyChunk(size=saved.signed.body.bytes)), [data])

    @contextmanager
    def _a_read(self, peer: PeerId) -> Iterator[None]:
        if self._reading.total() >= READS or self._reading[peer] >= READS_A_PEER:
            raise PeerBusy("enough files are being fetched from here")
        self._reading[peer] += 1
        try:
            yield
        finally:
            self._reading[peer] -= 1
            if not self._reading[peer]:
                del self._reading[peer]


def _item(of: Saved | Signed[SnapshotRecord]) -> Item:
    signed = of.signed if isinstance(of, Saved) else of
    body = signed.body
    return Item(body.key, body.hash, signed.signer, rank(body), body.bytes)


def _complain(error: OSError) -> None:
    telemetry.emit(
        "expert.copy.not_kept",
        level="warning",
        error=error.strerror or error,
        advice="free some space in the state folder: copies of others' experts are refused",
    )

"""Puts copies of one's experts at other peers, and fetches files that they keep. The asking half.

Whoever is asked may refuse, be gone or lie: then the next one is asked. Every call has its end.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Sequence

import trio

from p2pmoe import telemetry
from p2pmoe.dht.messages import SnapshotRecord
from p2pmoe.errors import CallTimeout, P2PMoEError, PeerUnreachable, SnapshotRefused
from p2pmoe.experts.copies import (
    CELLS,
    COPY_GET,
    COPY_OFFER,
    COPY_PUT,
    MAX_COPY_CHUNK,
    CellsReply,
    CellsRequest,
    CopyChunk,
    CopyGet,
    CopyOffer,
    CopyPut,
    CopyTaken,
    CopyVerdict,
)
from p2pmoe.experts.copies_rules import Candidate, in_turn
from p2pmoe.identity import PeerId
from p2pmoe.net.calls import Part
from p2pmoe.net.pool import Pool
from p2pmoe.wire import schema
from p2pmoe.wire.envelope import Signed
from p2pmoe.wire.peer_record import Contact

OFFER_WITHIN = 10.0  # seconds; a dial, and a look at the lease
PIECE_WITHIN = 60.0  # seconds for a piece of 4 MiB: 0.6 Mbit/s
CELLS_WITHIN = 3.0  # seconds; a dial
MOST_HEIRS = 32  # peers that are asked whether they have free cells; a guess
FIRST_PIECE = 64 * 2**10  # bytes that show whether a keeper is there; a guess
FIRST_WITHIN = 6.0  # seconds for it: a dial, and half a second at 1 Mbit/s
MOST_ASKED = 8  # peers that are asked to keep one file; a guess


class Copies:
    """Copies of experts at other peers. `candidates` names those that might keep some, by grid."""

    def __init__(
        self,
        pool: Pool,
        contact: Callable[[PeerId], Contact | None],
        candidates: Callable[[bytes], Sequence[Candidate]],
        rng: random.Random,
    ) -> None:
        self._pool, self._contact, self._candidates, self._rng = pool, contact, candidates, rng

    def possible(self, grid: bytes) -> set[PeerId]:
        """Peers that serve this grid, and so might keep a copy of its experts."""
        return {candidate.peer for candidate in self._candidates(grid) if candidate.serves}

    async def place(
        self, signed: Signed[SnapshotRecord], data: bytes, count: int
    ) -> frozenset[PeerId]:
        """Have a file kept by so many peers if there are; who has it now."""
        order = iter(in_turn(self._candidates(signed.body.grid), self._rng)[:MOST_ASKED])
        keepers: set[PeerId] = set()

        async def one() -> None:
            for peer in order:
                if await self._place_at(peer, signed, data):
                    keepers.add(peer)
                    return

        async with trio.open_nursery() as copies:
            for _ in range(count):
                copies.start_soon(one)
        return frozenset(keepers)

    async def _place_at(self, peer: PeerId, signed: Signed[SnapshotRecord], data: bytes) -> bool:
        body = signed.body
        try:
            verdict = await self._offer(peer, signed)
            if verdict.verdict == "send":
                await self._upload(peer, body, data)
        except P2PMoEError as error:
            telemetry.emit("expert.copy.failed", peer=peer, expert=body.uid, error=error)
            return False
        if verdict.verdict == "refused":
            telemetry.emit("expert.copy.refused", peer=peer, expert=body.uid, why=verdict.why)
        return verdict.verdict != "refused"

    async def _offer(self, peer: PeerId, signed: Signed[SnapshotRecord]) -> CopyVerdict:
        body = schema.encode(CopyOffer(record=signed.raw))
        part = await self._ask(peer, COPY_OFFER, body, OFFER_WITHIN)
        return schema.decode(part.body, CopyVerdict)

    async def _upload(self, peer: PeerId, record: SnapshotRecord, data: bytes) -> None:
        for at in range(0, len(data), MAX_COPY_CHUNK):
            piece = memoryview(data)[at : at + MAX_COPY_CHUNK]
            body = schema.encode(CopyPut(hash=record.hash, offset=at))
            part = await self._ask(peer, COPY_PUT, body, PIECE_WITHIN, piece)
            taken = schema.decode(part.body, CopyTaken)
        if not taken.whole:
            raise SnapshotRefused("size", "the keeper does not have it whole")

    async def free_cells(self, grid: bytes) -> dict[PeerId, int]:
        """How many more cells of a grid others would serve, of those who answer soon."""
        free: dict[PeerId, int] = {}

        async def ask(peer: PeerId) -> None:
            try:
                body = schema.encode(CellsRequest(grid=grid))
                part = await self._ask(peer, CELLS, body, CELLS_WITHIN)
                free[peer] = schema.decode(part.body, CellsReply).free
            except P2PMoEError as error:
                telemetry.emit("expert.cells.unknown", peer=peer, error=error)

        async with trio.open_nursery() as questions:
            for peer in in_turn(self._candidates(grid), self._rng)[:MOST_HEIRS]:
                questions.start_soon(ask, peer)
        return free

    async def fetch(self, peer: PeerId, record: SnapshotRecord) -> bytes:
        """A file from whoever has it. The caller has checked that it wants so many bytes.

        Raises `SnapshotRefused` when what comes is not that, or the error of the call.
        """
        return b"".join([piece async for piece in self.pieces(peer, record)])

    async def pieces(self, peer: PeerId, record: SnapshotRecord) -> AsyncIterator[memoryview]:
        """The same piece by piece, so that it need not fit into memory."""
        got = 0
        while got < record.bytes:
            most, within = (MAX_COPY_CHUNK, PIECE_WITHIN) if got else (FIRST_PIECE, FIRST_WITHIN)
            asked = min(most, record.bytes - got)
            body = schema.encode(CopyGet(hash=record.hash, offset=got, length=asked))
            part = await self._ask(peer, COPY_GET, body, within, bulk=True)
            chunk = schema.decode(part.body, CopyChunk)
            if chunk.size != record.bytes or len(part.payload) != asked:
                raise SnapshotRefused("size", f"{len(part.payload)} bytes came, not {asked}")
            yield part.payload
            got += asked

    async def _ask(
        self,
        peer: PeerId,
        method: str,
        body: bytes,
        within: float,
        payload: memoryview | None = None,
        *,
        bulk: bool = False,
    ) -> Part:
        contact = self._contact(peer)
        if contact is None:
            raise PeerUnreachable(f"nobody knows where peer {peer.short} is", stage="resolve")
        pieces = [] if payload is None else [payload]
        try:
            with trio.fail_after(within):
                return await self._pool.call(
                    contact, method, body, pieces, bulk=bulk or payload is not None
                )
        except trio.TooSlowError:
            error = CallTimeout(f"{peer.short}: {method}: no answer after {within:g} s")
            error.peer, error.stage, error.elapsed = peer.short, "call", within
            raise error from None

"""The Trio half of the mixture: keeps the view of one grid fresh.

A cell is in the view when its server has said what its expert takes, and leaves it when a call
(`moe.caller`) finds the server gone or the lease lost, until it has said so again. So a training
step asks nobody who is known to be dead, and looks nothing up; whose server may have failed, and
who is slow or failing himself, is asked last.

Rules: everything here runs in Trio's thread but `view`, which any thread may read; it is replaced,
never changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import trio

from p2pmoe import telemetry
from p2pmoe.dht.directory import GridWatch
from p2pmoe.dht.leases import LeaseView
from p2pmoe.dht.messages import Manifest
from p2pmoe.errors import ExpertUnavailable, P2PMoEError, PeerUnreachable
from p2pmoe.experts.manifest import specs_of
from p2pmoe.experts.messages import INFO, MAX_PARTS, ExpertInfo, InfoReply, InfoRequest
from p2pmoe.experts.uid import ExpertUid
from p2pmoe.identity import PeerId
from p2pmoe.moe.audit import Verdict
from p2pmoe.moe.beam import BeamParams
from p2pmoe.moe.caller import Caller
from p2pmoe.moe.calls import Crossing, Outcome
from p2pmoe.moe.desk import AloneDesk
from p2pmoe.moe.search import GridSearch
from p2pmoe.moe.select import Cell, View, view_of
from p2pmoe.node import Node
from p2pmoe.wire import schema
from p2pmoe.wire.peer_record import Contact

ASK_AGAIN = 1.0  # seconds until a server that has not said what it serves is asked again; a guess
ASK_WITHIN = 5.0  # seconds for its answer; a guess


@dataclass(frozen=True, slots=True)
class _Known:
    """What a server has said of an expert, when its lease was `number`.

    There is no cell where the expert is not what the grid's manifest says.
    """

    peer: PeerId
    number: int
    cell: Cell | None


class MixtureService:
    """The experts of one grid, as this process sees and calls them."""

    def __init__(self, node: Node, watch: GridWatch) -> None:
        self.view: View = view_of((), 1)
        self._cells: list[Cell] = []
        self._search: GridSearch | None = None
        self._node = node
        self._watch = watch
        self._known: dict[str, _Known] = {}
        self._asking: set[PeerId] = set()  # have been asked and not answered
        self._asked: set[PeerId] = set()  # have been asked less than ASK_AGAIN ago
        self._begun = False  # whether there was a reading, and its servers have been asked
        self._stirred = trio.Event()
        self._caller = Caller(node, watch, self)
        self.desk = AloneDesk(node, self, self._caller)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the view fresh, until cancelled."""
        self._node.describe(f"mixture.{self._watch.name}", self.describe)
        async with trio.open_nursery() as asks:
            asks.start_soon(self._follow)
            asks.start_soon(self._caller.auditor.run)
            asks.start_soon(self.desk.run)
            task_status.started()
            while True:
                stirred, unknown = self._stirred, self._refresh()
                for peer, leases in unknown.items():
                    if peer not in self._asked and self._node.pool.usable(peer):
                        self._asked.add(peer)
                        self._asking.add(peer)
                        asks.start_soon(self._ask_about, peer, leases)
                if not self._begun and self._watch.current is not None:
                    self._begun = True
                    self.stir()
                now = trio.current_time()
                soon = now + ASK_AGAIN if unknown else math.inf
                with trio.move_on_at(min(soon, self._caller.standing.next_change(now))):
                    await stirred.wait()

    async def manifest(self, seconds: float) -> Manifest:
        """The grid's manifest, once its servers have been asked what they serve.

        Raises `ExpertUnavailable` when the grid is unknown after that many seconds.
        """
        await self._until(lambda: self._begun and not self._asking, seconds)
        if self._watch.current is None:
            raise ExpertUnavailable(
                f"nobody knows a grid {self._watch.name} after {seconds:g} s:"
                " is a server of it running, and in this network?"
            )
        return self._watch.current.manifest.body

    async def refilled(self, seconds: float, uid: str) -> View:
        """The view, once it has the expert `uid`, or any if that is empty.

        Raises `ExpertUnavailable` after that many seconds.
        """
        self._watch.poke()
        await self._until(lambda: _has(self.view, uid), seconds)
        if not _has(self.view, uid):
            raise ExpertUnavailable(
                f"nobody serves {uid or self._watch.name} after {seconds:g} s:"
                f" {len(self.view)} experts of this grid can be asked",
                expert=uid or None,
            )
        return self.view

    async def search(self, scores: list[list[list[float]]], width: int, seconds: float) -> View:
        """The view, once the best cells of each row of scores have been looked for.

        For a grid too large to be watched whole. What is not found in that many seconds is not in
        the view.
        """
        reading = self._watch.current
        if reading is not None and self._search is None:
            grid, dimensions = reading.grid, len(reading.manifest.body.cells)
            self._search = GridSearch(self._node.dht, self._watch.name, grid, dimensions)
        with trio.move_on_after(seconds):
            if self._search is not None:
                await self._search.find(scores, BeamParams(width))
            async with trio.open_nursery() as asks:
                for peer, leases in self._refresh().items():
                    if self._node.pool.usable(peer):
                        asks.start_soon(self._ask, peer, leases)
        return self.view

    async def _until(self, happened: Callable[[], bool], seconds: float) -> None:
        with trio.move_on_after(seconds):
            while not happened():
                await self._stirred.wait()

    async def cross(self, crossing: Crossing) -> Outcome:
        """Make the calls of a pass, and wait for them as long as its quorum says."""
        return await self._caller.cross(crossing)

    def describe(self) -> dict[str, dict[str, int | str]]:
        """What became of the passes, and what is known of the experts, for `swarm.stats()`."""
        caller, doubted = self._caller, int(self.view.doubted_C.sum())
        verdicts = caller.auditor.audits.verdicts
        audits = {f"audits_{verdict.value}": verdicts[verdict] for verdict in Verdict}
        known = {"asked_last": doubted, **caller.standing.counts, **audits}
        return caller.passes.describe(known)

    # -------------------------------------------------------------------- what the calls tell of it
    def contact(self, peer: PeerId) -> Contact:
        """Where a peer is; `PeerUnreachable` where nobody knows."""
        contact = self._node.dht.contact(peer)
        if contact is None and self._watch.current is not None:
            contact = self._watch.current.contacts.get(peer)
        if contact is None:
            raise PeerUnreachable(f"no address of peer {peer} is known", peer=peer.short)
        return contact

    def lost(self, peer: PeerId) -> None:
        """A peer could not be reached: its experts are not asked before it has spoken again."""
        self._forget(uid for uid, known in self._known.items() if known.peer == peer)

    def gone(self, uids: Iterable[str]) -> None:
        """These experts are not where they were: look for them again."""
        gone = list(uids)
        self._forget(gone)
        self._watch.poke(gone)

    def stir(self) -> None:
        """Wake whoever waits for something to happen."""
        self._stirred.set()
        self._stirred = trio.Event()

    # -------------------------------------------------------------------------------- the view
    async def _follow(self) -> None:
        """Look again whenever the grid was read anew."""
        while True:
            await self._watch.changed()
            self.stir()

    def _leases(self) -> Mapping[str, LeaseView]:
        """Who serves what, as far as the watch and the searches have found."""
        reading = self._watch.current
        found = self._search.cells(trio.current_time()) if self._search else {}
        return {**(reading.cells if reading else {}), **found}

    def _refresh(self) -> dict[PeerId, dict[str, int]]:
        """Bring the view up to date; of each server, the leases that it has not spoken of."""
        cells: list[Cell] = []
        unknown: dict[PeerId, dict[str, int]] = {}
        reading, leases = self._watch.current, self._leases()
        keys = {(lease.peer, uid) for uid, lease in leases.items()}
        last = self._caller.standing.asked_last(keys, trio.current_time())
        for uid, lease in leases.items():
            known = self._known.get(uid)
            if known and (known.number, known.peer) == (lease.number, lease.peer):
                failing = reading is not None and lease.peer in reading.doubted
                doubted = failing or (lease.peer, uid) in last
                cells += [replace(known.cell, doubted=doubted)] if known.cell else []
            else:
                unknown.setdefault(lease.peer, {})[uid] = lease.number
        if reading and cells != self._cells:
            self._cells = cells
            self.view = view_of(cells, len(reading.manifest.body.cells))
            self.stir()
        return unknown

    async def _ask_about(self, peer: PeerId, leases: dict[str, int]) -> None:
        """Ask a server, and leave it alone for a while."""
        await self._ask(peer, leases)
        self._asking.discard(peer)
        self.stir()
        await trio.sleep(ASK_AGAIN)
        self._asked.discard(peer)
        self.stir()

    async def _ask(self, peer: PeerId, leases: dict[str, int]) -> None:
        """Ask a server what its experts take."""
        uids = sorted(leases)
        try:
            with trio.move_on_after(ASK_WITHIN):
                for at in range(0, len(uids), MAX_PARTS):
                    body = schema.encode(InfoRequest(uids=tuple(uids[at : at + MAX_PARTS])))
                    part = await self._node.pool.call(self.contact(peer), INFO, body)
                    reply = schema.decode(part.body, InfoReply)
                    self._caller.passes.others = max(self._caller.passes.others, reply.trainers)
                    for info in reply.experts:
                        self._learn(peer, leases, info)
        except P2PMoEError as error:
            telemetry.emit("moe.info.failed", peer=peer, error=error)
        self._refresh()

    def _learn(self, peer: PeerId, leases: dict[str, int], info: ExpertInfo) -> None:
        """Believe a server what it was asked about, if that is an expert of this grid."""
        reading = self._watch.current
        if reading is None or info.uid not in leases:
            return
        cell = None
        if (info.inputs, info.outputs) == specs_of(reading.manifest.body):
            place = ExpertUid.parse(info.uid).coordinates
            cell = Cell(peer, info.uid, info.lease, max(1, info.max_batch), place)
        else:
            advice = "it takes or returns other tensors than its grid's: restart its server"
            telemetry.emit(
                "moe.expert.unusable", level="warning", peer=peer, expert=info.uid, advice=advice
            )
        self._known[info.uid] = _Known(peer, leases[info.uid], cell)

    def _forget(self, uids: Iterable[str]) -> None:
        """Do not ask these experts before their server has spoken of them again."""
        gone = list(uids)
        for uid in gone:
            self._known.pop(uid, None)
        if self._search:
            self._search.forget(gone)
        self._refresh()
        self.stir()


def _has(view: View, uid: str) -> bool:
    return uid in view.uids if uid else bool(view.uids)

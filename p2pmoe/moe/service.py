"""The Trio half of the mixture: keeps the view of one grid fresh, and calls its experts.

A cell is in the view when its server has said what its expert takes, and leaves it when a call
finds the server gone or the lease lost, until it has said so again. So a training step asks nobody
who is known to be dead, and looks nothing up; who may have failed is asked last. A crossing makes
one call a peer, or few; answers are taken part by part, and what `Quorum` no longer waits for is
cancelled on both sides.

Rules: everything here runs in Trio's thread but `view`, which any thread may read; it is replaced,
never changed. Failures of peers are counted and returned, part by part, never raised.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import trio

from p2pmoe import telemetry
from p2pmoe.dht.directory import GridWatch
from p2pmoe.dht.leases import LeaseView
from p2pmoe.dht.messages import Manifest
from p2pmoe.errors import (
    CallTimeout,
    ExpertUnavailable,
    LeaseLost,
    MalformedMessage,
    NodeClosed,
    P2PMoEError,
    PeerUnreachable,
    RemoteError,
)
from p2pmoe.experts.manifest import specs_of
from p2pmoe.experts.messages import (
    BACKWARD,
    FORWARD,
    INFO,
    MAX_PARTS,
    ExpertInfo,
    InfoReply,
    InfoRequest,
    PartReply,
)
from p2pmoe.experts.uid import ExpertUid
from p2pmoe.identity import PeerId
from p2pmoe.moe.beam import BeamParams
from p2pmoe.moe.calls import Crossing, Outcome, Tensors, read_answer, request
from p2pmoe.moe.dispatch import group
from p2pmoe.moe.quorum import Quorum
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


class _Trip:
    """A crossing on its way: what has come, and until when the rest is waited for."""

    def __init__(self, crossing: Crossing, quorum: Quorum, scope: trio.CancelScope) -> None:
        self.asks, self.method = crossing.asks, crossing.method
        self.outcome = Outcome()
        self._quorum = quorum
        self._scope = scope
        scope.deadline = quorum.next_deadline()

    def answered(self, index: int, tensors: Tensors) -> None:
        """A part's answer is good."""
        self.outcome.answers[index] = tensors
        self._quorum.answered(index, trio.current_time())
        self._scope.deadline = self._quorum.next_deadline()

    def failed(self, index: int, error: P2PMoEError) -> None:
        """A part has no answer, or a bad one."""
        self.outcome.errors[index] = error
        self._quorum.failed(index, trio.current_time())
        self._scope.deadline = self._quorum.next_deadline()


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
        self._figures: dict[str, Counter[str]] = {FORWARD: Counter(), BACKWARD: Counter()}

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the view fresh, until cancelled."""
        self._node.describe(f"mixture.{self._watch.name}", self._describe)
        async with trio.open_nursery() as asks:
            asks.start_soon(self._follow)
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
                    self._stir()
                with trio.move_on_after(ASK_AGAIN if unknown else math.inf):
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

    # -------------------------------------------------------------------------------- the calls
    async def cross(self, crossing: Crossing) -> Outcome:
        """Make the calls of a pass, and wait for them as long as its quorum says."""
        began = trio.current_time()
        quorum = Quorum(crossing.rows_of, crossing.rows, crossing.wait, began)
        async with trio.open_nursery() as calls:
            trip = _Trip(crossing, quorum, calls.cancel_scope)
            for peer, indices in group(crossing.asks):
                calls.start_soon(self._call, trip, peer, indices)
        outcome, now = trip.outcome, trio.current_time()
        for index in crossing.asks.keys() - outcome.answers.keys() - outcome.errors.keys():
            outcome.errors[index] = CallTimeout("the answer came too late to be waited for")
        outcome.served = int(quorum.served.sum())
        outcome.seconds, outcome.waited = now - began, quorum.waited(now)
        self._count(crossing, outcome)
        return outcome

    def _count(self, crossing: Crossing, outcome: Outcome) -> None:
        """Rows of the batch, and rows of parts: of those asked, answered and missed, and why."""
        asks = crossing.asks
        figures = self._figures[crossing.method]
        figures["passes"] += 1
        figures["rows"] += crossing.rows
        figures["rows_served"] += outcome.served
        figures["asked"] += sum(ask.rows for ask in asks.values())
        figures["answered"] += sum(asks[index].rows for index in outcome.answers)
        for index, error in outcome.errors.items():
            figures[f"missed.{error.code}"] += asks[index].rows

    def _describe(self) -> dict[str, dict[str, int | str]]:
        return {
            method.rpartition(".")[2]: dict(figures) for method, figures in self._figures.items()
        }

    async def _call(self, trip: _Trip, peer: PeerId, indices: tuple[int, ...]) -> None:
        """One call: parts for one peer, answered in any order."""
        waiting = set(indices)
        error: P2PMoEError = RemoteError("the answer ended before this part", peer=peer.short)
        try:
            body, payload = request([trip.asks[index] for index in indices])
            async with self._node.pool.open_call(
                self._contact(peer), trip.method, body, payload, bulk=True
            ) as parts:
                async for part in parts:
                    reply = schema.decode(part.body, PartReply)
                    index = indices[reply.index] if reply.index < len(indices) else -1
                    if index not in waiting:
                        raise MalformedMessage("answer.index", str(reply.index))
                    waiting.remove(index)
                    self._take(trip, index, reply, part.payload)
        except P2PMoEError as failure:
            error = failure
            telemetry.emit("moe.call.failed", peer=peer, error=failure)
            if isinstance(failure, PeerUnreachable | NodeClosed):
                self._forget(uid for uid, known in self._known.items() if known.peer == peer)
        for index in waiting:
            trip.failed(index, error)

    def _take(self, trip: _Trip, index: int, reply: PartReply, payload: memoryview) -> None:
        """One part's answer: its tensors, or why there are none."""
        ask = trip.asks[index]
        try:
            trip.answered(index, read_answer(ask, reply, payload))
        except P2PMoEError as error:
            error.peer, error.expert = ask.peer.short, ask.uid
            trip.failed(index, error)
            if isinstance(error, LeaseLost | ExpertUnavailable):
                self._forget([ask.uid])
                self._watch.poke()

    def _contact(self, peer: PeerId) -> Contact:
        contact = self._node.dht.contact(peer)
        if contact is None and self._watch.current is not None:
            contact = self._watch.current.contacts.get(peer)
        if contact is None:
            raise PeerUnreachable(f"no address of peer {peer} is known", peer=peer.short)
        return contact

    # -------------------------------------------------------------------------------- the view
    async def _follow(self) -> None:
        """Look again whenever the grid was read anew."""
        while True:
            await self._watch.changed()
            self._stir()

    def _stir(self) -> None:
        """Wake whoever waits for something to happen."""
        self._stirred.set()
        self._stirred = trio.Event()

    def _leases(self) -> Mapping[str, LeaseView]:
        """Who serves what, as far as the watch and the searches have found."""
        reading = self._watch.current
        found = self._search.cells(trio.current_time()) if self._search else {}
        return {**(reading.cells if reading else {}), **found}

    def _refresh(self) -> dict[PeerId, dict[str, int]]:
        """Bring the view up to date; of each server, the leases that it has not spoken of."""
        cells: list[Cell] = []
        unknown: dict[PeerId, dict[str, int]] = {}
        reading = self._watch.current
        for uid, lease in self._leases().items():
            known = self._known.get(uid)
            if known and (known.number, known.peer) == (lease.number, lease.peer):
                doubted = reading is not None and lease.peer in reading.doubted
                cells += [replace(known.cell, doubted=doubted)] if known.cell else []
            else:
                unknown.setdefault(lease.peer, {})[uid] = lease.number
        if reading and cells != self._cells:
            self._cells = cells
            self.view = view_of(cells, len(reading.manifest.body.cells))
            self._stir()
        return unknown

    async def _ask_about(self, peer: PeerId, leases: dict[str, int]) -> None:
        """Ask a server, and leave it alone for a while."""
        await self._ask(peer, leases)
        self._asking.discard(peer)
        self._stir()
        await trio.sleep(ASK_AGAIN)
        self._asked.discard(peer)
        self._stir()

    async def _ask(self, peer: PeerId, leases: dict[str, int]) -> None:
        """Ask a server what its experts take."""
        uids = sorted(leases)
        try:
            with trio.move_on_after(ASK_WITHIN):
                for at in range(0, len(uids), MAX_PARTS):
                    body = schema.encode(InfoRequest(uids=tuple(uids[at : at + MAX_PARTS])))
                    part = await self._node.pool.call(self._contact(peer), INFO, body)
                    for info in schema.decode(part.body, InfoReply).experts:
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
        self._stir()


def _has(view: View, uid: str) -> bool:
    return uid in view.uids if uid else bool(view.uids)

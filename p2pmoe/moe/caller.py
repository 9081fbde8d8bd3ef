"""Makes the calls of a pass over a batch: one a peer, or few, all at once.

Answers are taken part by part, and what `Quorum` no longer waits for is cancelled on both sides.
Rows of a part that is late or has failed are asked of the next best expert, if the crossing has a
`Hedge` for them. A backward part whose answer was lost with its connection is asked once more under
the same update id, so that it is applied once. What experts do is told to `Standing`.

Rules: everything here runs in Trio's thread. Failures of peers are counted and returned, part by
part, never raised.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, TypeVar

import trio

from p2pmoe import telemetry
from p2pmoe.dht.directory import GridWatch
from p2pmoe.errors import (
    CallTimeout,
    ConnectionLost,
    ExpertPaused,
    ExpertUnavailable,
    LeaseLost,
    NodeClosed,
    P2PMoEError,
    PeerBusy,
    PeerUnreachable,
    RemoteError,
)
from p2pmoe.experts.messages import BACKWARD, FORWARD, Answer
from p2pmoe.identity import PeerId
from p2pmoe.moe.alone import Alone
from p2pmoe.moe.auditing import Auditor
from p2pmoe.moe.calls import Ask, Crossing, Outcome, Tensors, read_answer, request
from p2pmoe.moe.dispatch import group
from p2pmoe.moe.hedging import Lateness
from p2pmoe.moe.quorum import Quorum
from p2pmoe.moe.standing import Key, Standing, StandingParams
from p2pmoe.moe.stats import Passes
from p2pmoe.node import Node
from p2pmoe.wire import schema
from p2pmoe.wire.peer_record import Contact

T = TypeVar("T")

LATE = "the answer came too late to be waited for"
WHOLE = ""  # in a key, for a server with all its experts


class Book(Protocol):
    """Who serves what, which a caller helps to keep true."""

    def contact(self, peer: PeerId) -> Contact:
        """Where a peer is; `PeerUnreachable` where nobody knows."""
        ...

    def lost(self, peer: PeerId) -> None:
        """A peer could not be reached."""
        ...

    def gone(self, uids: Iterable[str]) -> None:
        """These experts are not where they were."""
        ...

    def stir(self) -> None:
        """Who is asked last may be otherwise now."""
        ...


class _Trip:
    """A crossing on its way: what has come, and until when the rest is waited for."""

    def __init__(
        self,
        crossing: Crossing,
        late: Lateness,
        quorum: Quorum,
        now: float,
        calls: trio.Nursery,
    ) -> None:
        self.method, self.hedge, self.late = crossing.method, crossing.hedge, late
        self.asks = dict(crossing.asks)
        self.outcome = Outcome()
        self.ended = trio.Event()  # every part has its answer, or none
        self.began = now
        self.quorum = quorum
        self.calls = calls  # its deadline is the quorum's
        self._wait()

    def _wait(self) -> None:
        """As long as the quorum says."""
        self.calls.cancel_scope.deadline = self.quorum.next_deadline()

    def took(self, answers: Mapping[int, Tensors], errors: Mapping[int, P2PMoEError]) -> None:
        """Parts have good answers, or no answer, or a bad one."""
        now, outcome = trio.current_time(), self.outcome
        if answers:
            outcome.answers.update(answers)
            self.quorum.answered(answers, now)
        if errors:
            outcome.errors.update(errors)
            self.quorum.failed(errors, now)
        self._wait()
        if len(outcome.answers) + len(outcome.errors) == len(self.asks):
            self.ended.set()


class Caller:
    """The calls of one grid's layers, and what is known of its experts by them."""

    def __init__(self, node: Node, watch: GridWatch, book: Book) -> None:
        self._node, self._grid, self._book = node, watch.name, book
        self.standing = Standing(StandingParams(), random.Random())  # noqa: S311  jitter alone
        self.auditor = Auditor(node, watch, self.standing, random.Random())  # noqa: S311  samples
        self.passes = Passes((FORWARD, BACKWARD))
        self._told = 0  # changes of the standing that the book knows of

    async def cross(self, crossing: Crossing) -> Outcome:
        """Make the calls of a pass, and wait for them as long as its quorum says."""
        now, keys = trio.current_time(), {i: _key(ask) for i, ask in crossing.asks.items()}
        self.standing.asked(keys.values(), now)
        hedged = keys if crossing.hedge is not None else {}
        late = Lateness({i: self.standing.usual(key) for i, key in hedged.items()}, now)
        quorum = Quorum(crossing.rows_of, crossing.rows, crossing.wait, now)
        async with trio.open_nursery() as calls:
            trip = _Trip(crossing, late, quorum, now, calls)
            self._start(trip, crossing.asks)
            if crossing.hedge is not None:
                crossing.hedge.budget.earn(sum(ask.rows for ask in crossing.asks.values()))
                await self._mind(trip)
        self._conclude(crossing, trip)
        return trip.outcome

    def _conclude(self, crossing: Crossing, trip: _Trip) -> None:
        """Nothing more will come."""
        outcome, now = trip.outcome, trio.current_time()
        for index in trip.asks.keys() - outcome.answers.keys() - outcome.errors.keys():
            outcome.errors[index] = CallTimeout(LATE)
            if index in crossing.asks:  # the others had less time than a part gets
                self.standing.missed(_key(trip.asks[index]), now)
        for index, tensors in outcome.answers.items() if crossing.audit else ():
            step = outcome.steps[index]
            self.auditor.saw(trip.asks[index], tensors, step, crossing.audit)
        self.tell()
        outcome.hedged = len(trip.asks) - len(crossing.asks)
        outcome.served = trip.quorum.rows_served
        outcome.seconds, outcome.waited = now - trip.began, trip.quorum.waited(now)
        self._count(crossing, trip, now)

    def _count(self, crossing: Crossing, trip: _Trip, now: float) -> None:
        """Rows of the batch, and rows of parts: of those asked, answered and missed, and why."""
        outcome, rows = trip.outcome, {i: ask.rows for i, ask in trip.asks.items()}
        missed: dict[str, int] = {}
        for index, error in outcome.errors.items():
            missed[error.code] = missed.get(error.code, 0) + rows[index]
        figures = {
            "passes": 1,
            "rows": crossing.rows,
            "rows_served": outcome.served,
            "asked": sum(rows.values()),
            "answered": sum(rows[index] for index in outcome.answers),
            **{f"missed.{code}": count for code, count in missed.items()},
        }
        self.passes.add(crossing.method, figures)
        if crossing.method == BACKWARD:
            taught = [i for i in outcome.answers if not crossing.asks[i].dry_run]
            steps = crossing.steps
            self._learnt(crossing.norm, [(steps.get(i, 0), outcome.steps[i]) for i in taught])
            return
        self.passes.hedged += sum(rows[i] for i in trip.asks.keys() - crossing.asks.keys())
        if crossing.wait.patience:  # else its caller wants to wait for nobody
            self._skipped(crossing.rows, crossing.rows - outcome.served, missed, now)

    def count_alone(self, part: Alone, error: P2PMoEError | None, now: float) -> None:
        """The same for a pass that is one part, of which each row needs one answer."""
        served, rows = int(error is None), part.rows
        missed = {} if error is None else {error.code: rows}
        figures = {"passes": 1, "rows": 1, "rows_served": served, "asked": rows}
        figures["answered"] = rows * served
        self.passes.add(part.method, figures | {f"missed.{code}": rows for code in missed})
        if part.method == BACKWARD:
            self._learnt(0.0, [(0, part.step)] if served and not part.ask.dry_run else [])
        elif part.seconds:
            self._skipped(1, 1 - served, missed, now)

    def _skipped(self, rows: int, skipped: int, missed: Mapping[str, int], now: float) -> None:
        """So many rows of a batch did not get the answers they need."""
        if advice := self.passes.skipped.add(rows, skipped, missed, now):
            share = f"{self.passes.skipped.share:.0%}"
            telemetry.emit(
                "moe.rows.skipped", level="warning", grid=self._grid, share=share, advice=advice
            )

    def _learnt(self, norm: float, taught: Sequence[tuple[int, int]]) -> None:
        """Gradients of this norm were brought, and updates: steps at the forward pass, and now."""
        passes = self.passes
        passes.learning.brought(norm)
        for before, after in taught:
            passes.learning.updated(before, after)
        if taught and passes.others and not passes.told_of_others:
            passes.told_of_others = True
            telemetry.emit(
                "moe.gates.apart",
                level="warning",
                grid=self._grid,
                others=passes.others,
                advice="others train these experts too: gates and dense layers are not shared"
                " between you, so share their state_dict yourselves if you mean to train one model",
            )

    # -------------------------------------------------------------------------------- the calls
    def _start(self, trip: _Trip, asks: Mapping[int, Ask]) -> None:
        for peer, indices in group(asks):
            trip.calls.start_soon(self._call, trip, peer, indices)

    async def _mind(self, trip: _Trip) -> None:
        """Ask others in place of those that are late, until every part has ended."""
        while not trip.ended.is_set():
            with trio.move_on_at(trip.late.next_deadline()):
                await trip.ended.wait()
            self._hedge(trip)

    def _hedge(self, trip: _Trip) -> None:
        """Ask for the rows of the parts that are late now once more, as far as the budget goes."""
        for index in trip.late.late(trio.current_time()):
            if trip.hedge is None or not trip.hedge.budget.take(trip.asks[index].rows):
                continue
            spares = trip.hedge.spares(index)
            asks = {spare.index: spare.ask for spare in spares}
            trip.quorum.asked({spare.index: spare.rows for spare in spares})
            trip.asks |= asks
            self._start(trip, asks)

    async def _call(
        self, trip: _Trip, peer: PeerId, indices: tuple[int, ...], *, again: bool = True
    ) -> None:
        """One call: parts for one peer, answered in any order."""
        waiting = {at: trip.asks[index] for at, index in enumerate(indices)}
        began = trio.current_time()
        error: P2PMoEError = RemoteError("the answer ended before this part", peer=peer.short)
        try:
            body, payload = request(list(waiting.values()))
            async with self._node.pool.open_call(
                self._book.contact(peer), trip.method, body, payload, bulk=True
            ) as parts:
                async for part in parts:
                    answer = schema.decode_again(part.body, Answer)
                    answers, errors = read_answer(waiting, answer, part.payload)
                    now = trio.current_time()
                    seconds = now - began if trip.method == FORWARD else None
                    for at in answers:
                        self.standing.answered(_key(waiting[at]), seconds, now)
                    for at in (*answers, *errors):
                        del waiting[at]
                    trip.outcome.steps |= {indices[one.index]: one.step for one in answer.parts}
                    self._took(trip, _of(indices, answers), _of(indices, errors))
                    if not waiting:  # whatever else might come
                        break
        except P2PMoEError as failure:
            error = failure
            telemetry.emit("moe.call.failed", peer=peer, error=failure)
            if isinstance(failure, PeerUnreachable | NodeClosed):
                self._book.lost(peer)
        if waiting and again and trip.method == BACKWARD and isinstance(error, ConnectionLost):
            await self._call(trip, peer, tuple(indices[at] for at in waiting), again=False)
        elif waiting:
            self._took(trip, {}, {indices[at]: error for at in waiting})

    def _took(
        self, trip: _Trip, answers: Mapping[int, Tensors], errors: Mapping[int, P2PMoEError]
    ) -> None:
        for index in answers:
            trip.late.answered(index)
        if errors:
            self.blame({trip.asks[index]: error for index, error in errors.items()})
            for index in errors:
                trip.late.failed(index)
            self._hedge(trip)  # before its rows are given up
        trip.took(answers, errors)

    # -------------------------------------------------------------------------------- what follows
    def blame(self, errors: Mapping[Ask, P2PMoEError]) -> None:
        """Say whose fault an error was, and remember it; who is gone is not asked again."""
        gone, now = [], trio.current_time()
        for ask, error in errors.items():
            if isinstance(error, LeaseLost | ExpertUnavailable):
                gone.append(ask.uid)
            elif isinstance(error, PeerBusy) and error.retry_after is not None:
                which = ask.uid if isinstance(error, ExpertPaused) else WHOLE
                self.standing.rest((ask.peer, which), error.retry_after, now)
            elif not isinstance(error, PeerUnreachable | NodeClosed):  # the pool knows of those
                self.standing.missed(_key(ask), now)
            error.peer, error.expert = ask.peer.short, ask.uid
        if gone:
            self._book.gone(gone)

    def tell(self) -> None:
        """Let the view follow the standing."""
        if self._told != self.standing.changes:
            self._told = self.standing.changes
            self._book.stir()


def _key(ask: Ask) -> Key:
    return ask.peer, ask.uid


def _of(indices: tuple[int, ...], found: Mapping[int, T]) -> dict[int, T]:
    """By the crossing's indices, what stands by the call's."""
    return {indices[at]: one for at, one in found.items()}

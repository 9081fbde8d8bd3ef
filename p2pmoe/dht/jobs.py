"""Work that outlives the call which began it: one nursery, deadlines, and promises to wait on.

Rules: `Jobs.run` owns every task, and tells work that has none when it is late; whoever waits for a
promise may be cancelled without harm to the work or to the others who wait; when the nursery ends,
every promise is broken with `NodeClosed`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Awaitable, Callable, Hashable, Sequence
from functools import partial
from typing import Generic, NoReturn, Protocol, TypeVar, cast

import trio

from p2pmoe.errors import NodeClosed, P2PMoEError, PeerBusy

T = TypeVar("T")
MOST_WAITING = 1024  # jobs that are handed over before the first may begin; a guess
MOST_RUNNING = 4096  # jobs at once; four times a question to everybody in a swarm of 1,000

Job = Callable[[], Awaitable[object]]
Abandon = Callable[[], None]


class Promise(Generic[T]):
    """A value that comes later, or the error instead of it."""

    __slots__ = ("_told", "error", "over", "value")

    def __init__(self) -> None:
        self.over = False  # whether one of them is there
        self.value: T | None = None
        self.error: P2PMoEError | None = None
        self._told: list[Callable[[], object]] = []

    def keep(self, value: T) -> None:
        """Here is the value; what came first stays."""
        if not self.over:
            self.value = value
            self._end()

    def fail(self, error: P2PMoEError) -> None:
        """There is no value, and this is why; what came first stays."""
        if not self.over:
            self.error = error
            self._end()

    def then(self, tell: Callable[[], object]) -> None:
        """Call this as it ends, or now if it has."""
        if self.over:
            tell()
        else:
            self._told.append(tell)

    async def ended(self) -> None:
        """Wait for the value or the error."""
        if self.over:
            await trio.lowlevel.checkpoint_if_cancelled()
        else:
            waiting = trio.lowlevel.ParkingLot()
            self.then(waiting.unpark_all)
            await waiting.park()

    async def wait(self) -> T:
        """The value, once it is there; raises the error, a copy for each that waits."""
        await self.ended()
        if self.error is not None:
            raise copy.copy(self.error)
        return cast("T", self.value)

    def _end(self) -> None:
        self.over, told, self._told = True, self._told, []
        for tell in told:
            tell()


class Watched(Protocol):
    """Work without a task, which has a deadline."""

    def late(self) -> None:
        """The deadline has come."""

    def abandon(self) -> None:
        """The node ends."""


async def together(asks: Sequence[Callable[[], Awaitable[T]]]) -> list[T]:
    """Ask all of these at once; their results in order, or the first error in that order."""
    results: dict[int, T] = {}
    errors: dict[int, P2PMoEError] = {}

    async def run(at: int, ask: Callable[[], Awaitable[T]]) -> None:
        try:
            results[at] = await ask()
        except P2PMoEError as error:
            errors[at] = error

    async with trio.open_nursery() as running:
        for at, ask in enumerate(asks):
            running.start_soon(run, at, ask)
    if errors:
        raise errors[min(errors)]
    return [results[at] for at in range(len(asks))]


class Jobs:
    """Runs what is handed to it until it is cancelled."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Job, Abandon]] = []
        self._nursery: trio.Nursery | None = None
        self._running = 0
        self._watched: dict[Watched, float] = {}  # deadlines of what has no task
        self._alarm = trio.CancelScope()
        self._ended = False

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Begin every job as it comes. Its end, by cancelling, is the end of all jobs."""
        try:
            await trio.lowlevel.checkpoint()
            async with trio.open_nursery() as self._nursery:
                for job, _ in self._waiting:
                    self._begin(job)
                self._waiting.clear()
                task_status.started()
                try:
                    await self._watch()
                finally:
                    self._nursery = None
        finally:
            self._ended = True
            for _, abandoned in self._waiting:
                abandoned()
            for each in list(self._watched):
                each.abandon()

    def start(self, job: Job, abandoned: Abandon) -> None:
        """Hand a job over. If it is never begun, `abandoned` is called when the node ends.

        Raises `NodeClosed` after the end, `PeerBusy` when too many wait to begin.
        """
        if self._ended:
            raise NodeClosed("the node was closed")
        if len(self._waiting) == MOST_WAITING or self._running == MOST_RUNNING:
            raise PeerBusy(f"{len(self._waiting) or self._running} questions wait here already")
        if self._nursery is None:
            self._waiting.append((job, abandoned))
        else:
            self._begin(job)

    def watch(self, work: Watched, deadline: float) -> None:
        """Tell this work when it is late, until it is forgotten. Raises as `start`."""
        if self._ended:
            raise NodeClosed("the node was closed")
        if len(self._watched) == MOST_RUNNING:
            raise PeerBusy(f"{MOST_RUNNING} questions wait here already")
        self._watched[work] = deadline
        if deadline < self._alarm.deadline:
            self._alarm.deadline = deadline

    def forget(self, work: Watched) -> None:
        """It has ended."""
        self._watched.pop(work, None)

    async def _watch(self) -> NoReturn:
        while True:
            soonest = min(self._watched.values(), default=math.inf)
            with trio.CancelScope(deadline=soonest) as self._alarm:
                await trio.sleep_forever()
            now = trio.current_time()
            for work in [work for work, deadline in self._watched.items() if deadline <= now]:
                self.forget(work)
                work.late()

    def _begin(self, job: Job) -> None:
        assert self._nursery is not None
        self._running += 1
        self._nursery.start_soon(self._do, job)

    async def _do(self, job: Job) -> None:
        try:
            await job()
        finally:
            self._running -= 1


class Flights(Generic[T]):
    """Concurrent equal questions share one answer: the first asks, the others wait with it."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs
        self._flying: dict[Hashable, Promise[T]] = {}  # bounded by the calls in progress

    async def share(
        self,
        key: Hashable,
        ask: Callable[[], Awaitable[T]],
        at_once: Callable[[], Promise[T | None]] | None = None,
    ) -> T:
        """The result of `ask()`, or of the one that is on its way for the same key.

        What may come without a task is tried `at_once`; a value of None means that it takes one.
        """
        promise = self._flying.get(key)
        if promise is None:
            promise = Promise()
            if at_once is None:
                self._begin(key, promise, ask)
            else:
                trying = at_once()
                self._flying[key] = promise
                trying.then(partial(self._tried, key, promise, ask, trying))
        return await promise.wait()

    def _begin(self, key: Hashable, promise: Promise[T], ask: Callable[[], Awaitable[T]]) -> None:
        self._jobs.start(partial(self._fly, key, promise, ask), partial(self._land, key))
        self._flying[key] = promise

    def _tried(
        self,
        key: Hashable,
        promise: Promise[T],
        ask: Callable[[], Awaitable[T]],
        trying: Promise[T | None],
    ) -> None:
        try:
            if trying.error is not None:
                raise trying.error
            if trying.value is None:
                self._begin(key, promise, ask)
                return
            promise.keep(trying.value)
        except P2PMoEError as error:
            promise.fail(error)
        self._land(key)

    async def _fly(
        self, key: Hashable, promise: Promise[T], ask: Callable[[], Awaitable[T]]
    ) -> None:
        try:
            promise.keep(await ask())
        except P2PMoEError as error:
            promise.fail(error)
        finally:
            self._land(key)

    def _land(self, key: Hashable) -> None:
        self._flying.pop(key).fail(NodeClosed("the node was closed"))

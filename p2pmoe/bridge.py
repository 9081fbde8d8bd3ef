"""`Bridge`: any thread may wait for an async call, which a thread with Trio inside makes for it.

A call carries a deadline, and when the waiting thread gives up (a deadline, a KeyboardInterrupt) it
is cancelled in Trio. Calls that come up together, of many threads, are taken together, and those
of one `Desk` are handed to it as they are; each of the others is a task.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol, TypeVar, cast

import trio

from p2pmoe.errors import CallTimeout, LocalProtocolError, NodeClosed
from p2pmoe.node import Node

SLACK = 1.0  # seconds that the background thread may be late before a caller gives up; a guess
TURN = 0.1  # seconds after which a waiting thread looks for an interrupt; what users are promised
CLOSED = "the swarm is closed: connect again"

T = TypeVar("T")
Opening = Callable[[], AbstractAsyncContextManager[Node]]


class Desk(Protocol):
    """Makes calls without a task for each. All of it in Trio's thread, and nothing raises."""

    def begin(self, jobs: Sequence[Job], otherwise: Callable[[Job], None]) -> None:
        """Each of these ends here, or is handed to `otherwise`, which makes a task of it."""
        ...

    def forget(self, job: Job) -> None:
        """Nobody waits for this one any more; perhaps it has ended."""
        ...

    def close(self) -> None:
        """End with `NodeClosed` what has not ended."""
        ...


class Job:
    """A call from another thread, which waits here for its end."""

    __slots__ = ("_ended", "_open", "afn", "answer", "args", "desk", "error", "scope", "seconds")

    def __init__(
        self,
        afn: Callable[..., Awaitable[Any]],
        args: tuple[Any, ...],
        seconds: float,
        desk: Desk | None = None,
        ended: Callable[[Job], object] | None = None,
    ) -> None:
        self.afn, self.args, self.seconds, self.desk = afn, args, seconds, desk
        self.answer: Any = None
        self.error: BaseException | None = None
        self.scope = trio.CancelScope()
        self._ended = ended or Job.let_go
        self._open = threading.Lock()  # held until the end; a tenth of the cost of a Future
        self._open.acquire()

    def end(self, answer: Any, error: BaseException | None = None) -> None:
        """There is an answer, or an error. Said once."""
        self.answer, self.error = answer, error
        self._ended(self)

    def let_go(self) -> None:
        """The waiting thread may go on."""
        self._open.release()

    def wait(self, seconds: float) -> None:
        """Wait for the end; `CallTimeout` after so long.

        In short turns: an interrupt that comes just before a thread falls asleep does not wake it.
        """
        give_up = time.monotonic() + seconds
        while not self._open.acquire(timeout=TURN):
            if time.monotonic() > give_up:
                raise timed_out(seconds)

    def cancel(self) -> None:
        """Nobody waits for it any more. In Trio's thread."""
        self.scope.cancel()
        if self.desk is not None:
            self.desk.forget(self)


class _Ended(trio.abc.Instrument):
    """Jobs that have ended, until a pass of Trio's loop is done: then their threads go on together.

    One that was woken amid the pass would only wait for the interpreter's lock.
    """

    def __init__(self) -> None:
        self._jobs: list[Job] = []
        self.add = self._jobs.append

    def before_io_wait(self, _timeout: float) -> None:
        """A pass is done."""
        for job in self._jobs:
            job.let_go()
        self._jobs.clear()

    def after_run(self) -> None:
        """The last pass is done."""
        self.before_io_wait(0)


class Bridge:
    """Lets any thread wait for an async call. What is no desk's is a child of `serve`."""

    def __init__(self) -> None:
        self._calls: trio.Nursery | None = None  # while calls are taken
        self._desks: set[Desk] = set()
        self._ended = _Ended()
        self._jobs: deque[Job] = deque()  # that wait for Trio's thread to take them
        self._woken = False  # whether it is on its way to them
        self._token: Future[trio.lowlevel.TrioToken] = Future()
        self._thread: int | None = None
        self._life = trio.CancelScope()

    async def live(self, open_it: Opening, opened: Future[Node]) -> None:
        """All that the background thread does: a node, and the calls to it, until `stop`."""
        self._thread = threading.get_ident()
        self._token.set_result(trio.lowlevel.current_trio_token())
        trio.lowlevel.add_instrument(self._ended)
        with self._life:
            async with open_it() as node:
                self._life = trio.CancelScope()  # `stop` ends the serving: the node says goodbye
                with self._life:
                    await self.serve(lambda: opened.set_result(node))

    async def serve(self, started: Callable[[], None]) -> None:
        """Answer calls; when it is cancelled, those that still run end with `NodeClosed`."""
        async with trio.open_nursery() as self._calls:
            try:
                started()
                await trio.sleep_forever()
            finally:
                self._calls = None
                for desk in self._desks:
                    desk.close()

    def call(
        self,
        afn: Callable[..., Awaitable[T]],
        *args: Any,
        seconds: float,
        desk: Desk | None = None,
    ) -> T:
        """Run `afn` in Trio's thread and wait for it, from another thread.

        A `desk` may do the same without it. Raises what `afn` raises, `CallTimeout` after
        `seconds`, or `NodeClosed`.
        """
        if threading.get_ident() == self._thread:
            raise LocalProtocolError("a swarm is called from any thread but its own")
        job = Job(afn, args, seconds, desk, self._ended.add)
        try:
            self._submit(job)
            job.wait(seconds + SLACK)
        except BaseException:  # an interrupt, too: nobody waits for the call any more
            with contextlib.suppress(NodeClosed):
                self._soon(job.cancel)
            raise
        if job.error is not None:
            try:
                raise job.error
            finally:
                del job  # as in `_answer`
        return cast("T", job.answer)

    def stop(self) -> None:
        """End `live`, from any thread."""
        self._soon(lambda: self._life.cancel())

    def _soon(self, function: Callable[..., object], *args: object) -> None:
        try:
            self._token.result().run_sync_soon(function, *args)
        except trio.RunFinishedError:
            raise NodeClosed(CLOSED) from None

    def _submit(self, job: Job) -> None:
        """Have a job taken: of many that come at once, the first one wakes Trio for all."""
        self._jobs.append(job)
        if self._woken:
            return
        try:
            self._woken = True
            self._wake()
        except NodeClosed:
            raise
        except BaseException:  # an interrupt, perhaps before Trio was woken, for which others wait
            self._wake()
            raise

    def _wake(self) -> None:
        try:
            self._soon(self._take)
        except NodeClosed:
            self._woken = False
            for job in self._waiting():  # there will be no pass that lets them go
                job.error = NodeClosed(CLOSED)
                job.let_go()
            raise

    def _waiting(self) -> list[Job]:
        """Those that nobody has taken yet, who has them now."""
        jobs: list[Job] = []
        with contextlib.suppress(IndexError):
            while True:
                jobs.append(self._jobs.popleft())
        return jobs

    def _take(self) -> None:
        self._woken = False
        desks: dict[Desk, list[Job]] = {}
        for job in self._waiting():
            if job.desk is None or self._calls is None:
                self._begin(job)
            else:
                desks.setdefault(job.desk, []).append(job)
        for desk, jobs in desks.items():
            self._desks.add(desk)
            desk.begin(jobs, self._begin)

    def _begin(self, job: Job) -> None:
        """Make a task of a job."""
        if self._calls is None:
            job.end(None, NodeClosed(CLOSED))
        else:
            self._calls.start_soon(self._answer, job)

    async def _answer(self, job: Job) -> None:
        answer: Any = None
        error: Exception | None = NodeClosed(CLOSED)  # if it is cancelled from outside
        job.scope.deadline = trio.current_time() + job.seconds
        try:
            with job.scope:
                answer, error = await job.afn(*job.args), None
            if job.scope.cancelled_caught:
                error = timed_out(job.seconds)
        except Exception as failure:  # noqa: BLE001  the waiting thread gets it, whole
            error = failure
        finally:
            job.end(answer, error)
            del job, error  # what was raised leads to this frame, and must not lead to itself


def timed_out(seconds: float) -> CallTimeout:
    """There was no answer in so many seconds."""
    error = CallTimeout(f"no answer after {seconds:g} s")
    error.elapsed = seconds
    return error

"""The compute thread of a device: it takes batches from the queue and hands the results to Trio.

The thread chooses its next batch itself, at the moment when it is free, so that requests merge as
late as they can; a lock guards the queue, which Trio's thread fills. Measured here, that takes
45 us there and back, `trio.to_thread.run_sync` once a batch 75 us.

Batches of experts that can be computed side by side run as one, a wave. What is said of a batch
here holds for a wave, but that it is nobody's fault when one is late: its experts come back when
it has ended.

A batch that runs cannot be stopped. When all its callers have left, one spare thread goes on with
the queue at once, and requests for its expert wait until the batch has ended. A batch that runs too
long takes its expert out: its callers are told, the spare thread goes on, and the expert comes back
some time after its batch has ended. There is never more than one spare thread, and never a second
batch of an expert beside the first.

Without a thread (`threaded=False`) batches run between the events of Trio's own loop, which is what
tests under a virtual clock need.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import trio

from p2pmoe import telemetry
from p2pmoe.errors import ExpertPaused, P2PMoEError, PeerBusy, RemoteError
from p2pmoe.experts.batching import Batching, BatchingParams, Waiting
from p2pmoe.experts.busy import BusyShare

STOP_LIMIT = 5.0  # seconds a thread has to finish its batch when the node closes; a guess
PENALTY = 2.0  # an expert stays out for so many times what its batch took; a guess
PACE_WEIGHT = 0.125  # of the latest batch in what a request takes; RFC 6298, section 2
SOON = 0.05  # seconds after which to ask a full queue again at the earliest; a guess

Job = TypeVar("Job", bound=Waiting)
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeParams:
    """How a device is run. Times in seconds."""

    batching: BatchingParams = BatchingParams()  # noqa: RUF009  frozen
    batch_limit: float = 10.0  # after which a batch's expert is taken out; a guess
    threaded: bool = True


class _Worker(Generic[Job]):
    """One thread: the batch that it runs, for whom, and whether another has taken its place."""

    def __init__(self) -> None:
        self.batch: list[Job] = []
        self.awaited: set[int] = set()  # numbers in the batch that were not cancelled
        self.started = math.inf  # when the batch was begun
        self.late = self.replaced = False
        self.stop = trio.CancelScope(shield=True)  # its deadline is set when the node closes

    @property
    def uids(self) -> set[str]:
        """The experts that it runs."""
        return {job.uid for job in self.batch}

    @property
    def deserted(self) -> bool:
        """Whether it works for nobody."""
        return bool(self.batch) and not self.awaited


class Compute(Generic[Job, Answer]):
    """Runs batches with `execute`, which answers one for one; `deliver` gets these in Trio."""

    def __init__(
        self,
        execute: Callable[[list[Job], float], Sequence[Answer | P2PMoEError]],
        deliver: Callable[[list[tuple[Job, Answer | P2PMoEError]]], None],
        params: ComputeParams,
    ) -> None:
        self._execute, self._deliver, self._params = execute, deliver, params
        self._queue: Batching[Job] = Batching(params.batching)
        self._changed = threading.Condition()  # guards the queue and what stands below
        self._closing = False
        self._workers: list[_Worker[Job]] = []  # at most two; the last one takes from the queue
        self._out: dict[str, float] = {}  # experts taken out, until when
        self._finished: deque[tuple[Job, Answer | P2PMoEError]] = deque()
        self._now: Callable[[], float] = trio.current_time
        self._busy = BusyShare(trio.current_time())
        self.work = {"batches": 0, "computed_us": 0, "waited_us": 0}  # since it began
        self._pace = 0.0  # seconds that one request takes of late
        self._wake = trio.Event()  # used without threads
        self._look = trio.Event()  # used with threads: one may need another in its place

    def __len__(self) -> int:
        """Requests that wait."""
        return len(self._queue)

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing runs."""
        return not len(self._queue) and not any(worker.batch for worker in self._workers)

    def load(self) -> tuple[int, int]:
        """Thousandths of its time that it computes, and how many more requests it would take."""
        free = self._params.batching.max_waiting - len(self._queue)
        return round(1000 * self._busy.share(trio.current_time())), max(0, free)

    def submit(self, jobs: Iterable[Job]) -> None:
        """Queue requests; those for which there is no room are delivered as `PeerBusy`."""
        now = trio.current_time()
        with self._changed:
            for job in jobs:
                busy = self._why_not(job, now)
                if busy is not None:
                    self._finished.append((job, busy))
            self._changed.notify()
        self._wake.set()
        self._hand_back()

    def cancel(self, numbers: Iterable[int]) -> int:
        """Take requests back; returns how many of them had not been begun."""
        taken_back = 0
        with self._changed:
            for number in numbers:
                taken_back += self._queue.cancel(number)
                for worker in self._workers:
                    worker.awaited.discard(number)
            if any(worker.deserted for worker in self._workers):
                self._look.set()
        return taken_back

    def refuse(self, uid: str, error: P2PMoEError) -> None:
        """Answer all that waits for one expert with an error."""
        with self._changed:
            self._drop(uid, error)
        self._hand_back()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run batches until cancelled; then wait for the one that is under way."""
        clock = trio.lowlevel.current_clock()
        self._now = clock.current_time  # what a foreign thread may call
        if not self._params.threaded:
            task_status.started()
            await self._run_here()
        async with trio.open_nursery() as threads:
            self._start_worker(threads)
            task_status.started()
            try:
                await self._watch(threads)
            finally:
                with self._changed:
                    self._closing = True
                    self._changed.notify_all()
                for worker in self._workers:
                    worker.stop.deadline = trio.current_time() + STOP_LIMIT

    # -------------------------------------------------------------- in Trio's thread
    def _why_not(self, job: Job, now: float) -> PeerBusy | None:
        """Queue a request, or say why it cannot be, and until when."""
        if now < self._out.get(job.uid, -math.inf):
            return self._paused(job.uid, self._out[job.uid] - now)
        self._out.pop(job.uid, None)
        if self._queue.add(job):
            return None
        busy = PeerBusy("too many requests wait here")
        busy.retry_after = max(SOON, self._pace * len(self._queue) / 2)
        return busy

    def _paused(self, uid: str, seconds: float) -> ExpertPaused:
        """An expert is out for so long, or as long as its batch will still take."""
        paused = ExpertPaused(f"{uid} is taken out: a batch of it takes too long")
        paused.retry_after = self._params.batch_limit if math.isinf(seconds) else seconds
        return paused

    def _drop(self, uid: str, error: P2PMoEError) -> None:
        for job in self._queue.waiting_for(uid):
            self._queue.cancel(job.number)
            self._finished.append((job, error))

    def _hand_back(self) -> None:
        """Deliver what is finished. The threads have this called in Trio's thread."""
        finished = [self._finished.popleft() for _ in range(len(self._finished))]
        if finished:
            self._deliver(finished)

    async def _run_here(self) -> None:
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            while batch := self._next():
                self._finished.extend(zip(batch, self._answers(batch), strict=True))
                self._hand_back()
                await trio.lowlevel.checkpoint()

    def _start_worker(self, threads: trio.Nursery) -> None:
        worker: _Worker[Job] = _Worker()
        self._workers.append(worker)
        threads.start_soon(self._thread, worker, trio.lowlevel.current_trio_token())

    async def _thread(self, worker: _Worker[Job], token: trio.lowlevel.TrioToken) -> None:
        with worker.stop:
            await trio.to_thread.run_sync(
                self._work, worker, token, abandon_on_cancel=True, limiter=trio.CapacityLimiter(1)
            )
        self._workers.remove(worker)
        self._look.set()

    async def _watch(self, threads: trio.Nursery) -> None:
        """Take out what runs too long; put the spare thread in the place of one that is lost."""
        while True:
            with trio.move_on_after(self._params.batch_limit / 4):
                await self._look.wait()
            self._look = trio.Event()
            with self._changed:
                oldest = self._workers[0]
                if self._now() - oldest.started > self._params.batch_limit:
                    self._take_out(oldest)
                lost = len(self._workers) == 1 and (oldest.late or oldest.deserted)
                oldest.replaced |= lost
            if lost:
                self._start_worker(threads)
            self._hand_back()

    def _take_out(self, worker: _Worker[Job]) -> None:
        """Answer the callers of a batch that runs too long, and those that wait for its expert."""
        worker.late, worker.started = True, math.inf
        for uid in worker.uids:
            self._out[uid] = math.inf
            error = self._paused(uid, math.inf)
            self._finished.extend((job, error) for job in worker.batch if job.uid == uid)
            self._drop(uid, error)
        telemetry.emit(
            "expert.batch.late",
            level="warning",
            expert=", ".join(sorted(worker.uids)),
            limit_s=self._params.batch_limit,
            advice="lower --max-batch, or look into the expert's module",
        )

    # -------------------------------------------------------------- in the compute thread
    def _work(self, worker: _Worker[Job], token: trio.lowlevel.TrioToken) -> None:
        while True:
            with self._changed:
                while not self._closing and not (batch := self._next()):
                    self._changed.wait()
                if self._closing:
                    return
                worker.batch, worker.awaited = batch, {job.number for job in batch}
                worker.started = begun = self._now()
            answers = self._answers(batch)
            with self._changed:
                worker.batch, worker.started = [], math.inf
                if worker.late:
                    uids = {job.uid for job in batch}
                    now = self._now()
                    again = now + PENALTY * (now - begun) if len(uids) == 1 else now
                    self._out |= dict.fromkeys(uids, again)
                if worker.replaced:
                    self._changed.notify()  # the spare thread may run this expert now
                    return
                self._finished.extend(zip(batch, answers, strict=True))
            try:
                token.run_sync_soon(self._hand_back, idempotent=True)
            except trio.RunFinishedError:
                return

    def _next(self) -> list[Job]:
        """The next wave. Those past their deadline go without an answer: nobody waits for it."""
        self._queue.tick(self._now())
        replaced = (worker.batch for worker in self._workers if worker.replaced)
        return self._queue.next_wave({job.uid for batch in replaced for job in batch})

    def _answers(self, batch: list[Job]) -> Sequence[Any]:
        begun = self._now()
        try:
            return self._execute(batch, begun)
        except Exception as error:  # noqa: BLE001  a device's own errors must not end its thread
            failed = RemoteError(f"{type(error).__name__}: {error}")
            failed.__cause__ = error
            return [failed] * len(batch)
        finally:
            ended = self._now()
            self._busy.worked(begun, ended)
            self.work["batches"] += 1
            self.work["computed_us"] += int((ended - begun) * 1e6)
            self.work["waited_us"] += int((begun - min(job.arrived for job in batch)) * 1e6)
            self._pace += PACE_WEIGHT * ((ended - begun) / len(batch) - self._pace)

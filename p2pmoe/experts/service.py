"""Answers calls for the experts of this server, and hands their work to the compute thread.

A part is checked before a tensor is made of it: the uid is served, the lease number is the one held
now, the tensors fit the expert. What fails, fails that part alone. A part whose call was cancelled
is taken from the queue; if its batch runs already, the result is dropped. Both are counted.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import trio

from p2pmoe import telemetry
from p2pmoe.errors import (
    ConfigurationError,
    ExpertUnavailable,
    LeaseLost,
    P2PMoEError,
    SchemaMismatch,
    printable,
)
from p2pmoe.experts.backend import TrainParams
from p2pmoe.experts.compute import Compute, ComputeParams
from p2pmoe.experts.jobs import (
    Described,
    Done,
    Job,
    Part,
    Result,
    ServedExpert,
    build,
    execute,
    kind_of,
    tensors_of,
)
from p2pmoe.experts.manifest import Offer
from p2pmoe.experts.messages import (
    BACKWARD,
    FORWARD,
    INFO,
    BackwardPart,
    BackwardRequest,
    ExpertInfo,
    ForwardRequest,
    InfoReply,
    InfoRequest,
    PartReply,
    fitting_rows,
)
from p2pmoe.experts.tensors import find_device
from p2pmoe.net.connection import Handler, IncomingCall
from p2pmoe.wire import schema
from p2pmoe.wire.tensor import join, split

DETAIL_LENGTH = 256  # characters of an error's text that travel


class LeaseBook(Protocol):
    """What the service asks of the DHT."""

    def lease_number(self, grid: bytes, uid: str, now: float) -> int | None:
        """The number under which this server holds a uid now; `None` when it does not."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeParams:
    """How a server serves."""

    device: str = "cpu"
    compute: ComputeParams = ComputeParams()  # noqa: RUF009  frozen
    train: TrainParams = TrainParams()  # noqa: RUF009  frozen


class ExpertService:
    """The experts of one device."""

    def __init__(
        self, handlers: dict[str, Handler], leases: LeaseBook, params: ServeParams
    ) -> None:
        self.params = params
        self.device = find_device(params.device)
        self.experts: dict[str, ServedExpert] = {}
        self._leases = leases
        self._numbers = itertools.count()
        self._builders = trio.CapacityLimiter(1)  # one at a time: they share torch's generator
        self._compute: Compute[Job, Done] = Compute(execute, self._deliver, params.compute)
        handlers[INFO] = self._answer_info
        handlers[FORWARD] = self._answer_forward
        handlers[BACKWARD] = self._answer_backward

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Compute until cancelled."""
        await self._compute.run(task_status=task_status)

    async def build(self, offer: Offer, uid: str) -> None:
        """Make an expert with its first weights and serve it, whenever its lease is held."""
        make = partial(build, offer, uid, self.params.train, self.device)
        threaded = self.params.compute.threaded
        self.add(
            await trio.to_thread.run_sync(make, limiter=self._builders) if threaded else make()
        )

    def add(self, expert: ServedExpert) -> None:
        """Serve an expert; `ConfigurationError` when another grid has one of this name."""
        if self.experts.get(expert.uid, expert).grid != expert.grid:
            raise ConfigurationError(f"uid {expert.uid}: a grid of this name is served already")
        self.experts[expert.uid] = expert

    def remove(self, uid: str) -> None:
        """Serve an expert no more; what waits for it is answered with `LeaseLost`."""
        self._compute.refuse(uid, LeaseLost(f"{uid} is served elsewhere now"))
        self.experts.pop(uid, None)

    def load(self) -> tuple[int, int]:
        """How busy the device is in thousandths, and how many more requests it would take."""
        return self._compute.load()

    def section(self) -> Mapping[str, Mapping[str, int | str]]:
        """The figures of each expert, for the node's status."""
        return {uid: self._row(expert) for uid, expert in sorted(self.experts.items())}

    def _row(self, expert: ServedExpert) -> dict[str, int | str]:
        figures = expert.figures
        mean = figures.took / figures.calls if figures.calls else 0.0
        return {
            "calls": figures.calls,
            "rows": figures.rows,
            "updates": expert.backend.step,
            "failed": figures.failed,
            "dropped": figures.dropped,
            "mean_us": int(mean * 1e6),
            "lease": self._lease(expert) or 0,
        }

    def _lease(self, expert: ServedExpert) -> int | None:
        return self._leases.lease_number(expert.grid, expert.uid, trio.current_time())

    # -------------------------------------------------------------- calls
    async def _answer_info(self, call: IncomingCall) -> None:
        asked = schema.decode(call.body, InfoRequest).uids
        known = [self.experts[uid] for uid in dict.fromkeys(asked) if uid in self.experts]
        held = [(expert, lease) for expert in known if (lease := self._lease(expert)) is not None]
        infos = [
            ExpertInfo(
                uid=expert.uid,
                lease=lease,
                step=expert.backend.step,
                max_batch=self.params.compute.batching.max_batch,
                expert_class=expert.expert_class,
                inputs=expert.inputs,
                outputs=expert.outputs,
            )
            for expert, lease in held
        ]
        await call.send(schema.encode(InfoReply(experts=tuple(infos))))

    async def _answer_forward(self, call: IncomingCall) -> None:
        request = schema.decode(call.body, ForwardRequest)
        await self._answer(call, request.parts, [part.tensors for part in request.parts])

    async def _answer_backward(self, call: IncomingCall) -> None:
        request = schema.decode(call.body, BackwardRequest)
        await self._answer(
            call, request.parts, [part.inputs + part.grads for part in request.parts]
        )

    async def _answer(
        self,
        call: IncomingCall,
        parts: Sequence[Part],
        described: Sequence[Described],
    ) -> None:
        """Queue every part that may be computed; answer each as soon as it is known."""
        views = iter(split(call.payload, list(itertools.chain.from_iterable(described))))
        send, receive = trio.open_memory_channel[tuple[Job, Result]](len(parts))
        jobs: list[Job] = []
        refused: list[PartReply] = []
        for index, part in enumerate(parts):
            mine = list(itertools.islice(views, len(described[index])))
            try:
                jobs.append(self._job(call, index, part, mine, send))
            except P2PMoEError as error:
                refused.append(_failure(index, error))
                _count(part, error)
        with send, receive, self._queued(jobs) as outstanding:
            for reply in refused:
                await call.send(schema.encode(reply))
            while outstanding:
                job, result = await receive.receive()
                outstanding.discard(job.number)
                await self._reply(call, job, result)

    @contextmanager
    def _queued(self, jobs: list[Job]) -> Iterator[set[int]]:
        """The jobs are in the queue inside this block; what is left of them after it is dropped."""
        outstanding = {job.number for job in jobs}
        self._compute.submit(jobs)
        try:
            yield outstanding
        finally:
            if outstanding:
                unbegun = self._compute.cancel(outstanding)
                late = len(outstanding) - unbegun
                telemetry.count("p2pmoe_parts_dropped_total", unbegun, when="queued")
                telemetry.count("p2pmoe_parts_dropped_total", late, when="computed")
                for job in jobs:
                    job.expert.figures.dropped += job.number in outstanding

    async def _reply(self, call: IncomingCall, job: Job, result: Result) -> None:
        figures = job.expert.figures
        figures.calls += 1
        figures.took += trio.current_time() - job.arrived
        _count(job.part, result)
        if isinstance(result, P2PMoEError):
            figures.failed += 1
            if result.__cause__ is not None:  # the expert's own failure: its operator should know
                telemetry.emit(
                    "expert.failed", level="warning", expert=job.uid, error=result.__cause__
                )
            await call.send(schema.encode(_failure(job.index, result)))
        else:
            figures.rows += job.rows
            reply = PartReply(index=job.index, tensors=result.tensors, step=result.step)
            await call.send(schema.encode(reply), join(result.tensors, result.buffers))

    @staticmethod
    def _deliver(job: Job, result: Result) -> None:
        """Called for each job that ran; by then nobody may be waiting for it."""
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            job.replies.send_nowait((job, result))

    def _job(
        self,
        call: IncomingCall,
        index: int,
        part: Part,
        views: list[memoryview],
        replies: trio.MemorySendChannel[tuple[Job, Result]],
    ) -> Job:
        """A part as a request for the queue, once everything that it says was checked."""
        expert = self._expert_for(part)
        inputs, grads = tensors_of(part)
        return Job(
            number=next(self._numbers),
            uid=part.uid,
            kind=kind_of(part),
            schema=tuple((tensor.dtype, tensor.shape[1:]) for tensor in inputs + grads),
            rows=self._checked_rows(expert, part),
            client=call.peer,
            arrived=trio.current_time(),
            deadline=trio.current_effective_deadline(),
            index=index,
            part=part,
            expert=expert,
            views=views,
            replies=replies,
        )

    def _expert_for(self, part: Part) -> ServedExpert:
        """The expert that a part is for, if this server holds it under the number named."""
        expert = self.experts.get(part.uid)
        if expert is None:
            raise ExpertUnavailable(f"this peer does not serve {part.uid}")
        held = self._lease(expert)
        if held is None:
            raise LeaseLost(f"this peer does not hold {part.uid} at present")
        if held != part.lease:
            raise LeaseLost(f"the lease of {part.uid} has number {held}, not {part.lease}")
        return expert

    def _checked_rows(self, expert: ServedExpert, part: Part) -> int:
        """How many rows a part has, once its tensors fit the expert."""
        inputs, grads = tensors_of(part)
        rows = fitting_rows(expert.inputs, inputs, "inputs")
        if isinstance(part, BackwardPart) and rows != fitting_rows(
            expert.outputs, grads, "gradients"
        ):
            raise SchemaMismatch("inputs and gradients have different numbers of rows")
        most = self.params.compute.batching.max_batch
        if rows > most:
            raise SchemaMismatch(f"{rows} rows: this server takes {most} at once, split them")
        return rows


def _failure(index: int, error: P2PMoEError) -> PartReply:
    detail = printable(str(error), DETAIL_LENGTH)
    return PartReply(index=index, code=error.code, detail=detail)


def _count(part: Part, result: Result) -> None:
    code = result.code if isinstance(result, P2PMoEError) else "ok"
    telemetry.count("p2pmoe_parts_total", 1, op=kind_of(part).value, result=code)

"""Answers calls for the experts of this server, and hands their work to the compute thread.

A part is checked before a tensor is made of it: the uid is served, the lease number is the one held
now, the tensors fit the expert. What fails, fails that part alone. A part whose call was cancelled
is taken from the queue; if its batch runs already, the result is dropped. Both are counted.

A call has no task: it is begun in the turn that reads it, and answered in those in which the
compute thread hands results back.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import trio

from p2pmoe import telemetry
from p2pmoe.errors import (
    ConfigurationError,
    ExpertUnavailable,
    LeaseLost,
    NonFiniteError,
    P2PMoEError,
    SchemaMismatch,
)
from p2pmoe.experts.accounts import AccountParams, Accounts
from p2pmoe.experts.answering import answers, failures
from p2pmoe.experts.backend import TrainParams
from p2pmoe.experts.batching import Kind
from p2pmoe.experts.compute import Compute, ComputeParams
from p2pmoe.experts.intake import Intake, Part, Request
from p2pmoe.experts.jobs import (
    Asked,
    Done,
    Job,
    Result,
    ServedExpert,
    build,
    deliver,
    execute,
)
from p2pmoe.experts.manifest import Offer
from p2pmoe.experts.messages import (
    BACKWARD,
    FORWARD,
    INFO,
    BackwardRequest,
    ExpertInfo,
    ForwardRequest,
    InfoReply,
    InfoRequest,
)
from p2pmoe.experts.tensors import find_device
from p2pmoe.identity import PeerId
from p2pmoe.net.incoming import Handler, IncomingCall, Prompt
from p2pmoe.wire import schema

MOST_CLIENTS = 16  # that a status tells of; a guess

FAULTS = (SchemaMismatch, NonFiniteError)  # of the caller, who can see what it sends


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
    accounts: AccountParams = AccountParams()  # noqa: RUF009  frozen


class ExpertService:
    """The experts of one device."""

    def __init__(
        self, handlers: dict[str, Handler], leases: LeaseBook, params: ServeParams
    ) -> None:
        self.params = params
        self.device = find_device(params.device)
        self.experts: dict[str, ServedExpert] = {}
        self._leases = leases
        self._accounts = Accounts(params.accounts)
        self._numbers = itertools.count()
        self._builders = trio.CapacityLimiter(1)  # one at a time: they share torch's generator
        self._compute: Compute[Job, Done] = Compute(execute, deliver, params.compute)
        handlers[INFO] = self._answer_info
        handlers[FORWARD] = Prompt(self._begin_forward)
        handlers[BACKWARD] = Prompt(self._begin_backward)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Compute until cancelled."""
        await self._compute.run(task_status=task_status)

    async def make(self, offer: Offer, uid: str) -> ServedExpert:
        """An expert with its first weights; it is not served before it is added."""
        make = partial(build, offer, uid, self.params.train, self.device)
        if not self.params.compute.threaded:
            return make()
        return await trio.to_thread.run_sync(make, limiter=self._builders)

    async def build(self, offer: Offer, uid: str) -> None:
        """Make an expert with its first weights and serve it, whenever its lease is held."""
        self.add(await self.make(offer, uid))

    def add(self, expert: ServedExpert) -> None:
        """Serve an expert; `ConfigurationError` when another grid has one of this name."""
        if self.experts.get(expert.uid, expert).grid != expert.grid:
            raise ConfigurationError(f"uid {expert.uid}: a grid of this name is served already")
        self.experts[expert.uid] = expert

    def remove(self, uid: str) -> None:
        """Serve an expert no more; what waits for it is answered with `LeaseLost`."""
        self._compute.refuse(uid, LeaseLost(f"{uid} is served elsewhere now"))
        self.experts.pop(uid, None)

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing runs."""
        return self._compute.idle

    def load(self) -> tuple[int, int]:
        """How busy the device is in thousandths, and how many more requests it would take."""
        return self._compute.load()

    def section(self) -> Mapping[str, Mapping[str, int | str]]:
        """The figures of each expert, for the node's status."""
        return {uid: self._row(expert) for uid, expert in sorted(self.experts.items())}

    def work(self) -> Mapping[str, Mapping[str, int]]:
        """How long the device computed, and work waited for it, for the node's status."""
        return {self.params.device: dict(self._compute.work)}

    def clients(self) -> Mapping[str, Mapping[str, int | str]]:
        """What became of the parts of those who ask for most, for the node's status."""
        return {
            str(client): {"rows": account.rows, **account.parts}
            for client, account in self._accounts.busiest(MOST_CLIENTS)
        }

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
        trainers = self._accounts.teachers(call.peer, trio.current_time())
        reply = InfoReply(experts=tuple(infos), trainers=trainers)
        await call.send(schema.encode(reply))

    def _begin_forward(self, call: IncomingCall) -> None:
        self._accounts.admit(call.peer, trio.current_time())
        self._begin(call, schema.decode_again(call.body, ForwardRequest))

    def _begin_backward(self, call: IncomingCall) -> None:
        self._accounts.admit(call.peer, trio.current_time())
        self._begin(call, schema.decode(call.body, BackwardRequest))

    def _begin(self, call: IncomingCall, request: Request) -> None:
        """Queue every part that may be computed; those that are known already are answered."""
        intake = Intake(call, request)
        if intake.kind is Kind.BACKWARD:
            self._accounts.admit_updates(call.peer, len(intake.parts), trio.current_time())
        asked = Asked(call, intake.kind, self._settle)
        refused = []
        for index, part in enumerate(intake.parts):
            try:
                job = self._job(intake, index, part, asked)
                asked.outstanding[job.number] = job
            except P2PMoEError as error:
                refused.append((index, error.with_traceback(None)))  # which holds this frame
                asked.faulty |= isinstance(error, FAULTS)
                self._count(call.peer, intake.kind, error, part.rows)
        call.dropped = partial(self._drop, asked)
        if refused:
            call.post(failures(refused))
            call.flush()
        if asked.outstanding:
            self._compute.submit(list(asked.outstanding.values()))
        else:
            self._end(asked)

    def _settle(self, asked: Asked) -> None:
        """Answer the parts that have come; the call ends with the last of them."""
        call = asked.call
        try:
            come = asked.take()
            for job, result in come:
                _note(job, result, trio.current_time())
                self._count(call.peer, asked.kind, result, job.rows)
                asked.faulty |= isinstance(result, FAULTS)
            for body, payload in answers(come):
                call.post(body, payload)
        except Exception as error:  # noqa: BLE001  what is wrong with one call is its own
            self._drop(asked)
            call.finish(error)
            return
        if asked.outstanding:
            call.flush()
        elif come:
            self._end(asked)

    def _end(self, asked: Asked) -> None:
        if asked.faulty:
            self._accounts.faulty(asked.call.peer, trio.current_time())
        asked.call.finish()

    def _job(self, intake: Intake, index: int, part: Part, asked: Asked) -> Job:
        """A part as a request for the queue, once everything that it says was checked."""
        expert = self._expert_for(part)
        intake.check(expert)
        most = self.params.compute.batching.max_batch
        if part.rows > most:
            raise SchemaMismatch(f"{part.rows} rows: this server takes {most} at once, split them")
        return intake.job(next(self._numbers), index, expert, asked)

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

    def _count(self, client: PeerId, kind: Kind, result: Result, rows: int) -> None:
        """A part of this client's has its answer."""
        code, done = (result.code, 0) if isinstance(result, P2PMoEError) else ("ok", rows)
        self._accounts.answered(client, code, done, trio.current_time())
        telemetry.count("p2pmoe_parts_total", 1, op=kind.value, result=code)

    def _drop(self, asked: Asked) -> None:
        """Nobody waits any more for what is outstanding of a call."""
        left = asked.outstanding
        unbegun = self._compute.cancel(left)
        telemetry.count("p2pmoe_parts_dropped_total", unbegun, when="queued")
        telemetry.count("p2pmoe_parts_dropped_total", len(left) - unbegun, when="computed")
        for job in left.values():
            job.expert.figures.dropped += 1
        left.clear()
        if asked.faulty:
            self._accounts.faulty(asked.call.peer, trio.current_time())


def _note(job: Job, result: Result, now: float) -> None:
    """Remember what became of a part."""
    figures = job.expert.figures
    figures.calls += 1
    figures.took += now - job.arrived
    if not isinstance(result, P2PMoEError):
        figures.rows += job.rows
        return
    figures.failed += 1
    if result.__cause__ is not None:  # the expert's own failure: its operator should know
        telemetry.emit("expert.failed", level="warning", expert=job.uid, error=result.__cause__)

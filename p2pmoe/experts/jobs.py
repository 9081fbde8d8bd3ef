"""One part of a call as a request in the queue, and what the compute thread makes of it.

`execute` runs in a foreign thread: experts run, and their answers come to the CPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from p2pmoe.errors import P2PMoEError
from p2pmoe.experts import grouped
from p2pmoe.experts.backend import Backend, Outcome, TrainParams, Update
from p2pmoe.experts.batching import Kind, Waiting
from p2pmoe.experts.blocks import initial_seed
from p2pmoe.experts.grouped import Member
from p2pmoe.experts.manifest import Offer
from p2pmoe.experts.messages import TensorSpec
from p2pmoe.net.incoming import IncomingCall

Tensors = tuple[torch.Tensor, ...]


@dataclass(slots=True)
class Figures:
    """What an expert has done for callers since it was built. Times in seconds."""

    calls: int = 0
    rows: int = 0
    failed: int = 0
    dropped: int = 0  # taken from the queue, or computed for nobody
    took: float = 0.0  # from arrival to answer, all calls together


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ServedExpert:
    """An expert and what is known of it."""

    uid: str
    grid: bytes
    expert_class: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    backend: Backend
    member: Member | None = None  # if it can be computed beside others
    figures: Figures = field(default_factory=Figures)


@dataclass(frozen=True, slots=True)
class Done:
    """What one part's computation came to, on the CPU."""

    tensors: Tensors
    step: int


Result = Done | P2PMoEError


class Asked:
    """A call, its jobs that are `outstanding`, by their numbers, and the results that have come.

    `settle` is told when some have; `faulty` says whether the caller is to blame for one.
    """

    __slots__ = ("call", "come", "faulty", "kind", "outstanding", "settle")

    def __init__(self, call: IncomingCall, kind: Kind, settle: Callable[[Asked], None]) -> None:
        self.call, self.kind, self.settle = call, kind, settle
        self.outstanding: dict[int, Job] = {}
        self.come: list[tuple[Job, Result]] = []
        self.faulty = False

    def take(self) -> list[tuple[Job, Result]]:
        """What has come of the jobs that are outstanding, and no longer are."""
        come, self.come = self.come, []
        left = self.outstanding
        return [one for one in come if left.pop(one[0].number, None) is not None]


def deliver(finished: Iterable[tuple[Job, Result]]) -> None:
    """Tell each call what has come of its jobs."""
    calls: dict[Asked, None] = {}  # in the order of what came
    for job, result in finished:
        job.asked.come.append((job, result))
        calls[job.asked] = None
    for asked in calls:
        asked.settle(asked)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Job(Waiting):
    """A part in the queue: the call's part `index`, its rows of the call's tensors."""

    index: int
    expert: ServedExpert
    inputs: Tensors
    grads: Tensors
    update: bytes
    asked: Asked


def execute(batch: list[Job], now: float) -> list[Result]:
    """Run jobs of one kind, those of one expert side by side; one result each, in their order."""
    outcomes = _beside(batch, now)
    if outcomes is None:
        experts = itertools.groupby(batch, key=lambda job: job.expert)
        outcomes = [outcome for _, jobs in experts for outcome in _alone(list(jobs), now)]
    return [_result(*pair) for pair in zip(batch, outcomes, strict=True)]


def _beside(batch: list[Job], now: float) -> Sequence[Outcome] | None:
    """What experts of one family come to when computed at once; nothing if that cannot be."""
    members = [job.expert.member for job in batch]
    together = [member for member in members if member is not None]
    if len(together) < len(batch) or len(set(together)) == 1:
        return None
    try:
        if batch[0].kind is Kind.FORWARD:
            return grouped.forward(together, [job.inputs for job in batch])
        return grouped.backward(together, [_update(job) for job in batch], now)
    except RuntimeError:  # what torch raises: one by one, each request has an error of its own
        return None


def _alone(batch: list[Job], now: float) -> Sequence[Outcome]:
    """What jobs of one expert come to."""
    backend = batch[0].expert.backend
    if batch[0].kind is Kind.FORWARD:
        return backend.forward([job.inputs for job in batch])
    return backend.backward([_update(job) for job in batch], now)


def build(offer: Offer, uid: str, train: TrainParams, device: torch.device) -> ServedExpert:
    """An expert of an offer with the first weights that follow from its manifest and uid."""
    inputs, outputs = offer.expert_class.specs()
    module = offer.expert_class.build(initial_seed(offer.digest, uid))
    backend = Backend(module, train, device)
    return ServedExpert(
        uid=uid,
        grid=offer.digest,
        expert_class=offer.expert_class.name,
        inputs=inputs,
        outputs=outputs,
        backend=backend,
        member=grouped.member_of(backend),
    )


def _update(job: Job) -> Update:
    """A dry run has nothing to be known again by."""
    key = (job.client, job.update) if job.kind is Kind.BACKWARD else None
    return Update(inputs=job.inputs, grads=job.grads, key=key)


def _result(job: Job, outcome: Outcome) -> Result:
    if isinstance(outcome, P2PMoEError):
        return outcome
    tensors = tuple(one if one.is_cpu else one.cpu() for one in outcome)
    return Done(tensors, job.expert.backend.step)

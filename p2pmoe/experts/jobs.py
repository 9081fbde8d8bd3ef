"""One part of a call as a request in the queue, and what the compute thread makes of it.

What stands here runs in a foreign thread: tensors are made of received bytes, an expert runs, and
its answers become what can be sent.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import trio

from p2pmoe.errors import P2PMoEError
from p2pmoe.experts.backend import Backend, Outcome, TrainParams, Update
from p2pmoe.experts.batching import Kind, Waiting
from p2pmoe.experts.blocks import initial_seed
from p2pmoe.experts.manifest import Offer
from p2pmoe.experts.messages import BackwardPart, ForwardPart, TensorSpec
from p2pmoe.experts.tensors import describe, from_wire, to_wire
from p2pmoe.wire.tensor import TensorDescriptor

Described = tuple[TensorDescriptor, ...]
Part = ForwardPart | BackwardPart


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
    figures: Figures = field(default_factory=Figures)


@dataclass(frozen=True, slots=True)
class Done:
    """What one part's computation came to, ready for the wire."""

    tensors: Described
    buffers: list[memoryview]
    step: int


Result = Done | P2PMoEError


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Job(Waiting):
    """A part in the queue. `views` are the bytes of its tensors, `replies` leads to its call."""

    index: int
    part: Part
    expert: ServedExpert
    views: list[memoryview]
    replies: trio.MemorySendChannel[tuple[Job, Result]]


def kind_of(part: Part) -> Kind:
    """What a part asks for."""
    if isinstance(part, ForwardPart):
        return Kind.FORWARD
    return Kind.DRY_RUN if part.dry_run else Kind.BACKWARD


def tensors_of(part: Part) -> tuple[Described, Described]:
    """The inputs of a part, and its gradients."""
    if isinstance(part, ForwardPart):
        return part.tensors, ()
    return part.inputs, part.grads


def execute(batch: list[Job], now: float) -> list[Result]:
    """Run jobs of one expert and kind together; one result each, in their order."""
    backend = batch[0].expert.backend
    received = [_received(job) for job in batch]
    if batch[0].kind is Kind.FORWARD:
        outcomes = backend.forward([inputs for inputs, _ in received])
    else:
        updates = [
            Update(inputs=inputs, grads=grads, key=_key(job))
            for job, (inputs, grads) in zip(batch, received, strict=True)
        ]
        outcomes = backend.backward(updates, now)
    return [_result(outcome, backend.step) for outcome in outcomes]


def build(offer: Offer, uid: str, train: TrainParams, device: torch.device) -> ServedExpert:
    """An expert of an offer with the first weights that follow from its manifest and uid."""
    inputs, outputs = offer.expert_class.specs()
    return ServedExpert(
        uid=uid,
        grid=offer.digest,
        expert_class=offer.expert_class.name,
        inputs=inputs,
        outputs=outputs,
        backend=Backend(offer.expert_class.build(initial_seed(offer.digest, uid)), train, device),
    )


def _received(job: Job) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    inputs, grads = tensors_of(job.part)
    made = [from_wire(*pair) for pair in zip(inputs + grads, job.views, strict=True)]
    return made[: len(inputs)], made[len(inputs) :]


def _key(job: Job) -> object:
    """By what an update is known again; a dry run by nothing."""
    if isinstance(job.part, ForwardPart) or job.part.dry_run:
        return None
    return job.client, job.part.update


def _result(outcome: Outcome, step: int) -> Result:
    if isinstance(outcome, P2PMoEError):
        return outcome
    described = tuple(describe(tensor) for tensor in outcome)
    return Done(described, [to_wire(tensor) for tensor in outcome], step)

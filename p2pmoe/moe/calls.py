"""What one crossing into Trio carries: parts for experts, and what came back of them.

Only values here: the bytes of a request, and the check of what a peer answers. A peer's answer is
a part of a received payload, so tensors go out of their own memory and come in without a copy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from p2pmoe.errors import MalformedMessage, NonFiniteError, P2PMoEError, SchemaMismatch, from_code
from p2pmoe.experts.messages import (
    BackwardPart,
    BackwardRequest,
    ForwardPart,
    ForwardRequest,
    PartReply,
    TensorSpec,
    fitting_rows,
)
from p2pmoe.experts.tensors import all_finite, describe, from_wire, to_wire
from p2pmoe.identity import PeerId
from p2pmoe.moe.quorum import QuorumParams
from p2pmoe.wire import schema
from p2pmoe.wire.tensor import ALIGNMENT, TensorDescriptor, join, split

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Ask:
    """Rows for one expert, on the CPU, and what its answer must look like.

    With an `update` it is a backward part, and `grads` are the gradients of the expert's outputs.
    """

    peer: PeerId
    uid: str
    lease: int
    inputs: Tensors
    answer: tuple[TensorSpec, ...]
    grads: Tensors = ()
    update: bytes = b""
    dry_run: bool = False

    @property
    def rows(self) -> int:
        """How many."""
        return len(self.inputs[0])

    @property
    def nbytes(self) -> int:
        """What its tensors take in a payload, padding included, at most."""
        return sum(one.nbytes + ALIGNMENT for one in (*self.inputs, *self.grads))


@dataclass(frozen=True, slots=True, eq=False)
class Crossing:
    """All that a pass over a batch asks for: parts by index, and the rows that each is for.

    Parts of one peer stand side by side. `rows` counts the batch, `wait` says how long to wait.
    """

    method: str
    asks: Mapping[int, Ask]
    rows_of: Mapping[int, NDArray[np.int64]]
    rows: int
    wait: QuorumParams


@dataclass(slots=True)
class Outcome:
    """What a crossing brought back: each part is answered, or failed for a reason.

    `served` counts rows with the answers they needed. `waited` are seconds until the last answer
    that a row needed, `seconds` until the end.
    """

    answers: dict[int, Tensors] = field(default_factory=dict)
    errors: dict[int, P2PMoEError] = field(default_factory=dict)
    served: int = 0
    waited: float = 0.0
    seconds: float = 0.0


def request(asks: Sequence[Ask]) -> tuple[bytes, list[memoryview]]:
    """The body and the payload of a call for these parts, all of one direction."""
    tensors = [tensor for ask in asks for tensor in (*ask.inputs, *ask.grads)]
    payload = join([describe(tensor) for tensor in tensors], [to_wire(one) for one in tensors])
    if not asks[0].update:
        forward = [
            ForwardPart(uid=ask.uid, lease=ask.lease, tensors=_described(ask.inputs))
            for ask in asks
        ]
        return schema.encode(ForwardRequest(parts=tuple(forward))), payload
    backward = [
        BackwardPart(
            uid=ask.uid,
            lease=ask.lease,
            update=ask.update,
            inputs=_described(ask.inputs),
            grads=_described(ask.grads),
            dry_run=ask.dry_run,
        )
        for ask in asks
    ]
    return schema.encode(BackwardRequest(parts=tuple(backward))), payload


def read_answer(ask: Ask, reply: PartReply, payload: memoryview) -> Tensors:
    """The tensors of an answer.

    Raises the error that it reports, `NonFiniteError`, or `MalformedMessage` when it is not what
    was asked for: why `answer.shape` or `answer.rows`, or as `wire.tensor`.
    """
    if reply.code:
        raise from_code(reply.code, reply.detail)
    try:
        fitting = not ask.answer or fitting_rows(ask.answer, reply.tensors, "answers") == ask.rows
    except SchemaMismatch as error:
        raise MalformedMessage("answer.shape", f"{ask.uid}: {error}") from None
    if not fitting:
        raise MalformedMessage("answer.rows", f"{ask.uid} has not answered every row")
    pieces = split(payload, reply.tensors)
    tensors = tuple(map(from_wire, reply.tensors, pieces))
    if not all(map(all_finite, tensors)):
        raise NonFiniteError(f"{ask.uid} answered with NaN or infinity")
    return tensors


def spec_of(tensor: torch.Tensor) -> TensorSpec:
    """What a tensor like this one looks like, whatever its rows."""
    described = describe(tensor)
    return TensorSpec(dtype=described.dtype, shape=described.shape[1:])


def _described(tensors: Tensors) -> tuple[TensorDescriptor, ...]:
    return tuple(map(describe, tensors))

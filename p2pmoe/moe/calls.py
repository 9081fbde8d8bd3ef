"""What one crossing into Trio carries: parts for experts, and what came back of them.

Only values here: the bytes of a request, and the check of what a peer answers. A peer's answer is
a part of a received payload, so tensors go out of their own memory and come in without a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from p2pmoe.errors import MalformedMessage, NonFiniteError, P2PMoEError, SchemaMismatch, from_code
from p2pmoe.experts.messages import (
    Answer,
    BackwardPart,
    BackwardRequest,
    ForwardPart,
    ForwardRequest,
    TensorSpec,
    fitting_rows,
)
from p2pmoe.experts.tensors import all_finite, describe, from_wire, rows_to_wire
from p2pmoe.identity import PeerId
from p2pmoe.moe.hedging import HedgeBudget
from p2pmoe.moe.quorum import QuorumParams
from p2pmoe.wire import schema
from p2pmoe.wire.tensor import ALIGNMENT, TensorDescriptor, split

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
        return self.inputs[0].shape[0]  # len() of a tensor takes twenty times as long

    @property
    def nbytes(self) -> int:
        """What its tensors take in a payload, padding included, at most."""
        return sum(one.nbytes + ALIGNMENT for one in (*self.inputs, *self.grads))


@dataclass(frozen=True, slots=True, eq=False)
class Spare:
    """A part that is asked in place of another one: its index, and the rows that it is for."""

    index: int
    ask: Ask
    rows: NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Hedge:
    """How the rows of a late part are asked for again: `spares` says what to ask in its place."""

    budget: HedgeBudget
    spares: Callable[[int], Sequence[Spare]]


@dataclass(frozen=True, slots=True, eq=False)
class Crossing:
    """All that a pass over a batch asks for: parts by index, and the rows that each is for.

    Parts of one peer stand side by side. `rows` counts the batch, `wait` says how long to wait.
    For backward, `steps` are the updates that each part's expert had when it answered forward, and
    `norm` is that of all gradients.
    """

    method: str
    asks: Mapping[int, Ask]
    rows_of: Mapping[int, NDArray[np.int64]]
    rows: int
    wait: QuorumParams
    hedge: Hedge | None = None
    audit: float = 0.0  # share of the answers to compute again
    steps: Mapping[int, int] = field(default_factory=dict)
    norm: float = 0.0


@dataclass(slots=True)
class Outcome:
    """What a crossing brought back: each part is answered, or failed for a reason.

    `steps` are the updates that the expert of each answer has had. `hedged` counts parts asked in
    place of others, `served` rows with the answers they needed. `waited` are seconds until the last
    answer that a row needed, `seconds` until the end.
    """

    answers: dict[int, Tensors] = field(default_factory=dict)
    errors: dict[int, P2PMoEError] = field(default_factory=dict)
    steps: dict[int, int] = field(default_factory=dict)
    hedged: int = 0
    served: int = 0
    waited: float = 0.0
    seconds: float = 0.0


def request(asks: Sequence[Ask]) -> tuple[bytes, list[memoryview]]:
    """The body and the payload of a call for these parts, all of one direction and kind."""
    given = [(*ask.inputs, *ask.grads) for ask in asks]
    tensors, payload = rows_to_wire(list(zip(*given, strict=True)))
    return body_of(asks, tensors), payload


def body_of(asks: Sequence[Ask], tensors: tuple[TensorDescriptor, ...]) -> bytes:
    """The body of such a call; `tensors` have the rows of all parts."""
    if not asks[0].update:
        forward = [ForwardPart(uid=ask.uid, lease=ask.lease, rows=ask.rows) for ask in asks]
        return schema.encode_again(ForwardRequest(parts=tuple(forward), inputs=tensors))
    backward = [
        BackwardPart(uid=ask.uid, lease=ask.lease, rows=ask.rows, update=ask.update) for ask in asks
    ]
    count = len(asks[0].inputs)
    body = BackwardRequest(
        parts=tuple(backward),
        inputs=tensors[:count],
        grads=tensors[count:],
        dry_run=asks[0].dry_run,
    )
    return schema.encode(body)


def read_answer(
    asks: Mapping[int, Ask], answer: Answer, payload: memoryview
) -> tuple[dict[int, Tensors], dict[int, P2PMoEError]]:
    """What an answer brought for these parts of a call, by index: tensors, or why there are none.

    Tensors that are not what was asked for fail the parts that they are for: why `answer.shape`
    or `answer.rows`, or as `wire.tensor`. Raises as `parts_of`.
    """
    good, errors = parts_of(asks, answer)
    try:
        answers, finite = _tensors_of({index: asks[index] for index in good}, answer, payload)
    except MalformedMessage as bad:
        return {}, errors | {index: MalformedMessage(bad.why, bad.detail) for index in good}
    for index in () if finite else good:
        if not all(map(all_finite, answers[index])):
            del answers[index]
            errors[index] = NonFiniteError(f"{asks[index].uid} answered with NaN or infinity")
    return answers, errors


def parts_of(asked: Container[int], answer: Answer) -> tuple[list[int], dict[int, P2PMoEError]]:
    """Which of these parts an answer has tensors for, and why there are none for others.

    Raises `MalformedMessage` with why `answer.index` when it speaks of others, or twice of one.
    """
    errors: dict[int, P2PMoEError] = {}
    good: list[int] = []
    for part in answer.parts:
        if part.index not in asked or part.index in errors or part.index in good:
            raise MalformedMessage("answer.index", str(part.index))
        if part.code:
            hint = answer.retry_after_ms / 1000 if answer.retry_after_ms else None
            errors[part.index] = from_code(part.code, part.detail, retry_after=hint)
        else:
            good.append(part.index)
    return good, errors


def _tensors_of(
    asks: Mapping[int, Ask], answer: Answer, payload: memoryview
) -> tuple[dict[int, Tensors], bool]:
    """Each part's rows of the tensors of an answer, and whether all of them are finite."""
    rows = [ask.rows for ask in asks.values()]
    for specs in {ask.answer for ask in asks.values()}:
        check_shape(specs, answer, sum(rows))
    whole = list(map(from_wire, answer.tensors, split(payload, answer.tensors)))
    columns = [torch.split(tensor, rows) if len(rows) > 1 else (tensor,) for tensor in whole]
    pieces = zip(*columns, strict=True) if columns else [()] * len(rows)
    return dict(zip(asks, pieces, strict=True)), all(map(all_finite, whole))


def check_shape(specs: tuple[TensorSpec, ...], answer: Answer, rows: int) -> None:
    """Refuse an answer that does not have so many rows of what was asked for, as `read_answer`."""
    try:
        fitting = not specs or fitting_rows(specs, answer.tensors, "answers") == rows
    except SchemaMismatch as error:
        raise MalformedMessage("answer.shape", str(error)) from None
    if not fitting:
        raise MalformedMessage("answer.rows", f"{rows} rows were asked for")


def spec_of(tensor: torch.Tensor) -> TensorSpec:
    """What a tensor like this one looks like, whatever its rows."""
    described = describe(tensor)
    return TensorSpec(dtype=described.dtype, shape=described.shape[1:])

"""One call for experts as it came in: what its parts share, and each part's rows.

What is wrong with the call as a whole breaks the protocol; what is wrong with a part is its own.
"""

from __future__ import annotations

import torch
import trio

from p2pmoe.errors import SchemaMismatch
from p2pmoe.experts.batching import Kind
from p2pmoe.experts.jobs import Asked, Job, ServedExpert, Tensors
from p2pmoe.experts.messages import (
    BackwardPart,
    BackwardRequest,
    ForwardPart,
    ForwardRequest,
    TensorSpec,
    check_rows,
    fitting_rows,
)
from p2pmoe.experts.tensors import from_wire
from p2pmoe.net.incoming import IncomingCall
from p2pmoe.wire.tensor import split

Request = ForwardRequest | BackwardRequest
Part = ForwardPart | BackwardPart
Takes = tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]  # what an expert takes, and gives


class Intake:
    """A call's parts on their way to the queue.

    Raises `MalformedMessage` when its payload or its tensors are not as long as its parts say.
    """

    def __init__(self, call: IncomingCall, request: Request) -> None:
        self.parts: tuple[Part, ...] = request.parts
        self.kind = _kind_of(request)
        self._inputs = request.inputs
        self._grads = request.grads if isinstance(request, BackwardRequest) else ()
        described = self._inputs + self._grads
        check_rows(self.parts, described)
        self._schema = tuple((tensor.dtype, tensor.shape[1:]) for tensor in described)
        self._client = call.peer.raw  # hashed often, and faster than an id
        self._arrived, self._deadline = trio.current_time(), call.deadline
        self._fitting: dict[Takes, SchemaMismatch | None] = {}  # of the experts asked for
        rows = [part.rows for part in self.parts]
        whole = map(from_wire, described, split(call.payload, described))
        columns = [torch.split(tensor, rows) if len(rows) > 1 else (tensor,) for tensor in whole]
        pieces = zip(*columns, strict=True) if columns else [()] * len(rows)
        self._rows: list[Tensors] = list(pieces)

    def check(self, expert: ServedExpert) -> None:
        """Raise `SchemaMismatch` when the call's tensors are not what this expert takes."""
        specs = expert.inputs, expert.outputs
        if specs not in self._fitting:
            self._fitting[specs] = self._misfit(*specs)
        if (misfit := self._fitting[specs]) is not None:
            raise misfit

    def job(self, number: int, index: int, expert: ServedExpert, asked: Asked) -> Job:
        """A part as a request for the queue."""
        part, tensors = self.parts[index], self._rows[index]
        return Job(
            number=number,
            uid=part.uid,
            kind=self.kind,
            schema=self._schema,
            rows=part.rows,
            client=self._client,
            arrived=self._arrived,
            deadline=self._deadline,
            family=expert.member and expert.member.family,
            index=index,
            expert=expert,
            inputs=tensors[: len(self._inputs)],
            grads=tensors[len(self._inputs) :],
            update=part.update if isinstance(part, BackwardPart) else b"",
            asked=asked,
        )

    def _misfit(
        self, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]
    ) -> SchemaMismatch | None:
        try:
            fitting_rows(inputs, self._inputs, "inputs")
            if self.kind is not Kind.FORWARD:
                fitting_rows(outputs, self._grads, "gradients")
        except SchemaMismatch as error:
            return error
        return None


def _kind_of(request: Request) -> Kind:
    if isinstance(request, ForwardRequest):
        return Kind.FORWARD
    return Kind.DRY_RUN if request.dry_run else Kind.BACKWARD

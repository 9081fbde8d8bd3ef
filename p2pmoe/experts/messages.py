"""What is said between callers and experts: `expert.info`, `expert.forward`, `expert.backward`.

A call is made of parts, one an expert, and of tensors whose rows are those of its parts, in their
order: whatever the parts share is said once. An answer says the same of the parts that were ready
together. A part that fails harms no other.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Annotated

import msgspec

from p2pmoe.errors import MalformedMessage, SchemaMismatch, printable
from p2pmoe.wire.schema import U32, U64, Bytes16, Message, Text24, Text64, Text256
from p2pmoe.wire.tensor import MAX_DIMENSION, MAX_DIMENSIONS, TensorDescriptor

INFO = "expert.info"
FORWARD = "expert.forward"
BACKWARD = "expert.backward"

MAX_PARTS = 64  # parts of one call, or of one answer
FITS = 256  # of tensors and specs that are remembered; a guess
MAX_TENSORS = 8  # tensors of a call, inputs and gradients counted apart

Tensors = Annotated[tuple[TensorDescriptor, ...], msgspec.Meta(max_length=MAX_TENSORS)]
Size = Annotated[int, msgspec.Meta(ge=1, le=MAX_DIMENSION)]
Rows = Size
Sizes = Annotated[tuple[Size | None, ...], msgspec.Meta(max_length=MAX_DIMENSIONS - 1)]


class TensorSpec(Message, frozen=True, kw_only=True):
    """What an expert takes or gives: `shape` without the rows; null where any size will do."""

    dtype: Text24
    shape: Sizes


Specs = Annotated[tuple[TensorSpec, ...], msgspec.Meta(max_length=MAX_TENSORS)]


def fitting_rows(
    specs: Sequence[TensorSpec], tensors: Sequence[TensorDescriptor], what: str
) -> int:
    """How many rows these tensors have, once they fit; `SchemaMismatch` says which does not."""
    return _fitting_rows(tuple(specs), tuple(tensors), what)


@lru_cache(FITS)
def _fitting_rows(
    specs: tuple[TensorSpec, ...], tensors: tuple[TensorDescriptor, ...], what: str
) -> int:
    if len(tensors) != len(specs):
        raise SchemaMismatch(f"{len(specs)} {what} are needed, not {len(tensors)}")
    for spec, tensor in zip(specs, tensors, strict=True):
        if tensor.dtype != spec.dtype:
            raise SchemaMismatch(f"{what} are of {spec.dtype}, not {printable(tensor.dtype)}")
        if not _fits(spec, tensor):
            need = ["rows", *("any" if size is None else str(size) for size in spec.shape)]
            raise SchemaMismatch(f"{what} are [{', '.join(need)}], not {list(tensor.shape)}")
    rows = {tensor.shape[0] for tensor in tensors}
    if len(rows) != 1 or rows == {0}:
        raise SchemaMismatch(f"{what} need one number of rows above 0, not {sorted(rows)}")
    return rows.pop()


def _fits(spec: TensorSpec, tensor: TensorDescriptor) -> bool:
    return len(tensor.shape) == 1 + len(spec.shape) and all(
        size > 0 if wanted is None else size == wanted
        for size, wanted in zip(tensor.shape[1:], spec.shape, strict=True)
    )


class InfoRequest(Message, frozen=True, kw_only=True):
    """Ask about experts by uid."""

    uids: Annotated[tuple[Text64, ...], msgspec.Meta(max_length=MAX_PARTS)]


class ExpertInfo(Message, frozen=True, kw_only=True):
    """An expert that this peer serves now. `step` counts the updates applied to it."""

    uid: Text64
    lease: U64
    step: U64
    max_batch: U32
    expert_class: Text64
    inputs: Specs
    outputs: Specs


class InfoReply(Message, frozen=True, kw_only=True):
    """Those of the experts asked for that this peer serves.

    `trainers` counts the other callers that brought it updates lately.
    """

    experts: Annotated[tuple[ExpertInfo, ...], msgspec.Meta(max_length=MAX_PARTS)]
    trainers: U32 = 0


class ForwardPart(Message, frozen=True, kw_only=True, array_like=True):
    """Rows for one expert. `lease` is the number under which the caller knows its server."""

    uid: Text64
    lease: U64
    rows: Rows


class ForwardRequest(Message, frozen=True, kw_only=True):
    """Compute outputs; nothing is kept for a backward pass."""

    parts: Annotated[tuple[ForwardPart, ...], msgspec.Meta(min_length=1, max_length=MAX_PARTS)]
    inputs: Tensors


class BackwardPart(Message, frozen=True, kw_only=True, array_like=True):
    """The same rows again, and the gradients of the expert's outputs.

    `update` is unique among the caller's updates: u64be epoch, then u64be counter. The server
    applies each at most once.
    """

    uid: Text64
    lease: U64
    rows: Rows
    update: Bytes16


class BackwardRequest(Message, frozen=True, kw_only=True):
    """Compute input gradients, and update the experts; a `dry_run` changes nothing."""

    parts: Annotated[tuple[BackwardPart, ...], msgspec.Meta(min_length=1, max_length=MAX_PARTS)]
    inputs: Tensors
    grads: Tensors
    dry_run: bool = False


class PartReply(Message, frozen=True, kw_only=True, array_like=True):
    """What became of the part at `index`. `code` is empty, or names the error of `detail`.

    `step` counts the updates applied to the expert.
    """

    index: Annotated[int, msgspec.Meta(ge=0, lt=MAX_PARTS)]
    step: U64
    code: Text24
    detail: Text256


class Answer(Message, frozen=True, kw_only=True):
    """Parts that are ready, each answered once. `tensors` have the rows of those without a code.

    For backward, they are the gradients of the inputs that have one, in order. Where parts are
    busy or paused, `retry_after_ms` says how long to leave those alone; 0 says nothing.
    """

    parts: Annotated[tuple[PartReply, ...], msgspec.Meta(min_length=1, max_length=MAX_PARTS)]
    tensors: Tensors = ()
    retry_after_ms: U32 = 0


def check_rows(parts: Sequence[ForwardPart | BackwardPart], tensors: Tensors) -> None:
    """Refuse a call whose tensors do not have the rows of its parts: `expert.rows`."""
    rows = sum(part.rows for part in parts)
    if any(tensor.shape[:1] != (rows,) for tensor in tensors):
        raise MalformedMessage("expert.rows", f"the parts have {rows} rows")

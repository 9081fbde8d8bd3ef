"""What is sent for parts that are ready: as few answers as their tensors allow.

Parts whose tensors differ in more than rows, or are too long together, get answers of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch

from p2pmoe.errors import P2PMoEError, PeerBusy, printable
from p2pmoe.experts.jobs import Done, Job, Result
from p2pmoe.experts.messages import Answer, PartReply
from p2pmoe.experts.tensors import rows_to_wire
from p2pmoe.wire import schema
from p2pmoe.wire.tensor import ALIGNMENT, MAX_TENSOR_BYTES

DETAIL_LENGTH = 256  # characters of an error's text that travel
MOST_HINT_MS = 3_600_000  # an hour, within which a caller should look again; a guess

Message = tuple[bytes, list[memoryview]]  # body and payload


def failures(errors: Iterable[tuple[int, P2PMoEError]]) -> bytes:
    """What is said of parts that failed, and of when to ask again."""
    parts, hint = [], 0.0
    for index, error in errors:
        detail = printable(str(error), DETAIL_LENGTH)
        parts.append(PartReply(index=index, step=0, code=error.code, detail=detail))
        if isinstance(error, PeerBusy) and error.retry_after is not None:
            hint = max(hint, error.retry_after)
    hint_ms = min(MOST_HINT_MS, math.ceil(1000 * min(hint, MOST_HINT_MS)))
    return schema.encode(Answer(parts=tuple(parts), retry_after_ms=hint_ms))


def answers(come: Iterable[tuple[Job, Result]]) -> Iterator[Message]:
    """The answers to parts of one call."""
    failed: list[tuple[int, P2PMoEError]] = []
    alike: dict[object, list[tuple[Job, Done]]] = {}
    for job, result in come:
        if isinstance(result, P2PMoEError):
            failed.append((job.index, result))
        else:
            kind = tuple((one.dtype, one.shape[1:]) for one in result.tensors)
            alike.setdefault(kind, []).append((job, result))
    if failed:
        yield failures(failed), []
    for done in alike.values():
        yield from map(_answer, _short_enough(done))


def _short_enough(done: list[tuple[Job, Done]]) -> Iterator[list[tuple[Job, Done]]]:
    together: list[tuple[Job, Done]] = []
    size = 0
    for job, result in done:
        needed = sum(tensor.nbytes + ALIGNMENT for tensor in result.tensors)
        if together and size + needed > MAX_TENSOR_BYTES:
            yield together
            together, size = [], 0
        together.append((job, result))
        size += needed
    yield together


def _answer(done: Sequence[tuple[Job, Done]]) -> Message:
    parts = tuple(
        PartReply(index=job.index, step=result.step, code="", detail="") for job, result in done
    )
    columns: Iterable[Sequence[torch.Tensor]] = zip(*(one.tensors for _, one in done), strict=True)
    tensors, payload = rows_to_wire(list(columns))
    return schema.encode_again(Answer(parts=parts, tensors=tensors)), payload

"""Tensors on the wire: their descriptors, and where each lies in a payload. No torch here.

A payload is the raw little-endian bytes of its tensors one behind the other, each beginning at a
multiple of 64 bytes, zeros in between. Everything that a descriptor says is checked before
anything is allocated for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated

import msgspec

from p2pmoe.errors import MalformedMessage
from p2pmoe.wire.schema import Message, Text24

DTYPES = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float64": 8,
    "int64": 8,
    "int32": 4,
    "uint8": 1,
    "bool": 1,
}  # bytes an element
CODECS = frozenset({"none"})
ALIGNMENT = 64  # bytes; a cache line
MAX_DIMENSIONS = 8
MAX_DIMENSION = 2**24  # elements along one dimension
MAX_TENSOR_BYTES = 64 * 1024 * 1024
LAYOUTS = 256  # that are remembered; a guess

Dimension = Annotated[int, msgspec.Meta(ge=0, le=MAX_DIMENSION)]


class TensorDescriptor(Message, frozen=True, kw_only=True):
    """A tensor without its bytes. `shape` counts elements, outermost dimension first."""

    dtype: Text24
    shape: Annotated[tuple[Dimension, ...], msgspec.Meta(max_length=MAX_DIMENSIONS)]
    codec: Text24 = "none"

    def check(self) -> TensorDescriptor:
        """Itself, if it is one that may exist; `MalformedMessage` with why `tensor.*` else."""
        if self.dtype not in DTYPES:
            raise MalformedMessage("tensor.dtype", self.dtype)
        if self.codec not in CODECS:
            raise MalformedMessage("tensor.codec", self.codec)
        if len(self.shape) > MAX_DIMENSIONS or any(
            not 0 <= size <= MAX_DIMENSION for size in self.shape
        ):
            raise MalformedMessage("tensor.shape", str(self.shape))
        if self.nbytes > MAX_TENSOR_BYTES:
            raise MalformedMessage("tensor.too_long", f"{self.nbytes} bytes")
        return self

    @property
    def nbytes(self) -> int:
        """Bytes in the payload, without padding."""
        return math.prod(self.shape) * DTYPES[self.dtype]


@dataclass(frozen=True, slots=True)
class Layout:
    """Where tensors lie in a payload: the offset of each, and the payload's length. Bytes."""

    offsets: tuple[int, ...]
    total: int


def layout(descriptors: Sequence[TensorDescriptor]) -> Layout:
    """Check every descriptor and lay them out; raises as `TensorDescriptor.check`."""
    return _layout(tuple(descriptors))


@lru_cache(LAYOUTS)
def _layout(descriptors: tuple[TensorDescriptor, ...]) -> Layout:
    offsets, end = [], 0
    for descriptor in descriptors:
        start = -(-end // ALIGNMENT) * ALIGNMENT
        offsets.append(start)
        end = start + descriptor.check().nbytes
    return Layout(tuple(offsets), end)


def split(payload: memoryview, descriptors: Sequence[TensorDescriptor]) -> list[memoryview]:
    """One view of the payload a tensor; the payload must be exactly as long as they say."""
    plan = layout(descriptors)
    if plan.total != len(payload):
        raise MalformedMessage("tensor.length", f"{len(payload)} bytes, not {plan.total}")
    return [
        payload[offset : offset + descriptor.nbytes]
        for offset, descriptor in zip(plan.offsets, descriptors, strict=True)
    ]


def join(
    descriptors: Sequence[TensorDescriptor], buffers: Sequence[memoryview]
) -> list[memoryview]:
    """What to send for these tensors: their own memory, with zeros between them."""
    for descriptor, buffer in zip(descriptors, buffers, strict=True):
        if buffer.nbytes != descriptor.nbytes:
            raise ValueError(f"a buffer of {buffer.nbytes} bytes for {descriptor.nbytes}")
    return join_pieces(descriptors, [[buffer] for buffer in buffers])


def join_pieces(
    descriptors: Sequence[TensorDescriptor], columns: Sequence[Sequence[memoryview]]
) -> list[memoryview]:
    """The same where a tensor's rows stand in several buffers, which have its bytes together."""
    payload: list[memoryview] = []
    end = 0
    offsets = layout(descriptors).offsets
    for offset, descriptor, pieces in zip(offsets, descriptors, columns, strict=True):
        if offset > end:
            payload.append(memoryview(bytes(offset - end)))
        payload += pieces
        end = offset + descriptor.nbytes
    return payload

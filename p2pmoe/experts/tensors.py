"""Tensors to and from the wire, without a copy where the memory allows it.

A received tensor is a view of the payload that it came in, and a tensor is sent from its own
memory: neither may be written to while it is on its way. Only CPU memory is sent or received.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import torch

from p2pmoe.errors import ConfigurationError, SchemaMismatch
from p2pmoe.wire.tensor import DTYPES, TensorDescriptor, join_pieces

if sys.byteorder != "little":  # pragma: no cover
    raise ImportError("tensors travel little-endian, and so must this machine")

TORCH_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPES}
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def find_device(name: str) -> torch.device:
    """The device of this name, such as `cpu` or `cuda:1`, once a tensor was made on it.

    Raises `ConfigurationError` when this machine, or this build of torch, does not have it.
    """
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA asserts
        reason = str(error).partition("\n")[0]
        raise ConfigurationError(f"device {name!r}: {reason}") from error


def dtype_name(dtype: torch.dtype) -> str:
    """How a dtype is called on the wire; `SchemaMismatch` when it does not travel."""
    if dtype not in _NAMES:
        raise SchemaMismatch(f"tensors of {dtype} do not travel: use one of {', '.join(DTYPES)}")
    return _NAMES[dtype]


def describe(tensor: torch.Tensor) -> TensorDescriptor:
    """What the wire says of a tensor; `SchemaMismatch` for a dtype that does not travel."""
    return TensorDescriptor(dtype=dtype_name(tensor.dtype), shape=tuple(tensor.shape))


def from_wire(descriptor: TensorDescriptor, payload: memoryview) -> torch.Tensor:
    """A tensor over a part of a received payload, which `wire.tensor.split` has measured."""
    dtype = TORCH_DTYPES[descriptor.dtype]
    if not payload.nbytes:
        return torch.empty(descriptor.shape, dtype=dtype)
    if payload.readonly:  # torch has no read-only tensors
        payload = memoryview(bytearray(payload))
    flat = torch.frombuffer(payload, dtype=dtype)
    return flat if len(descriptor.shape) == 1 else flat.view(descriptor.shape)


def to_wire(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor: its own memory where it is contiguous and on the CPU."""
    if tensor.requires_grad or not tensor.is_cpu or not tensor.is_contiguous():
        tensor = tensor.detach().to("cpu").contiguous()
    if not tensor.numel():
        return memoryview(b"")
    if tensor.dtype is torch.bfloat16:  # numpy does not know it
        tensor = tensor.view(torch.int16)
    return tensor.numpy().data.cast("B")


def rows_to_wire(
    columns: Sequence[Sequence[torch.Tensor]],
) -> tuple[tuple[TensorDescriptor, ...], list[memoryview]]:
    """What the wire says of each column, its pieces' rows behind each other, and the payload.

    Pieces that lie behind each other in memory are sent as one. They may differ in rows alone.
    """
    described = tuple(map(_describe_rows, columns))
    views = [list(map(to_wire, _joined(pieces))) for pieces in columns]
    return described, join_pieces(described, views)


def _describe_rows(pieces: Sequence[torch.Tensor]) -> TensorDescriptor:
    rows = sum(piece.shape[0] for piece in pieces)
    return TensorDescriptor(dtype=dtype_name(pieces[0].dtype), shape=(rows, *pieces[0].shape[1:]))


def _joined(pieces: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """The same rows as one view, if they are rows of one tensor, side by side."""
    if len(pieces) == 1:
        return pieces
    first, end = pieces[0], pieces[0].data_ptr()
    owner = first._base
    for piece in pieces:
        if piece._base is not owner or piece.data_ptr() != end or not piece.is_contiguous():
            return pieces
        end += piece.nbytes
    if owner is None:
        return pieces
    rows = sum(piece.shape[0] for piece in pieces)
    return [first.as_strided((rows, *first.shape[1:]), first.stride())]


def together(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    """The rows of all pieces behind each other; a view where they lie so already."""
    joined = _joined(pieces)
    return joined[0] if len(joined) == 1 else torch.cat(tuple(joined))


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite."""
    if not tensor.is_floating_point():
        return True
    # A NaN or an infinity makes the sum one too; only a sum that overflowed needs a closer look.
    return math.isfinite(tensor.sum().item()) or bool(torch.isfinite(tensor).all())

"""An expert's whole state as the bytes of a file, and back, bit for bit.

The state is copied while no update is under way, which takes as long as copying the memory; what
comes after that stops nobody. Everything here blocks: a `Disk` does it in a thread. What is read
may come from anybody and is checked whole before a weight is touched. There is no pickle in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, cast

import torch
import trio
from safetensors import SafetensorError
from safetensors.torch import load, save

from p2pmoe.dht.messages import SnapshotRecord
from p2pmoe.errors import NonFiniteError, SnapshotRefused, printable
from p2pmoe.experts.archive import MEMORY, Facts, Layout, Slot, check_header, check_size
from p2pmoe.experts.backend import Backend
from p2pmoe.experts.tensors import all_finite

Result = TypeVar("Result")

_NAMES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16",
    torch.int32: "I32", torch.int64: "I64", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float32: "F32", torch.float64: "F64",
}  # fmt: skip


class Disk:
    """One thread for what blocks on files; without threads, Trio's own, as tests need it."""

    def __init__(self, *, threaded: bool = True) -> None:
        self._threaded, self._limiter = threaded, trio.CapacityLimiter(1)

    async def run(self, work: Callable[..., Result], *args: object) -> Result:
        """What `work` returns or raises. It is not interrupted: a file is written whole or not."""
        if self._threaded:
            return await trio.to_thread.run_sync(partial(work, *args), limiter=self._limiter)
        await trio.lowlevel.checkpoint()
        return work(*args)


@dataclass(frozen=True, slots=True)
class Packed:
    """A file's bytes, its hash, and how many updates are in it."""

    data: bytes
    hash: bytes
    step: int


def layout_of(backend: Backend) -> Layout:
    """The tensors that a snapshot of this expert has."""
    state = backend.module.state_dict()
    slots = {name: _slot(tensor) for name, tensor in state.items()}
    return Layout(slots, frozenset(_trained(backend)))


def pack(backend: Backend) -> Packed:
    """An expert as it is now; `NonFiniteError` when that is not worth keeping."""
    with backend.lock:
        facts, tensors = _copy(backend)
    if not all(map(all_finite, tensors.values())):
        raise NonFiniteError("weights or what the optimiser remembers are not all finite")
    data = save(tensors, facts.metadata())
    return Packed(data, hashlib.sha256(data).digest(), facts.step)


def unpack(backend: Backend, data: bytes, record: SnapshotRecord) -> Facts:
    """Give an expert the state of a file; `SnapshotRefused` says why it keeps the one it has.

    The memory of another optimiser than the expert's own is left out.
    """
    layout = layout_of(backend)
    check_size(len(data), layout)
    if len(data) != record.bytes or hashlib.sha256(data).digest() != record.hash:
        raise SnapshotRefused("hash", f"these {len(data)} bytes are not those that were signed")
    facts = check_header(memoryview(data), layout)
    if facts.step != record.step:
        raise SnapshotRefused("header", f"it has step {facts.step}, signed was {record.step}")
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise SnapshotRefused("header", printable(str(error))) from None
    if not all(map(all_finite, tensors.values())):
        raise SnapshotRefused("finite", "not every number in it is finite")
    with backend.lock:
        _restore(backend, facts, tensors)
    return facts


def _copy(backend: Backend) -> tuple[Facts, dict[str, torch.Tensor]]:
    tensors = {
        f"weights/{name}": _clone(tensor) for name, tensor in backend.module.state_dict().items()
    }
    params = backend.params
    for name, weight in _trained(backend).items():
        memory = backend.optimizer.state.get(weight, {})
        for key in MEMORY[params.optimizer] if memory else ():
            tensors[f"memory/{key}/{name}"] = _clone(memory[key])
    numbers = params.lr, params.warmup, params.clip_grad_norm
    return Facts(backend.step, cast("Any", params.optimizer), *numbers), tensors


def _restore(backend: Backend, facts: Facts, tensors: dict[str, torch.Tensor]) -> None:
    state = {name: tensors[f"weights/{name}"] for name in backend.module.state_dict()}
    backend.module.load_state_dict(state)
    backend.step = facts.step
    if facts.optimizer != backend.params.optimizer:
        return
    memory = {
        index: {key: tensors[f"memory/{key}/{name}"] for key in MEMORY[facts.optimizer]}
        for index, name in enumerate(_trained(backend))
        if f"memory/exp_avg/{name}" in tensors
    }
    backend.optimizer.load_state_dict({"state": memory})


def _trained(backend: Backend) -> dict[str, torch.nn.Parameter]:
    """The weights of the optimiser, in its order."""
    named = backend.module.named_parameters()
    return {name: weight for name, weight in named if weight.requires_grad}


def _slot(tensor: torch.Tensor) -> Slot:
    return Slot(_NAMES[tensor.dtype], tuple(tensor.shape))


def _clone(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()

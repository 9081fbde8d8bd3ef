"""Experts that have learned something, and their files and statements, for tests."""

from __future__ import annotations

from collections.abc import Callable

import torch

from p2pmoe.dht.messages import SnapshotRecord
from p2pmoe.experts.backend import Backend, TrainParams, Update
from p2pmoe.experts.blocks import ExpertClass
from p2pmoe.experts.snapshot import Packed, pack
from p2pmoe.identity import KeyPair
from p2pmoe.wire.envelope import Kind, Signed, seal

NETWORK = bytes(32)
OWNER = KeyPair.from_seed(bytes(32))
GRID = bytes(range(32))
SMALL = ExpertClass(name="ffn", hidden_dim=2, options={"inner_dim": "2"})


def backend(optimizer: str = "adam", expert_class: ExpertClass = SMALL, **train: object) -> Backend:
    params = TrainParams(optimizer=optimizer, **train)  # type: ignore[arg-type]  # of several types
    return Backend(expert_class.build(bytes(32)), params, torch.device("cpu"))


def learn(expert: Backend, steps: int = 1) -> Backend:
    """Let it learn from numbers that depend on its step alone."""
    for _ in range(steps):
        chance = torch.Generator().manual_seed(expert.step)
        like = next(iter(expert.module.parameters()))
        rows, grads = (
            torch.randn(3, like.shape[-1], generator=chance).to(like.dtype) for _ in range(2)
        )
        key = ("teacher", expert.step.to_bytes(16, "big"))
        expert.backward([Update(inputs=[rows], grads=[grads], key=key)], 0.0)
    return expert


def weights(expert: Backend) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in expert.module.state_dict().values()]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(one, other, strict=True))


def statement(
    packed: Packed, *, uid: str = "ffn.0.0", lease: int = 1, keys: KeyPair = OWNER, **facts: object
) -> Signed[SnapshotRecord]:
    body: dict[str, object] = {
        "grid": GRID,
        "uid": uid,
        "lease": lease,
        "step": packed.step,
        "saved_ms": 1_700_000_000_000 + packed.step,
        "hash": packed.hash,
        "bytes": len(packed.data),
    }
    record = SnapshotRecord(**(body | facts))  # type: ignore[arg-type]  # of several types
    return seal(keys, record, kind=Kind.SNAPSHOT, network=NETWORK)


def file_of(steps: int = 1, change: Callable[[Backend], None] | None = None) -> Packed:
    """The file of an expert that has learned so often."""
    expert = learn(backend(), steps)
    if change is not None:
        change(expert)
    return pack(expert)

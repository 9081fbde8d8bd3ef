"""Calls as a server sees them, without a network, and a server that holds its leases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import trio

from p2pmoe.dht.messages import Manifest
from p2pmoe.experts.backend import TrainParams
from p2pmoe.experts.batching import BatchingParams
from p2pmoe.experts.blocks import ExpertClass
from p2pmoe.experts.compute import ComputeParams
from p2pmoe.experts.manifest import Offer, manifest_of, offer_for
from p2pmoe.experts.messages import (
    BACKWARD,
    FORWARD,
    BackwardPart,
    BackwardRequest,
    ForwardPart,
    ForwardRequest,
    PartReply,
)
from p2pmoe.experts.service import ExpertService, ServeParams
from p2pmoe.experts.tensors import describe, from_wire, to_wire
from p2pmoe.experts.uid import Grid
from p2pmoe.identity import KeyPair, PeerId
from p2pmoe.wire import schema
from p2pmoe.wire.envelope import Kind, Signed, seal
from p2pmoe.wire.tensor import join, split

NETWORK = bytes(32)
OWNER = KeyPair.from_seed(bytes(32))
LEASE = 5  # the number under which the tests' server holds its uids


def client(number: int) -> PeerId:
    return PeerId(bytes([number]) * 32)


CLIENT = client(1)


def manifest(
    grid: str = "ffn.[0:4].[0:4]", expert_class: ExpertClass | None = None
) -> Signed[Manifest]:
    chosen = expert_class or ExpertClass(name="ffn", hidden_dim=4, options={"inner_dim": "8"})
    body = manifest_of(Grid.parse(grid), chosen, created_ms=1_700_000_000_000)
    return seal(OWNER, body, kind=Kind.MANIFEST, network=NETWORK)


def offer(count: int = 4, **manifest_facts: object) -> Offer:
    return offer_for(manifest(**manifest_facts), count)  # type: ignore[arg-type]  # passed on


@dataclass
class Leases:
    """Every uid is held under one number, but for those that a test takes away."""

    number: int = LEASE
    lost: set[str] = field(default_factory=set)

    def lease_number(self, grid: bytes, uid: str, now: float) -> int | None:
        return None if uid in self.lost else self.number


@dataclass
class FakeCall:
    """An incoming call. `parts` collects what the server sends."""

    method: str
    body: bytes
    payload: memoryview
    peer: PeerId = CLIENT
    parts: list[tuple[bytes, memoryview]] = field(default_factory=list)

    async def send(self, body: bytes, payload: Sequence[memoryview] = ()) -> None:
        await trio.lowlevel.checkpoint()
        self.parts.append((body, memoryview(bytearray(b"".join(payload)))))

    @property
    def replies(self) -> dict[int, tuple[PartReply, list[torch.Tensor]]]:
        found = {}
        for body, payload in self.parts:
            reply = schema.decode(body, PartReply)
            assert reply.index not in found, "one answer a part"
            views = split(payload, reply.tensors)
            tensors = [from_wire(*pair) for pair in zip(reply.tensors, views, strict=True)]
            found[reply.index] = (reply, tensors)
        return found

    @property
    def codes(self) -> list[str]:
        return [self.replies[index][0].code for index in sorted(self.replies)]


def payload_of(tensors: Sequence[torch.Tensor]) -> memoryview:
    described = [describe(tensor) for tensor in tensors]
    return memoryview(bytearray(b"".join(join(described, [to_wire(one) for one in tensors]))))


def forward(*parts: tuple[str, torch.Tensor], peer: int = 1, lease: int = LEASE) -> FakeCall:
    asked = tuple(
        ForwardPart(uid=uid, lease=lease, tensors=(describe(tensor),)) for uid, tensor in parts
    )
    body = schema.encode(ForwardRequest(parts=asked))
    return FakeCall(FORWARD, body, payload_of([tensor for _, tensor in parts]), client(peer))


def backward(
    *parts: tuple[str, torch.Tensor, torch.Tensor],
    peer: int = 1,
    counter: int = 0,
    dry_run: bool = False,
    lease: int = LEASE,
) -> FakeCall:
    asked = tuple(
        BackwardPart(
            uid=uid,
            lease=lease,
            update=bytes(8) + (counter + index).to_bytes(8, "big"),
            inputs=(describe(inputs),),
            grads=(describe(grads),),
            dry_run=dry_run,
        )
        for index, (uid, inputs, grads) in enumerate(parts)
    )
    body = schema.encode(BackwardRequest(parts=asked))
    tensors = [tensor for _, *both in parts for tensor in both]
    return FakeCall(BACKWARD, body, payload_of(tensors), client(peer))


class Server:
    """A service without a network, whose batches run in Trio's thread."""

    def __init__(self, *, threaded: bool = False, max_batch: int = 16, **train: object) -> None:
        self.leases, self.handlers = Leases(), {}
        params = ServeParams(
            compute=ComputeParams(
                batching=BatchingParams(max_batch=max_batch), threaded=threaded, batch_limit=60.0
            ),
            train=TrainParams(**{"optimizer": "sgd", "lr": 0.1, **train}),  # type: ignore[arg-type]  # of several types
        )
        self.service = ExpertService(self.handlers, self.leases, params)

    async def open(self, parts: trio.Nursery, *uids: str, **offer_facts: object) -> Server:
        await parts.start(self.service.run)
        for uid in uids:
            await self.service.build(offer(**offer_facts), uid)
        return self

    async def answer(self, call: FakeCall) -> FakeCall:
        await self.handlers[call.method](call)
        return call

    def module(self, uid: str) -> torch.nn.Module:
        return self.service.experts[uid].backend.module

"""Calls as a server sees them, without a network, and a server that holds its leases."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
import trio

from p2pmoe.dht.messages import Manifest
from p2pmoe.experts.accounts import AccountParams
from p2pmoe.experts.backend import TrainParams
from p2pmoe.experts.batching import BatchingParams
from p2pmoe.experts.blocks import ExpertClass
from p2pmoe.experts.compute import ComputeParams
from p2pmoe.experts.manifest import Offer, manifest_of, offer_for
from p2pmoe.experts.messages import (
    BACKWARD,
    FORWARD,
    Answer,
    BackwardPart,
    BackwardRequest,
    ForwardPart,
    ForwardRequest,
    PartReply,
)
from p2pmoe.experts.service import ExpertService, ServeParams
from p2pmoe.experts.tensors import from_wire, rows_to_wire
from p2pmoe.experts.uid import Grid
from p2pmoe.identity import KeyPair, PeerId
from p2pmoe.net.incoming import Prompt
from p2pmoe.wire import schema
from p2pmoe.wire.envelope import Kind, Signed, seal
from p2pmoe.wire.tensor import split

NETWORK = bytes(32)
OWNER = KeyPair.from_seed(bytes(32))
LEASE = 5  # the number under which the tests' server holds its uids


def client(number: int) -> PeerId:
    return PeerId(bytes([number]) * 32)


CLIENT = client(1)
ANY_NUMBER = AccountParams()  # of updates, as far as tests go


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
    dropped: Callable[[], object] = list
    error: Exception | None = None
    over: trio.Event = field(default_factory=trio.Event)

    @property
    def deadline(self) -> float:
        return trio.current_effective_deadline()

    async def send(self, body: bytes, payload: Sequence[memoryview] = ()) -> None:
        await trio.lowlevel.checkpoint()
        self.post(body, payload)

    def post(self, body: bytes, payload: Sequence[memoryview] = ()) -> None:
        assert not self.over.is_set()
        self.parts.append((body, memoryview(bytearray(b"".join(payload)))))

    def flush(self) -> None: ...

    def finish(self, error: Exception | None = None) -> None:
        assert not self.over.is_set(), "ended once"
        self.error, self.dropped = error, list
        self.over.set()

    @property
    def replies(self) -> dict[int, tuple[PartReply, list[torch.Tensor]]]:
        return read_replies(self, self.parts)

    @property
    def codes(self) -> list[str]:
        return [self.replies[index][0].code for index in sorted(self.replies)]


def rows_of(call: FakeCall) -> list[int]:
    request = ForwardRequest if call.method == FORWARD else BackwardRequest
    return [part.rows for part in schema.decode(call.body, request).parts]


def read_replies(
    call: FakeCall, answers: Iterable[tuple[bytes, memoryview]]
) -> dict[int, tuple[PartReply, list[torch.Tensor]]]:
    """What became of each part of a call, and its tensors."""
    rows, found = rows_of(call), {}
    for body, payload in answers:
        answer = schema.decode(body, Answer)
        good = [reply.index for reply in answer.parts if not reply.code]
        whole = map(from_wire, answer.tensors, split(payload, answer.tensors))
        pieces = zip(*(one.split([rows[index] for index in good]) for one in whole), strict=True)
        tensors = dict(zip(good, map(list, pieces), strict=bool(answer.tensors)))
        for reply in answer.parts:
            assert reply.index not in found, "one answer a part"
            found[reply.index] = (reply, tensors.get(reply.index, []))
    return found


def joined(columns: Sequence[Sequence[torch.Tensor]]) -> tuple[tuple, memoryview]:
    described, pieces = rows_to_wire(columns)
    return described, memoryview(bytearray(b"".join(pieces)))


def forward(*parts: tuple[str, torch.Tensor], peer: int = 1, lease: int = LEASE) -> FakeCall:
    asked = tuple(ForwardPart(uid=uid, lease=lease, rows=len(rows)) for uid, rows in parts)
    described, payload = joined([[rows for _, rows in parts]])
    body = schema.encode(ForwardRequest(parts=asked, inputs=described))
    return FakeCall(FORWARD, body, payload, client(peer))


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
            rows=len(inputs),
            update=bytes(8) + (counter + index).to_bytes(8, "big"),
        )
        for index, (uid, inputs, _) in enumerate(parts)
    )
    columns = [[inputs for _, inputs, _ in parts], [grads for *_, grads in parts]]
    (inputs, grads), payload = joined(columns)
    request = BackwardRequest(parts=asked, inputs=(inputs,), grads=(grads,), dry_run=dry_run)
    return FakeCall(BACKWARD, schema.encode(request), payload, client(peer))


class Server:
    """A service without a network, whose batches run in Trio's thread."""

    def __init__(
        self,
        *,
        threaded: bool = False,
        max_batch: int = 16,
        accounts: AccountParams = ANY_NUMBER,
        **train: object,
    ) -> None:
        self.leases, self.handlers = Leases(), {}
        params = ServeParams(
            compute=ComputeParams(
                batching=BatchingParams(max_batch=max_batch), threaded=threaded, batch_limit=60.0
            ),
            train=TrainParams(**{"optimizer": "sgd", "lr": 0.1, **train}),  # type: ignore[arg-type]  # of several types
            accounts=accounts,
        )
        self.service = ExpertService(self.handlers, self.leases, params)

    async def open(self, parts: trio.Nursery, *uids: str, **offer_facts: object) -> Server:
        await parts.start(self.service.run)
        for uid in uids:
            await self.service.build(offer(**offer_facts), uid)
        return self

    async def answer(self, call: FakeCall) -> FakeCall:
        handler = self.handlers[call.method]
        if isinstance(handler, Prompt):
            call.over, call.error = trio.Event(), None
            handler.begin(call)
            try:
                await call.over.wait()
            except trio.Cancelled:
                call.dropped()
                raise
            if call.error is not None:
                raise call.error
        else:
            await handler(call)
        return call

    def module(self, uid: str) -> torch.nn.Module:
        return self.service.experts[uid].backend.module

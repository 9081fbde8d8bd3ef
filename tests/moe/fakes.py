"""A swarm whose servers are plain modules: the client half is real, but for sockets and the DHT."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import trio
import trio.testing
from torch import nn

from p2pmoe.bridge import Opening
from p2pmoe.dht.leases import LeaseView
from p2pmoe.dht.messages import Manifest, TensorSchema
from p2pmoe.dht.service import PrefixView
from p2pmoe.errors import LeaseLost, P2PMoEError, PeerUnreachable, QuorumNotReached
from p2pmoe.experts.messages import (
    FORWARD,
    Answer,
    BackwardRequest,
    ExpertInfo,
    ForwardRequest,
    InfoReply,
    InfoRequest,
    PartReply,
    TensorSpec,
)
from p2pmoe.experts.tensors import dtype_name, from_wire, rows_to_wire
from p2pmoe.experts.uid import Grid
from p2pmoe.identity import PeerId
from p2pmoe.swarm import Swarm, start_swarm
from p2pmoe.wire import schema
from p2pmoe.wire.address import Address
from p2pmoe.wire.peer_record import Contact
from p2pmoe.wire.tensor import split

NAME = "ffn"
LEASE = 7


def done(index: int) -> PartReply:
    """A part that went well."""
    return PartReply(index=index, step=0, code="", detail="")


def peer(number: int) -> PeerId:
    return PeerId(number.to_bytes(32, "big"))


@dataclass
class Asked:
    """A part of a request, and its rows."""

    request: Any
    part: Any
    tensors: list[torch.Tensor]


@dataclass
class Expert:
    """A module of one expert, how it answers, and what was asked of it."""

    module: nn.Module
    peer: PeerId
    max_batch: int = 1000
    delay: float = 0.0
    error: P2PMoEError | None = None
    spoil: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor
    lease: int = LEASE
    asked: threading.Event = field(default_factory=threading.Event)
    rows: list[int] = field(default_factory=list)
    updates: list[bytes] = field(default_factory=list)
    dry_runs: int = 0

    def forward(self, asked: Asked) -> Sequence[torch.Tensor]:
        self.rows.append(asked.part.rows)
        with torch.no_grad():
            out = self.module(*asked.tensors)
        return [self.spoil(one) for one in (out if isinstance(out, tuple) else (out,))]

    async def take_time(self, asked: Asked) -> None:
        """Wait before it answers."""
        await trio.sleep(self.delay)

    def backward(self, asked: Asked) -> Sequence[torch.Tensor]:
        self.dry_runs += asked.request.dry_run
        self.updates.append(asked.part.update)
        count = len(asked.request.inputs)
        inputs = [
            one.clone().requires_grad_(one.is_floating_point()) for one in asked.tensors[:count]
        ]
        with torch.enable_grad():
            out = self.module(*inputs)
        out = out if isinstance(out, tuple) else (out,)
        differentiable = [one for one in inputs if one.requires_grad]
        grads = torch.autograd.grad(out, differentiable, asked.tensors[count:])
        return [self.spoil(one) for one in grads]


@dataclass
class Part:
    body: bytes
    payload: memoryview


class Pool:
    """Calls of experts that live here. A dead peer refuses, a resting one is not asked."""

    def __init__(self, experts: dict[str, Expert], specs: tuple) -> None:
        self.experts, self.specs = experts, specs
        self.dead: set[PeerId] = set()
        self.resting: set[PeerId] = set()
        self.calls: list[tuple[str, PeerId, int]] = []
        self.cancelled = 0
        self.trainers = 0  # others, as servers say
        self.talkative = False  # whether servers speak of each other's experts
        self.silent: set[str] = set()  # experts whose part is never answered
        self.endless = False  # whether servers never say that this was all
        self.reply: Callable[[Answer], Answer] = lambda answer: answer

    def usable(self, to: PeerId) -> bool:
        return to not in self.resting

    async def call(self, to: Contact, method: str, body: bytes) -> Part:
        await trio.lowlevel.checkpoint()
        asked = schema.decode(body, InfoRequest).uids
        self._dial(to.peer, method, len(asked))
        told = self.experts if self.talkative else asked
        infos = tuple(
            self._info(uid) for uid in told if self.talkative or self.experts[uid].peer == to.peer
        )
        reply = InfoReply(experts=infos, trainers=self.trainers)
        return Part(schema.encode(reply), memoryview(b""))

    def _info(self, uid: str) -> ExpertInfo:
        one = self.experts[uid]
        specs = dict(zip(("inputs", "outputs"), self.specs, strict=True))
        return ExpertInfo(
            uid=uid, lease=one.lease, step=0, max_batch=one.max_batch, expert_class="x", **specs
        )

    def _dial(self, to: PeerId, method: str, parts: int) -> None:
        self.calls.append((method, to, parts))
        if to in self.dead:
            raise PeerUnreachable("connection refused", stage="connect")

    def open_connection(self, to: Contact, *, bulk: bool) -> Any:
        """There is none that is open."""
        return None

    @asynccontextmanager
    async def open_call(
        self, to: Contact, method: str, body: bytes, payload: Any = (), *, bulk: bool = False
    ) -> AsyncIterator[AsyncIterator[Part]]:
        assert bulk
        request = schema.decode(body, ForwardRequest if method == FORWARD else BackwardRequest)
        self._dial(to.peer, method, len(request.parts))
        every = request.inputs if method == FORWARD else (*request.inputs, *request.grads)
        tensors = map(from_wire, every, split(memoryview(bytearray(b"".join(payload))), every))
        rows = [part.rows for part in request.parts]
        own = list(zip(*(tensor.split(rows) for tensor in tensors), strict=True))
        send, receive = trio.open_memory_channel[Part](len(rows))
        async with trio.open_nursery() as answers:
            for index, part in enumerate(request.parts):
                ask = Asked(request, part, list(own[index]))
                answers.start_soon(self._answer, to.peer, index, ask, send.clone())
            if not self.endless:
                send.close()
            failure = None
            try:
                yield receive
            except trio.Cancelled:
                self.cancelled += 1
                raise
            except P2PMoEError as error:
                failure = error
            answers.cancel_scope.cancel()
        if failure is not None:
            raise failure

    async def _answer(
        self, to: PeerId, index: int, asked: Asked, send: trio.MemorySendChannel[Part]
    ) -> None:
        async with send:
            part = asked.part
            expert = self.experts[part.uid]
            expert.asked.set()
            await expert.take_time(asked)
            if part.uid in self.silent:
                return
            try:
                if expert.error is not None:
                    raise expert.error
                if (expert.peer, expert.lease) != (to, part.lease):
                    raise LeaseLost(f"{part.uid} is not served here")
                run = expert.backward if hasattr(part, "update") else expert.forward
                out = run(asked)
            except P2PMoEError as error:
                failed = PartReply(index=index, step=0, code=error.code, detail=str(error))
                hint = round(1000 * (getattr(error, "retry_after", None) or 0))
                reply, pieces = Answer(parts=(failed,), retry_after_ms=hint), []
            else:
                described, pieces = rows_to_wire([(one,) for one in out])
                reply = Answer(parts=(done(index),), tensors=described)
            payload = memoryview(bytearray(b"".join(pieces)))
            await send.send(Part(schema.encode(self.reply(reply)), payload))


class Watch:
    """What the DHT would say of the grid; `tell` makes it say something else."""

    def __init__(self) -> None:
        self.name = NAME
        self.current: Any = None
        self.pokes = 0
        self.wrong: list[str] = []
        self.doubted: frozenset[PeerId] = frozenset()
        self._changed = trio.Event()

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        task_status.started()

    def poke(self, wrong: Iterable[str] = ()) -> None:
        self.pokes += 1
        self.wrong = list(wrong)

    async def changed(self) -> None:
        await self._changed.wait()

    def tell(self, manifest: Manifest, leases: dict[str, tuple[PeerId, int]]) -> None:
        self.current = SimpleNamespace(
            manifest=SimpleNamespace(body=manifest),
            grid=bytes(32),
            cells={uid: SimpleNamespace(peer=p, number=n) for uid, (p, n) in leases.items()},
            contacts={},
            doubted=self.doubted,
        )
        self._changed.set()
        self._changed = trio.Event()


class Dht:
    """What is served, by looking it up; `asked` remembers every question."""

    def __init__(self, experts: dict[str, Expert]) -> None:
        self.experts = experts
        self.asked: list[str] = []
        self.broken: set[str] = set()  # prefixes and uids that nobody answers for

    def contact(self, peer: PeerId) -> Contact:
        return Contact(peer, (Address("127.0.0.1", 1),))

    def _ask(self, name: str) -> None:
        self.asked.append(name)
        if name in self.broken:
            raise QuorumNotReached("nobody answers")

    async def get_prefix(self, grid: bytes, prefix: str) -> PrefixView:
        await trio.lowlevel.checkpoint()
        self._ask(prefix)
        below = [uid for uid in self.experts if uid.startswith(f"{prefix}.")]
        following = {int(uid[len(prefix) + 1 :].split(".")[0]) for uid in below}
        ends = trio.current_time() + 60
        return PrefixView({one: (peer(1),) for one in sorted(following)}, ends)

    async def get_leases(self, grid: bytes, uids: Iterable[str]) -> dict[str, LeaseView]:
        await trio.lowlevel.checkpoint()
        for uid in uids:
            self._ask(uid)
        ends = trio.current_time() + 30
        return {
            uid: LeaseView(uid, self.experts[uid].peer, self.experts[uid].lease, ends)
            for uid in uids
            if uid in self.experts
        }


class Node:
    """As much of a node as a swarm uses."""

    def __init__(self, pool: Pool, parts: trio.Nursery) -> None:
        self.pool, self.dht = pool, Dht(pool.experts)
        self.start = parts.start
        self.rows: dict[str, Any] = {}

    def describe(self, name: str, section: Any) -> None:
        self.rows[name] = section

    def figures(self) -> dict[str, int]:
        return {"calls": len(self.pool.calls)}

    def sections(self) -> dict[str, Any]:
        return {
            name: [SimpleNamespace(name=key, values=row) for key, row in section().items()]
            for name, section in self.rows.items()
        }


@dataclass
class Fake:
    """A swarm with its fakes at hand."""

    swarm: Swarm
    experts: dict[str, Expert]
    pool: Pool
    watch: Watch
    manifest: Manifest

    def tell(self) -> None:
        """Let the DHT say who serves what now."""
        leases = {uid: (one.peer, one.lease) for uid, one in self.experts.items()}

        async def tell() -> None:
            self.watch.tell(self.manifest, leases)

        self.swarm.call(tell)


def spec(tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(dtype=dtype_name(tensor.dtype), shape=tuple(tensor.shape))


@contextmanager
def fake_swarm(
    grid: str,
    experts: dict[str, Expert],
    inputs: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor] | None = None,
    *,
    start: Callable[[Opening], Swarm] = start_swarm,
) -> Iterator[Fake]:
    """`inputs` and `outputs` are one row each of what the experts take and give."""
    rows = (tuple(map(spec, inputs)), tuple(map(spec, outputs or inputs)))
    schemas = [tuple(TensorSchema(dtype=o.dtype, shape=o.shape) for o in one) for one in rows]
    manifest = Manifest(
        name=NAME,
        cells=Grid.parse(grid).cells,
        expert_class="x",
        dtype=rows[0][0].dtype,
        hidden_dim=8,
        inputs=schemas[0],
        outputs=schemas[1],
        created_ms=0,
    )
    pool, made = Pool(experts, rows), []

    @asynccontextmanager
    async def open_it() -> AsyncIterator[Any]:
        async with trio.open_nursery() as parts:
            made.append(Watch())
            yield Node(pool, parts)
            parts.cancel_scope.cancel()

    with start(open_it) as swarm:
        swarm._parts["watch", NAME] = made[0]
        fake = Fake(swarm, experts, pool, made[0], manifest)
        fake.tell()
        yield fake

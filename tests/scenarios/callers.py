"""Callers of an expert, good or bad: `python -m tests.scenarios.callers good|bad ADDRESS UID`.

Eight good ones bring updates and ask for outputs, one call after the other. The bad one says that
it has begun, and goes on: wrong widths, NaN, gradients of 1e30, calls that it gives up, half
frames. For each line on standard input they print what became of their calls by code, as JSON; for
the line `end` the good ones make no more calls and print each update that was applied: who brought
it, its number, and the step that it was part of. `brought` says what was in it.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from dataclasses import dataclass, field
from itertools import count

import torch
import trio

from p2pmoe.errors import P2PMoEError
from p2pmoe.experts.messages import INFO, InfoReply, InfoRequest
from p2pmoe.identity import KeyPair
from p2pmoe.net.messages import Request
from p2pmoe.node import Node, NodeConfig, open_node
from p2pmoe.testing.hostile import Greet, Reset, Send, Shake, attack, frame
from p2pmoe.wire import schema
from p2pmoe.wire.address import Address
from p2pmoe.wire.peer_record import Contact
from tests.experts.calls import FakeCall, backward, forward, read_replies

GOOD = 8
END = b"end\n"
ROWS = 64
PAUSE = 0.02  # seconds between two misdeeds
MOMENT = 0.002  # seconds after which a call is given up: it is there, and has no answer yet


def brought(caller: int, number: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of a good one's update, and their gradients."""
    dice = torch.Generator().manual_seed(GOOD * number + caller)
    x, grads = torch.randn(2, ROWS, width, generator=dice)
    return x, grads / 100


class Caller:
    """One node that calls one expert."""

    def __init__(self, node: Node, to: Contact, uid: str) -> None:
        self._node, self._to, self.uid = node, to, uid
        self.lease = self.width = self.step = 0

    async def learn(self) -> None:
        """Under which number the expert is served, and what it takes."""
        asked = schema.encode(InfoRequest(uids=(self.uid,)))
        part = await self._node.pool.call(self._to, INFO, asked)
        (info,) = schema.decode(part.body, InfoReply).experts
        self.lease, self.width = info.lease, info.inputs[0].shape[0] or 1

    def rows(self, width: int = 0) -> torch.Tensor:
        return torch.randn(ROWS, width or self.width)

    async def ask(self, call: FakeCall) -> str:
        """The code of its one part, or of the call."""
        try:
            async with self._node.pool.open_call(
                self._to, call.method, call.body, [call.payload], bulk=True
            ) as parts:
                answers = [(part.body, part.payload) async for part in parts]
        except P2PMoEError as error:
            return error.code
        reply = read_replies(call, answers)[0][0]
        self.step = reply.step
        return reply.code or "ok"


@dataclass
class Told:
    """What became of calls by code, and what was learnt."""

    outcomes: Counter[str] = field(default_factory=Counter)
    updates: list[tuple[int, int, int]] = field(default_factory=list)
    ending: bool = False


async def behave(me: int, caller: Caller, told: Told) -> None:
    for number in count():
        if told.ending:
            return
        x, grads = brought(me, number, caller.width)
        update = backward((caller.uid, x, grads), counter=number, lease=caller.lease)
        told.outcomes[f"backward.{(code := await caller.ask(update))}"] += 1
        if code == "ok":
            told.updates.append((me, number, caller.step))
        code = await caller.ask(forward((caller.uid, x), lease=caller.lease))
        told.outcomes[f"forward.{code}"] += 1


async def misbehave(caller: Caller, address: Address, outcomes: Counter[str]) -> None:
    uid, lease = caller.uid, caller.lease
    half = frame(Request(id=1, method="expert.forward", budget_ms=1000, size=9))[:20]
    print("{}", flush=True)  # noqa: T201  it has begun
    for number in count():
        x, wide = caller.rows(), caller.rows(caller.width + 3)
        wrong = [
            forward((uid, wide), lease=lease),
            forward((uid, x * math.nan), lease=lease),
            backward((uid, x, x * math.inf), lease=lease, counter=2 * number),
            backward((uid, x, x * 1e30), lease=lease, counter=2 * number + 1),
        ]
        for call in wrong:
            outcomes[code := await caller.ask(call)] += 1
            assert code != "ok"
            await trio.sleep(PAUSE)
        for _ in range(5):
            with trio.move_on_after(MOMENT):
                await caller.ask(forward((uid, x), lease=lease))
        keys = KeyPair.from_seed(b"half".ljust(32))
        await attack(address, [Shake(), Greet(), Send(half), Reset()], keys=keys)
        outcomes["given up"] += 5
        outcomes["half a frame"] += 1
        await trio.sleep(PAUSE)


async def main(kind: str, address: Address, uid: str) -> None:
    told = Told()
    async with trio.open_nursery() as nodes:
        async with trio.open_nursery() as callers:
            for me in range(GOOD if kind == "good" else 1):
                config = NodeConfig(peers=(address,), client_only=True, stop_within=1)
                node = await nodes.start(_open, config)
                to = Contact((await node.pool.connect(address)).peer, (address,))
                caller = Caller(node, to, uid)
                await caller.learn()
                if kind == "good":
                    callers.start_soon(behave, me, caller, told)
                else:
                    callers.start_soon(misbehave, caller, address, told.outcomes)
            await obey(told)
        print(json.dumps(told.updates), flush=True)  # noqa: T201  for whoever started it
        nodes.cancel_scope.cancel()


async def obey(told: Told) -> None:
    """Tell for each line what became of the calls, until one says that this is the end."""
    async with trio.lowlevel.FdStream(0) as orders:
        while (order := await orders.receive_some()) != END:
            assert order, "whoever began this is gone"
            print(json.dumps(told.outcomes), flush=True)  # noqa: T201  as above
    told.ending = True


async def _open(config: NodeConfig, *, task_status: trio.TaskStatus[Node]) -> None:
    async with open_node(config) as node:
        task_status.started(node)
        await trio.sleep_forever()


if __name__ == "__main__":
    torch.set_num_threads(1)
    trio.run(main, sys.argv[1], Address.parse(sys.argv[2]), sys.argv[3])

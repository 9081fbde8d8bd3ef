"""Callers of an expert, good or bad: `python -m tests.scenarios.callers good|bad ADDRESS UID`.

Eight good ones bring updates and ask for outputs, one call after the other. The bad one says that
it has begun, and goes on: wrong widths, NaN, gradients of 1e30, calls that it gives up, half
frames. For each line on standard input they print what became of their calls by code, as JSON.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
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
ROWS = 64
PAUSE = 0.02  # seconds between two misdeeds
MOMENT = 0.002  # seconds after which a call is given up: it is there, and has no answer yet


class Caller:
    """One node that calls one expert."""

    def __init__(self, node: Node, to: Contact, uid: str) -> None:
        self._node, self._to, self.uid = node, to, uid
        self.lease = self.width = 0

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
        return read_replies(call, answers)[0][0].code or "ok"


async def behave(caller: Caller, outcomes: Counter[str]) -> None:
    for number in count():
        x, grads = caller.rows(), caller.rows() / 100
        update = backward((caller.uid, x, grads), counter=number, lease=caller.lease)
        outcomes[f"backward.{await caller.ask(update)}"] += 1
        outcomes[f"forward.{await caller.ask(forward((caller.uid, x), lease=caller.lease))}"] += 1


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
    outcomes: Counter[str] = Counter()
    async with trio.open_nursery() as callers:
        for _ in range(GOOD if kind == "good" else 1):
            config = NodeConfig(peers=(address,), client_only=True, stop_within=1)
            node = await callers.start(_open, config)
            to = Contact((await node.pool.connect(address)).peer, (address,))
            caller = Caller(node, to, uid)
            await caller.learn()
            if kind == "good":
                callers.start_soon(behave, caller, outcomes)
            else:
                callers.start_soon(misbehave, caller, address, outcomes)
        async with trio.lowlevel.FdStream(0) as orders:
            while await orders.receive_some():
                print(json.dumps(outcomes), flush=True)  # noqa: T201  for whoever started it
        callers.cancel_scope.cancel()


async def _open(config: NodeConfig, *, task_status: trio.TaskStatus[Node]) -> None:
    async with open_node(config) as node:
        task_status.started(node)
        await trio.sleep_forever()


if __name__ == "__main__":
    torch.set_num_threads(1)
    trio.run(main, sys.argv[1], Address.parse(sys.argv[2]), sys.argv[3])

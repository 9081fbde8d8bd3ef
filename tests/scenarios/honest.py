"""An honest peer in a process of its own: `python -m tests.scenarios.honest ADDRESS [mixed]`.

It calls `echo` every few milliseconds; with `mixed` it sends large payloads, too, and gives up some
calls. For each line on standard input it prints a JSON object: how long the calls took since the
last time, in ms, which failed, and the node's own figures, taken between two calls of `echo`.
"""

from __future__ import annotations

import json
import math
import sys
import time
from functools import partial
from itertools import count

import trio

from p2pmoe.errors import P2PMoEError
from p2pmoe.node import Node, NodeConfig, open_node
from p2pmoe.wire import schema
from p2pmoe.wire.address import Address
from p2pmoe.wire.peer_record import Contact
from p2pmoe.wire.status import METHOD, NodeStatus, StatusRequest

PAUSE = 0.002  # seconds between two calls
LARGE = bytes(2**20)


class Caller:
    """Calls `echo` again and again; who holds `turn` keeps it from that."""

    def __init__(self) -> None:
        self.turn = trio.Lock()
        self.took: list[float] = []
        self.failed: list[str] = []

    async def run(self, node: Node, to: Contact) -> None:
        while True:
            async with self.turn:
                begun = time.perf_counter()
                try:
                    await node.pool.call(to, "echo", b"hello")
                except P2PMoEError as error:
                    self.failed.append(str(error))
                self.took.append((time.perf_counter() - begun) * 1000)
            await trio.sleep(PAUSE)


async def mix(node: Node, to: Contact, failed: list[str]) -> None:
    """Large calls, every third of which is given up at some point."""
    for number in count():
        patience = math.inf if number % 3 else (number % 10) * 0.01
        with trio.move_on_after(patience):
            try:
                await node.pool.call(to, "echo", b"", [LARGE], bulk=True)
            except P2PMoEError as error:
                failed.append(str(error))
        await trio.sleep(100 * PAUSE)


async def figures(node: Node, to: Contact) -> dict[str, int]:
    answer = await node.pool.call(to, METHOD, schema.encode(StatusRequest()))
    return schema.decode(answer.body, NodeStatus).figures


async def main(address: Address, *, mixed: bool) -> None:
    caller = Caller()
    config = NodeConfig(peers=(address,), client_only=True, stop_within=1)
    async with open_node(config) as node, trio.open_nursery() as callers:
        to = Contact((await node.pool.connect(address)).peer, (address,))
        callers.start_soon(caller.run, node, to)
        if mixed:
            callers.start_soon(mix, node, to, caller.failed)
        async with trio.lowlevel.FdStream(0) as orders:
            while await orders.receive_some():
                said = {"took": list(caller.took), "failed": list(caller.failed)}
                caller.took.clear()
                caller.failed.clear()
                async with caller.turn:
                    said["figures"] = await figures(node, to)
                print(json.dumps(said), flush=True)  # noqa: T201  for whoever started it
        callers.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(partial(main, mixed="mixed" in sys.argv), Address.parse(sys.argv[1]))

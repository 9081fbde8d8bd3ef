"""The peers of `p2pmoe bench dht`, each a process that takes orders and answers on a socket.

They are forked from one process that has imported everything, as the peers of other systems are
from the process that measures them; it forks one for each line on stdin, which has the number of
the inherited socket and the addresses to join by, and ends with stdin.

An order is a JSON object a line: `{"id", "store": name, "value": text}` or `{"id", "get": name}`.
The answer has the same id and, for a get, the value found. The value is carried by a manifest,
which is what this DHT keeps for any name. A peer ends when its socket does.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import trio

from p2pmoe.bench.work import lines
from p2pmoe.dht.messages import Manifest, TensorSchema
from p2pmoe.errors import P2PMoEError
from p2pmoe.node import Node, NodeConfig, open_node
from p2pmoe.wire.address import Address
from p2pmoe.wire.envelope import Kind, seal

Say = Callable[[dict[str, Any]], Awaitable[None]]

PIECE = 256  # characters of one option of a manifest
ROW = (TensorSchema(dtype="float32", shape=(1,)),)


async def main(number: int, peers: list[str]) -> None:
    """A node on any port of loopback that obeys orders until there are no more."""
    config = NodeConfig(
        peers=tuple(map(Address.parse, peers)),
        new_swarm=not peers,
        listen=Address("127.0.0.1", 0),
        stop_within=1.0,
    )
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(socket.socket(fileno=number)))
    async with open_node(config) as node, trio.open_nursery() as orders:
        say = partial(_say, stream, trio.Lock())
        await say({"address": str(node.address), "pid": os.getpid()})
        async for line in lines(stream):
            orders.start_soon(_obey, node, json.loads(line), say)


async def _obey(node: Node, order: dict[str, Any], say: Say) -> None:
    answer: dict[str, Any] = {"id": order["id"]}
    try:
        if "store" in order:
            await node.dht.put_manifest(seal(node.keys, _manifest(order), **_sealing(node)))
        else:
            found = await node.dht.get_manifest(order["get"])
            answer["value"] = found and "".join(found.body.options.values())
    except P2PMoEError as error:
        answer["error"] = str(error)
    await say(answer)


async def _say(stream: trio.SocketStream, sending: trio.Lock, answer: dict[str, Any]) -> None:
    async with sending:
        await stream.send_all(json.dumps(answer).encode() + b"\n")


def _sealing(node: Node) -> dict[str, Any]:
    return {"kind": Kind.MANIFEST, "network": node.network}


def _manifest(order: dict[str, Any]) -> Manifest:
    """The value in pieces, under the name."""
    text = order["value"]
    pieces = [text[start : start + PIECE] for start in range(0, len(text), PIECE)]
    return Manifest(
        name=order["store"],
        cells=(1,),
        expert_class="value",
        dtype="float32",
        hidden_dim=1,
        inputs=ROW,
        outputs=ROW,
        options={f"{index:02}": piece for index, piece in enumerate(pieces)},
        created_ms=0,
    )


def fork_peers(sockets: list[int]) -> None:
    """A peer for each line on stdin; the sockets of the others are closed in it."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    for line in sys.stdin:
        number, *peers = line.split()
        if not os.fork():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for other in sockets:
                if other != int(number):
                    os.close(other)
            trio.run(main, int(number), peers)
            break


if __name__ == "__main__":
    fork_peers([int(number) for number in sys.argv[1:]])

"""The peers of `p2pmoe bench dht`, a process each: `python -m p2pmoe.bench.dht_peer FD...`.

The process loads what a node needs, writes a line, and at the line that it reads begins a copy of
itself for each socket that it was given; it ends when they have. So do the peers of the other
system begin: as copies of one process that has loaded its modules.

The first order on a socket is `{"join": addresses}`; when the peer has joined it says where and
what it is: `{"address", "pid"}`. An order is a JSON object a line: `{"id", "store": name, "value":
text}` or `{"id", "get": name}`. The answer has the same id and, for a get, the value found. The
value is carried by a manifest, which is what this DHT keeps for any name. The peer ends when its
socket does.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import AsyncIterator, Sequence
from typing import Any

import trio

from p2pmoe.bench.work import lines
from p2pmoe.dht.messages import Manifest, TensorSchema
from p2pmoe.errors import P2PMoEError
from p2pmoe.node import Node, NodeConfig, open_node
from p2pmoe.wire.address import Address
from p2pmoe.wire.envelope import Kind, seal

PIECE = 256  # characters of one option of a manifest
ROW = (TensorSchema(dtype="float32", shape=(1,)),)


def main(sockets: Sequence[int]) -> None:
    """Begin a peer for each of these when told to, and end when they have."""
    _say({"loaded": True})
    sys.stdin.readline()
    for own in sockets:
        if not os.fork():
            os.dup2(own, sys.stdin.fileno())
            os.dup2(own, sys.stdout.fileno())
            for each in sockets:
                os.close(each)
            trio.run(_live)
            return
    for each in sockets:
        os.close(each)
    for _ in sockets:
        os.wait()


async def _live() -> None:
    """A node on any port of loopback that obeys orders until there are no more."""
    coming = _orders()
    peers = tuple(map(Address.parse, (await anext(coming))["join"]))
    config = NodeConfig(
        peers=peers,
        new_swarm=not peers,
        listen=Address("127.0.0.1", 0),
        stop_within=1.0,
    )
    async with open_node(config) as node, trio.open_nursery() as orders:
        gc.freeze()  # as `p2pmoe node` does
        _say({"address": str(node.address), "pid": os.getpid()})
        async for order in coming:
            orders.start_soon(_obey, node, order)


async def _orders() -> AsyncIterator[dict[str, Any]]:
    async for line in lines(trio.lowlevel.FdStream(os.dup(sys.stdin.fileno()))):
        yield json.loads(line)


async def _obey(node: Node, order: dict[str, Any]) -> None:
    answer: dict[str, Any] = {"id": order["id"]}
    try:
        if "store" in order:
            await node.dht.put_manifest(seal(node.keys, _manifest(order), **_sealing(node)))
        else:
            found = await node.dht.get_manifest(order["get"])
            answer["value"] = found and "".join(found.body.options.values())
    except P2PMoEError as error:
        answer["error"] = str(error)
    _say(answer)


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


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


if __name__ == "__main__":
    main([int(descriptor) for descriptor in sys.argv[1:]])

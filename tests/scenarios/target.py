"""A node in a process of its own, to be attacked: `python -m tests.scenarios.target '{...}'`.

The argument is a JSON object of quotas that are not to have their default, rates as two numbers.
`echo` answers with what was asked, `blob` with 8 MiB. Standard output has one line, the address;
closing standard input ends the node.
"""

from __future__ import annotations

import gc
import json
import resource
import sys

import trio

from p2pmoe import telemetry
from p2pmoe.net.incoming import IncomingCall
from p2pmoe.net.pool import PoolParams
from p2pmoe.net.quota import QuotaParams, Rate
from p2pmoe.node import NodeConfig, open_node
from p2pmoe.wire.address import Address

BLOB = bytes(8 * 2**20)


async def echo(call: IncomingCall) -> None:
    await call.send(call.body, [call.payload])


async def blob(call: IncomingCall) -> None:
    await call.send(b"", [BLOB])


async def main(quota: QuotaParams) -> None:
    config = NodeConfig(
        new_swarm=True, listen=Address("127.0.0.1", 0), pool=PoolParams(quota=quota), stop_within=1
    )
    async with open_node(config) as node, trio.lowlevel.FdStream(0) as orders:
        node.handle("echo", echo)
        node.handle("blob", blob)
        print(json.dumps({"address": str(node.address)}), flush=True)  # noqa: T201  for whoever started it
        gc.freeze()  # as `p2pmoe node` does
        await orders.receive_some()


if __name__ == "__main__":
    wanted = json.loads(sys.argv[1])
    if descriptors := wanted.pop("descriptors", None):
        resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))
    telemetry.configure("info", "json")
    rates = {name: Rate(*wanted[name]) for name in wanted if isinstance(wanted[name], list)}
    trio.run(main, QuotaParams(**wanted | rates))

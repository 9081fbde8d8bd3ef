"""A node without experts in a process of its own: `python -m tests.scenarios.dht_peer ADDRESS UID`.

It joins, claims the uid, says `UID ID` and waits to be killed.
"""

import sys

import trio

from p2pmoe.dht.leases import LeaseRefused
from p2pmoe.errors import QuorumNotReached
from p2pmoe.gossip.membership import MembershipParams
from p2pmoe.gossip.probes import ProbeParams
from p2pmoe.gossip.roster import RosterParams
from p2pmoe.gossip.suspicion import SuspicionParams
from p2pmoe.net.pool import PoolParams
from p2pmoe.net.quota import QuotaParams
from p2pmoe.node import Node, NodeConfig, open_node
from p2pmoe.wire.address import Address
from p2pmoe.wire.envelope import VerifiedCache
from tests.dht.swarm_of_ids import GRID

LOOPBACK = Address("127.0.0.1", 0)
PATIENT = PoolParams(  # all begin on few processors, and many in one process
    quota=QuotaParams(handshake=30.0, hello=30.0), verified=VerifiedCache(65536)
)
SLOWLY = MembershipParams(  # fifteen times as slowly: many members share one thread, and are late
    probes=ProbeParams(interval=15.0, timeout=7.5, relayed=11.0, dial=45.0, random_every=150.0),
    roster=RosterParams(suspicion=SuspicionParams(interval=15.0)),
    gossip_every=3.0,
)


async def claim(node: Node, uid: str) -> None:
    """Take a lease, however long that takes where the processor is busy."""
    while True:
        try:
            await node.dht.claim(GRID, uid)
        except (LeaseRefused, QuorumNotReached):
            await trio.sleep(1)
        else:
            return


async def hold(node: Node, uid: str) -> None:
    """Keep a lease, as a server does: one that was lost is claimed again."""
    while True:
        await claim(node, uid)
        await trio.sleep(1)


async def main(address: str, uid: str) -> None:
    """Live until the process ends."""
    config = NodeConfig(
        peers=(Address.parse(address),),
        listen=LOOPBACK,
        join_within=60.0,
        pool=PATIENT,
        membership=SLOWLY,
    )
    async with open_node(config) as node:
        await claim(node, uid)
        sys.stdout.write(f"{uid} {node.id.hex}\n")
        sys.stdout.flush()
        await hold(node, uid)


if __name__ == "__main__":
    trio.run(main, *sys.argv[1:])

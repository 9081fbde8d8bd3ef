"""`local_swarm`: a swarm of servers inside this process, for tests and laptops.

Each server is a whole node with real sockets on the loopback, TLS and all, in a background thread
of its own. What a server keeps can be looked at through `LocalSwarm.experts`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from functools import partial

from p2pmoe.experts.jobs import ServedExpert
from p2pmoe.experts.service import ServeParams
from p2pmoe.experts.serving import Server, ServerConfig, serve_experts
from p2pmoe.experts.uid import ExpertUid, Grid
from p2pmoe.node import Node, NodeConfig, open_node
from p2pmoe.swarm import Swarm, start_swarm
from p2pmoe.wire.address import Address

LOOPBACK = Address("127.0.0.1", 0)
STOP_WITHIN = 1.0  # seconds; nobody waits for a test's servers


class LocalSwarm:
    """The servers of a local swarm. Join it with `p2pmoe.connect(local.addresses)`."""

    def __init__(self) -> None:
        self.nodes: list[Swarm] = []
        self.servers: list[Server] = []

    @property
    def addresses(self) -> list[str]:
        """Where the servers listen."""
        return [f"{one.node.address}/{one.node.id.hex[:32]}" for one in self.nodes]

    @property
    def experts(self) -> dict[str, ServedExpert]:
        """Every expert that is served, with its module, optimiser and figures."""
        return {uid: one for server in self.servers for uid, one in server.service.experts.items()}

    def stop(self, index: int) -> None:
        """End a server in good order."""
        self.nodes[index].close()


@contextmanager
def local_swarm(
    grid: str = "ffn.[0:4].[0:4]",
    *,
    hidden_dim: int = 16,
    servers: int = 2,
    cells: Sequence[str] = (),
    expert_class: str = "ffn",
    params: ServeParams | None = None,
) -> Iterator[LocalSwarm]:
    """Run a swarm of servers until the block ends.

    The experts of `cells`, which are uids, by default of the whole grid, are dealt out to the
    servers in turn; all are served when the block begins. Raises as `open_node` and
    `serve_experts` do.
    """
    made = Grid.parse(grid)
    uids = [ExpertUid.parse(uid) for uid in cells] or list(made.uids())
    swarm = LocalSwarm()
    with ExitStack() as stack:
        for index in range(servers):
            config = ServerConfig(
                create=not index,
                grids=(made,),
                only=tuple(uids[index::servers]),
                expert_class=expert_class,
                hidden_dim=hidden_dim,
                params=params or ServeParams(),
            )
            peers = [Address.parse(one) for one in swarm.addresses]
            opening = partial(_open_server, peers, config, swarm.servers)
            swarm.nodes.append(stack.enter_context(start_swarm(opening)))
        yield swarm


@asynccontextmanager
async def _open_server(
    peers: Iterable[Address], config: ServerConfig, servers: list[Server]
) -> AsyncIterator[Node]:
    node_config = NodeConfig(
        peers=tuple(peers),
        new_swarm=config.create,
        listen=LOOPBACK,
        stop_within=STOP_WITHIN,
    )
    async with open_node(node_config) as node, serve_experts(node, config) as server:
        servers.append(server)
        yield node

"""What verbs ask of a swarm's DHT, as a client that joins for one question."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import click

from p2pmoe.cli.settings import NETWORK
from p2pmoe.cli.units import DURATION

if TYPE_CHECKING:
    from p2pmoe.dht.service import DhtService
    from p2pmoe.node import Node
    from p2pmoe.wire.address import Address

T = TypeVar("T")
HERE = "127.0.0.1"
GOODBYE = 1.0  # seconds; nobody waits for a verb that only asks

WHERE = (
    click.option(
        "--peer",
        "peers",
        multiple=True,
        metavar="HOST:PORT[/ID]",
        help="A peer of the swarm; by default the node of this machine. May be repeated.",
    ),
    click.option("--network", default=NETWORK, help="The swarm's network."),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object."),
)


def joining_options(
    function: Callable[..., Any] | None = None, *, timeout: str = "20s"
) -> Callable[..., Any]:
    """The options of every verb that joins for one question."""
    if function is None:
        return partial(joining_options, timeout=timeout)
    within = click.option(
        "--timeout", type=DURATION, default=timeout, help="Give up after so long."
    )
    for option in (within, *reversed(WHERE)):
        function = option(function)
    return function


@dataclass(frozen=True)
class Joining:
    """Where to enter a swarm: `peers` as given, none for this machine's node."""

    peers: tuple[str, ...]
    network: str
    timeout: float  # seconds for joining and for the question

    def run(self, ask: Callable[[DhtService], Awaitable[T]]) -> T:
        """The answer to one question. Raises as `open_node`, `NotRunning`, or `CallTimeout`."""
        return self.run_node(lambda node: ask(node.dht))

    def run_node(self, ask: Callable[[Node], Awaitable[T]]) -> T:
        """The same for what needs more than the DHT."""
        import trio

        from p2pmoe.cli.app import NotRunning
        from p2pmoe.errors import PeerUnreachable
        from p2pmoe.wire.address import DEFAULT_PORT, Address

        peers = self.peers or (HERE,)
        addresses = tuple(Address.parse(peer, default_port=DEFAULT_PORT) for peer in peers)
        try:
            return trio.run(self._ask, addresses, ask)
        except PeerUnreachable:
            if self.peers:
                raise
            raise NotRunning(
                f"no node answers at {addresses[0]}: is it running? Name another one by --peer"
            ) from None

    async def _ask(self, addresses: tuple[Address, ...], ask: Callable[[Node], Awaitable[T]]) -> T:
        import trio

        from p2pmoe.errors import CallTimeout
        from p2pmoe.node import NodeConfig, open_node

        config = NodeConfig(
            peers=addresses, network=self.network, client_only=True, stop_within=GOODBYE
        )
        with trio.move_on_after(self.timeout):
            async with open_node(config) as node:
                return await ask(node)
        raise CallTimeout(
            f"no answer in {self.timeout:g} s", stage="call", address=str(addresses[0])
        )

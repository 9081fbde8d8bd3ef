"""`p2pmoe ping`: how far one gets with a peer, and how long each step of the way takes."""

from __future__ import annotations

import json
from typing import Any

import click

from p2pmoe.cli.settings import NETWORK
from p2pmoe.cli.units import DURATION
from p2pmoe.cli.verbs import Verb

CLOCKS_AGREE = 60.0  # seconds; what the network tolerates


@click.command("ping", cls=Verb)
@click.argument("peer", metavar="HOST:PORT[/ID]")
@click.option("--network", default=NETWORK, help="The peer's network.")
@click.option("--count", type=click.IntRange(1, 100), default=5, help="Echoes to ask for.")
@click.option("--timeout", type=DURATION, default="10s", help="Give up after so long.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(*, peer: str, network: str, count: int, timeout: float, as_json: bool) -> None:
    """Reach a peer step by step: resolve, connect, TLS, hello, echo; compare clocks and versions.

    Times are in milliseconds. The clock's offset is how far the peer's clock is ahead of this one.
    """
    import trio

    from p2pmoe.cli.pinging import Trip
    from p2pmoe.errors import P2PMoEError
    from p2pmoe.wire.address import DEFAULT_PORT, Address

    trip = Trip(Address.parse(peer, default_port=DEFAULT_PORT), network)
    try:
        trio.run(trip.travel, count, timeout)
    except P2PMoEError as error:
        if as_json:
            print(json.dumps(trip.facts() | {"failed": error.stage, "error": str(error)}))
        raise
    if as_json:
        print(json.dumps(trip.facts()))
    else:
        show(trip.facts())


def show(facts: dict[str, Any]) -> None:
    """A line for people a stage, and one of what the peer says of itself."""
    print(f"peer {facts['peer'][:8]} at {facts['reached']}")
    for stage, took in facts["stages_ms"].items():
        print(f"  {stage:<8}{took:9.2f} ms")
    low, high = facts["protocol"]
    protocol = f"{low}" if low == high else f"{low} to {high}"
    print(f"p2pmoe {facts['version']}  protocol {protocol}  load {facts['load'] / 10:.0f} %")
    offset = facts["clock_offset_ms"]
    ahead = "ahead of" if offset >= 0 else "behind"
    print(f"its clock is {abs(offset):.1f} ms {ahead} this one")
    if abs(offset) > CLOCKS_AGREE * 1000:
        print("the clocks disagree too much: set both by NTP")

"""`p2pmoe peers`: the members of the swarm, as one node sees them."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from p2pmoe.cli.joining import GOODBYE, HERE
from p2pmoe.cli.settings import NETWORK
from p2pmoe.cli.units import DURATION, seconds_text
from p2pmoe.cli.verbs import Verb

if TYPE_CHECKING:
    from rich.table import Table

    from p2pmoe.wire.address import Address
    from p2pmoe.wire.status import MemberRow

EVERY = 1.0  # seconds between two looks with --watch
ORDER = ("self", "suspect", "alive", "dead", "left")  # of states: what to look at comes first
STYLES = {"self": "bold", "alive": "green", "suspect": "yellow", "dead": "red", "left": "dim"}
COLUMNS = ("peer", "state", "since", "address", "rtt", "load", "free", "v", "grids")

Show = Callable[[Sequence[dict[str, Any]]], None]


@click.command("peers", cls=Verb)
@click.option(
    "--peer",
    "peers",
    multiple=True,
    metavar="HOST:PORT[/ID]",
    help="The node to ask; by default the one of this machine, at the default port. May be"
    " repeated: the first that answers.",
)
@click.option("--network", default=NETWORK, help="The swarm's network.")
@click.option("--timeout", type=DURATION, default="10s", help="Give up after so long.")
@click.option("--watch", is_flag=True, help="Look again every second, until interrupted.")
@click.option(
    "--seconds", type=DURATION, default=math.inf, show_default="no limit", help="Watch so long."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON array a look.")
def command(*, peers: tuple[str, ...], as_json: bool, watch: bool, **options: Any) -> None:
    """List the members of the swarm as a node sees them, with the state of each.

    alive: it answers. suspect: it did not, and has a few seconds to say otherwise. dead: it did
    not. left: it said goodbye. Client-only peers are no members.
    """
    import trio

    from p2pmoe.cli.app import NotRunning
    from p2pmoe.errors import PeerUnreachable
    from p2pmoe.wire.address import DEFAULT_PORT, Address

    addresses = [Address.parse(peer, default_port=DEFAULT_PORT) for peer in peers or [HERE]]
    looks = options["seconds"] if watch else 0.0
    try:
        with _shown(as_json=as_json, live=watch) as show:
            trio.run(_look, addresses, options["network"], options["timeout"], looks, show)
    except PeerUnreachable:
        if peers:
            raise
        raise NotRunning(
            f"no node answers at {addresses[0]}: is it running? Name another one by --peer"
        ) from None


async def _look(
    addresses: list[Address], network: str, within: float, seconds: float, show: Show
) -> None:
    """Show the members, and again every second for so long."""
    import trio

    from p2pmoe.cli.asking import ask_members, first_that_answers
    from p2pmoe.errors import CallTimeout
    from p2pmoe.node import NodeConfig, open_node

    config = NodeConfig(network=network, client_only=True, stop_within=GOODBYE)
    async with open_node(config) as node:
        contact = await first_that_answers(node.pool, addresses, within)
        until = trio.current_time() + seconds
        while True:
            rows = None
            with trio.move_on_after(within):
                rows = await ask_members(node.pool, contact)
            if rows is None:
                where = str(contact.addresses[0])
                raise CallTimeout(f"no answer in {within:g} s", stage="call", address=where)
            show(facts_of(rows))
            if trio.current_time() + EVERY > until:
                return
            await trio.sleep(EVERY)


def facts_of(rows: Sequence[MemberRow]) -> list[dict[str, Any]]:
    """What a node says of the members, the most interesting first. Times in seconds."""
    facts = [
        {
            "peer": row.peer.hex(),
            "state": row.state,
            "since": row.since_ms / 1000,
            "heard": None if row.heard_ms < 0 else row.heard_ms / 1000,
            "addresses": list(row.addresses),
            "rtt_ms": row.rtt_us / 1000 if row.rtt_us else None,
            "load": row.load / 1000,
            "free_slots": row.free_slots,
            "protocol": [row.version_min, row.version_max],
            "epoch": row.epoch,
            "incarnation": row.incarnation,
            "grids": list(row.grids),
        }
        for row in rows
    ]
    return sorted(facts, key=lambda each: (ORDER.index(str(each["state"])), each["peer"]))


@contextmanager
def _shown(*, as_json: bool, live: bool) -> Iterator[Show]:
    """How to show what was seen: as JSON, as one table, or as a table that changes."""
    if as_json:
        yield lambda facts: print(json.dumps(facts), flush=True)
        return
    from rich.console import Console
    from rich.live import Live

    console = Console(highlight=False)
    if not live:
        yield lambda facts: console.print(table_of(facts))
        return
    with Live(console=console, auto_refresh=False) as view:
        yield lambda facts: view.update(table_of(facts), refresh=True)


def table_of(facts: Sequence[dict[str, Any]]) -> Table:
    """The members as a table, with how many there are in each state."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    states = Counter(each["state"] for each in facts)
    counts = ", ".join(f"{states[state]} {state}" for state in ORDER[1:] if states[state])
    table = Table(*COLUMNS, box=box.SIMPLE, title=counts or "no other members")
    for column in table.columns[:4]:
        column.no_wrap, column.overflow = True, "fold"
    for each in facts:
        low, high = each["protocol"]
        cells = (
            each["peer"][:8],
            each["state"],
            seconds_text(each["since"]),
            ", ".join(each["addresses"][:2]),
            "" if each["rtt_ms"] is None else f"{each['rtt_ms']:.1f} ms",
            f"{each['load'] * 100:.0f} %",
            str(each["free_slots"]),
            f"{low}" if low == high else f"{low}-{high}",
            ", ".join(each["grids"]),
        )
        table.add_row(*map(escape, cells), style=STYLES[each["state"]])
    return table

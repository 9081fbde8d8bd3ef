"""`p2pmoe status`: one node at this moment."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from p2pmoe.cli.joining import GOODBYE, HERE
from p2pmoe.cli.settings import NETWORK
from p2pmoe.cli.units import DURATION, seconds_text
from p2pmoe.cli.verbs import Verb

if TYPE_CHECKING:
    from p2pmoe.wire.address import Address
    from p2pmoe.wire.status import NodeStatus

EXPERTS = "experts"  # the section of a node's answer that a server adds
STATES = ("alive", "suspect", "dead", "left")  # of members
COLUMNS = {
    "calls_per_second": "calls/s",
    "updates_per_second": "updates/s",
    "latency_ms": "ms",
    "calls": "calls",
    "updates": "updates",
    "rows": "rows",
    "errors": "errors",
}


@click.command("status", cls=Verb)
@click.option(
    "--peer",
    "peers",
    multiple=True,
    metavar="HOST:PORT[/ID]",
    help="The node to ask; by default the one of this machine, at the default port. May be"
    " repeated: the first that answers.",
)
@click.option("--network", default=NETWORK, help="The swarm's network.")
@click.option("--over", type=DURATION, default="1s", help="Measure rates over so long.")
@click.option("--timeout", type=DURATION, default="10s", help="Give up after so long.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    *, peers: tuple[str, ...], network: str, over: float, timeout: float, as_json: bool
) -> None:
    """Ask a node for its peers, its experts, calls and updates a second, latency and errors."""
    import trio

    from p2pmoe.cli.app import NotRunning
    from p2pmoe.errors import PeerUnreachable
    from p2pmoe.wire.address import DEFAULT_PORT, Address

    addresses = [Address.parse(peer, default_port=DEFAULT_PORT) for peer in peers or [HERE]]
    try:
        answers = trio.run(_ask_twice, addresses, network, over, timeout)
    except PeerUnreachable:
        if peers:
            raise
        raise NotRunning(
            f"no node answers at {addresses[0]}: is it running? Name another one by --peer"
        ) from None
    facts = facts_of(*answers)
    if as_json:
        print(json.dumps(facts))
    else:
        _show(facts)


async def _ask_twice(
    addresses: list[Address], network: str, over: float, within: float
) -> tuple[Address, NodeStatus, NodeStatus]:
    """The first address that answers, and what it says now and a while later."""
    import trio

    from p2pmoe.cli.asking import ask_status
    from p2pmoe.errors import CallTimeout, PeerUnreachable
    from p2pmoe.node import NodeConfig, open_node

    config = NodeConfig(network=network, client_only=True, stop_within=GOODBYE)
    async with open_node(config) as node:
        for address in addresses:
            with trio.move_on_after(within + over):
                try:
                    before = await ask_status(node.pool, address)
                    await trio.sleep(over)
                    return address, before, await ask_status(node.pool, address)
                except PeerUnreachable:
                    if address is addresses[-1]:
                        raise
    raise CallTimeout(f"no answer in {within:g} s", stage="call", address=str(addresses[-1]))


def facts_of(address: Address, before: NodeStatus, after: NodeStatus) -> dict[str, Any]:
    """What two answers of a node say: totals of the later one, rates between them."""
    seconds = max(0.001, (after.uptime_ms - before.uptime_ms) / 1000)
    was = _rows(before, EXPERTS)
    experts = {
        uid: _facts_of_expert(row, was.get(uid, {}), seconds)
        for uid, row in _rows(after, EXPERTS).items()
    }
    calls = sum(each["calls"] for each in experts.values())
    took = sum(each["calls"] * each["latency_ms"] for each in experts.values())
    membership = _rows(after, "membership")
    return {
        "address": str(address),
        "peer": after.peer.hex(),
        "version": after.version,
        "uptime": after.uptime_ms / 1000,
        "peers": after.figures.get("p2pmoe_peers_connected", 0),
        "calls_per_second": round(sum(e["calls_per_second"] for e in experts.values()), 1),
        "updates_per_second": round(sum(e["updates_per_second"] for e in experts.values()), 1),
        "latency_ms": round(took / max(1, calls), 2),
        "errors": sum(each["errors"] for each in experts.values()),
        "members": membership.get("members", {}),
        "own": membership.get("own", {}),
        "experts": experts,
        "figures": after.figures,
        "sections": {name: _rows(after, name) for name in after.sections if name != EXPERTS},
    }


def _facts_of_expert(
    now: dict[str, Any], was: dict[str, Any], seconds: float
) -> dict[str, int | float]:
    """An expert's figures, and how they changed in so many seconds."""
    return {
        "calls_per_second": round((now["calls"] - was.get("calls", 0)) / seconds, 1),
        "updates_per_second": round((now["updates"] - was.get("updates", 0)) / seconds, 1),
        "latency_ms": now["mean_us"] / 1000,
        "calls": now["calls"],
        "updates": now["updates"],
        "rows": now["rows"],
        "errors": now["failed"],
    }


def _rows(status: NodeStatus, section: str) -> dict[str, dict[str, Any]]:
    return {row.name: dict(row.values) for row in status.sections.get(section, ())}


def _show(facts: dict[str, Any]) -> None:
    """A few lines and a table for people."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    print(
        f"peer {facts['peer'][:8]} at {facts['address']}  p2pmoe {facts['version']}"
        f"  up {seconds_text(facts['uptime'])}"
    )
    print(
        f"{facts['peers']} peers  {len(facts['experts'])} experts"
        f"  {facts['calls_per_second']} calls/s  {facts['updates_per_second']} updates/s"
        f"  {facts['latency_ms']:.1f} ms  {facts['errors']} errors"
    )
    if facts["members"]:
        counts = ", ".join(f"{facts['members'][state]} {state}" for state in STATES)
        own = facts["own"]
        print(f"members {counts}  load {own['load'] / 10:.0f} %  {own['free_slots']} free slots")
    if facts["experts"]:
        table = Table("expert", *COLUMNS.values(), box=box.SIMPLE)
        for uid, row in facts["experts"].items():
            table.add_row(uid, *(f"{row[name]}" for name in COLUMNS))
        Console(highlight=False).print(table)

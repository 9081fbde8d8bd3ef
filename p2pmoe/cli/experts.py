"""`p2pmoe experts`: who serves which expert of a swarm, as the DHT has it now."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from p2pmoe.cli.joining import Joining, joining_options
from p2pmoe.cli.verbs import Verb

if TYPE_CHECKING:
    from p2pmoe.dht.directory import GridReading
    from p2pmoe.dht.service import DhtService

COLUMNS = ("uid", "peer", "lease", "expires", "address")


@click.command("experts", cls=Verb)
@click.argument("prefix", required=False)
@joining_options
def command(
    *, prefix: str | None, peers: tuple[str, ...], network: str, timeout: float, as_json: bool
) -> None:
    """List the experts below PREFIX, such as ffn or ffn.3, or all that known peers serve."""
    rows = Joining(peers, network, timeout).run(lambda dht: _experts(dht, prefix))
    if as_json:
        print(json.dumps({"experts": rows}))
    else:
        _show(rows)


async def _experts(dht: DhtService, prefix: str | None) -> list[dict[str, Any]]:
    """Every expert below a prefix, in the order of its coordinates."""
    import trio

    from p2pmoe.dht.directory import read_grid

    names = [prefix.partition(".")[0]] if prefix else sorted(dht.grids())
    rows: list[dict[str, Any]] = []
    for name in names:
        reading = await read_grid(dht, name)
        rows += rows_of(reading, prefix or name, trio.current_time())
    return rows


def rows_of(reading: GridReading, prefix: str, now: float) -> list[dict[str, Any]]:
    """What is said of each expert of a grid whose uid begins with these coordinates."""
    rows = []
    for uid, view in reading.cells.items():
        if uid == prefix or uid.startswith(f"{prefix}."):
            addresses = reading.contacts[view.peer].addresses
            rows.append(
                {
                    "uid": uid,
                    "peer": view.peer.hex,
                    "lease": view.number,
                    "expires": round(view.expires_at - now, 1),
                    "address": str(addresses[0]),
                }
            )
    return rows


def _show(rows: list[dict[str, Any]]) -> None:
    """A table for people."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(*COLUMNS, box=box.SIMPLE)
    for row in rows:
        shown = row | {"peer": row["peer"][:8], "expires": f"{row['expires']:.0f}s"}
        table.add_row(*(str(shown[name]) for name in COLUMNS))
    if rows:
        Console(highlight=False).print(table)
    servers = len({row["peer"] for row in rows})
    print(f"{len(rows)} experts on {servers} peers")

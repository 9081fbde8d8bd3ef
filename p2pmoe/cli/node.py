"""`p2pmoe node`: a peer of the swarm, with experts or without, until it is told to stop.

stdout has the banner, logs go to stderr. SIGINT or SIGTERM once: finish the calls, save the
experts, hand them over, say goodbye, exit 0; twice: end now. SIGUSR1 writes tasks, connections and
queues to the log.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from p2pmoe.cli.settings import NETWORK, spelling, state_folder
from p2pmoe.cli.units import DURATION
from p2pmoe.cli.verbs import Verb

SEVERAL = "--initial-peers"  # takes every word up to the next option


class NodeVerb(Verb):
    """Lets `--initial-peers A B` have any number of words."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Spell `--initial-peers A B` as `--initial-peers A --initial-peers B`."""
        spelled: list[str] = []
        for word in args:
            if word.startswith("-") or spelled[-2:-1] != [SEVERAL]:
                spelled.append(SEVERAL if spelling(word) == SEVERAL else word)
            else:
                spelled += [SEVERAL, word]
        return super().parse_args(ctx, spelled)


@click.command("node", cls=NodeVerb)
@click.option(
    "--peer",
    "peers",
    multiple=True,
    metavar="HOST:PORT[/ID]",
    help="A peer of the swarm to join. May be repeated.",
)
@click.option(
    SEVERAL, multiple=True, metavar="PEER...", help="The same, several words after one option."
)
@click.option("--new-swarm", is_flag=True, help="Begin a swarm, with the grids of --grid.")
@click.option(
    "--network",
    default=NETWORK,
    help="Peers of one network name find each other. The name keeps nobody out.",
)
@click.option(
    "--listen", default="4747", metavar="[HOST:]PORT", help="Where to listen; port 0: any."
)
@click.option(
    "--announce",
    metavar="HOST:PORT",
    help="Where others reach this node, if not where it listens (port forwarding).",
)
@click.option("--client-only", is_flag=True, help="Accept no connections: no experts, no records.")
@click.option(
    "--grid",
    "grids",
    multiple=True,
    metavar="NAME.[0:N]...",
    help="A grid to serve, such as 'ffn.[0:8].[0:8]'. May be repeated. By default, the swarm's.",
)
@click.option(
    "--experts", type=click.IntRange(min=0), help="How many free cells to serve, of each grid."
)
@click.option(
    "--expert",
    "uids",
    multiple=True,
    metavar="UID",
    help="A cell to serve, such as ffn.2.5, instead of free ones. May be repeated.",
)
@click.option(
    "--expert-class",
    metavar="NAME",
    help="Of a new grid: ffn, transformer, or module:Class.  [default: ffn]",
)
@click.option("--hidden-dim", type=click.IntRange(min=1), help="Of a new grid: its rows' width.")
@click.option("--dtype", help="Of a new grid: its numbers.  [default: float32]")
@click.option(
    "--optimizer", type=click.Choice(["adam", "adamw", "sgd"]), default="adam", help="Of experts."
)
@click.option("--lr", type=float, default=1e-3, help="Learning rate of experts.")
@click.option(
    "--clip-grad-norm", type=float, default=1.0, help="Bound of one request's gradient; 0: none."
)
@click.option(
    "--warmup-steps", type=click.IntRange(min=0), default=0, help="Until --lr is reached."
)
@click.option("--device", default="cpu", help="Where experts compute.")
@click.option("--max-batch", type=click.IntRange(min=1), default=4096, help="Rows at once.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of one computation.")
@click.option(
    "--state-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Key and state; by default in the user's state folder. Of one node at a time.",
)
@click.option(
    "--cells-a-peer",
    type=click.IntRange(min=1),
    default=16,
    help="Free cells that this node lets one peer claim in 30 s.",
)
@click.option(
    "--save-every", type=DURATION, default="5m", help="How often experts that learned are saved."
)
@click.option(
    "--keep", type=click.IntRange(min=1), default=3, help="Saved files that stay, of each expert."
)
@click.option(
    "--restore",
    type=click.Choice(["auto", "never"]),
    default="auto",
    help="Whether an expert begins as it was saved last, here or at other peers.",
)
@click.option(
    "--copies",
    type=click.IntRange(min=0, max=4),
    default=2,
    help="Other peers that keep a copy of what was saved last.",
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    help="The least level that is logged.",
)
@click.option(
    "--log-format",
    type=click.Choice(["console", "json"]),
    default="console",
    help="Of the log and of the banner; json is one object a line.",
)
@click.option(
    "--stop-within", type=DURATION, default="20s", help="For saving, handing over, and the goodbye."
)
@click.option(
    "--seconds",
    type=DURATION,
    default=math.inf,
    show_default="no limit",
    help="Stop after so long.",
)
def command(**options: Any) -> None:
    """Serve experts of a swarm, or only help its members to find each other.

    The first node of a swarm has --new-swarm and says what its grids are. Those that join name any
    peer of it, and how many experts they have room for:

    \b
    p2pmoe node --new-swarm --grid 'ffn.[0:8].[0:8]' --hidden-dim 512 --experts 16
    p2pmoe node --peer 192.168.1.20:4747 --experts 16
    """  # noqa: D301  click wants the character itself
    _check(options)
    from p2pmoe.cli.serving import run_node

    run_node(options)


def _check(options: dict[str, Any]) -> None:
    """Refuse what contradicts itself, before anything heavy is imported."""
    joins = options["peers"] or options["initial_peers"]
    serves = options["experts"] or options["uids"] or options["grids"]
    if options["new_swarm"] and joins:
        _refuse("--new-swarm begins a swarm and --peer joins one: give one of them")
    state = options["state_dir"] or state_folder()  # with what its last run has left
    known = (state / "peers").exists() or any(state.glob("snapshots/*/grid.cbor"))
    if not (joins or known) and serves and not options["grids"]:
        _refuse("experts of which grid? Give a --grid, or join a swarm that has one by --peer")
    if options["client_only"] and serves:
        _refuse("a node with experts accepts connections: leave out --client-only")
    if options["client_only"] and not joins:
        _refuse("--client-only needs a --peer")
    if options["experts"] and options["uids"]:
        _refuse("--experts takes any free cells and --expert names them: give one of them")


def _refuse(why: str) -> None:
    raise click.UsageError(why, click.get_current_context())

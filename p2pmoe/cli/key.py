"""`p2pmoe key`: who this machine's node is."""

from __future__ import annotations

import json
from pathlib import Path

import click

from p2pmoe.cli.settings import state_folder
from p2pmoe.cli.verbs import Verb


@click.command("key", cls=Verb)
@click.option(
    "--state-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="The node's state folder; by default the one that `p2pmoe node` uses.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(state_dir: Path | None, *, as_json: bool) -> None:
    """Print the public key and the peer id of this machine's node.

    A machine that has no key yet gets one, as `p2pmoe node` would make it. The private half stays
    in the state folder.
    """
    from p2pmoe.state import KEY_FILE, load_or_create_key

    path = (state_dir or state_folder()) / KEY_FILE
    existed = path.exists()
    keys = load_or_create_key(path)
    if not existed:
        click.echo(f"p2pmoe: made a new key: {path}", err=True)
    if as_json:
        facts = {"public_key": keys.public_key.hex(), "peer": keys.peer_id.hex, "file": str(path)}
        print(json.dumps(facts))
    else:
        print(f"public key  {keys.public_key.hex()}\npeer        {keys.peer_id.hex}")

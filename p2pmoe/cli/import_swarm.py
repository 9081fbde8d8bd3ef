"""`p2pmoe import`: an export becomes what a node saved last, so that it serves those experts."""

from __future__ import annotations

import json
from pathlib import Path

import click

from p2pmoe.cli.settings import NETWORK, state_folder
from p2pmoe.cli.verbs import Verb

MOST_NAMED = 8  # experts that an error names


@click.command("import", cls=Verb)
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False, exists=True))
@click.option(
    "--state-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Of the node that will serve it; by default the user's state folder.",
)
@click.option("--network", default=NETWORK, help="The swarm's network, as when it was exported.")
@click.option("--force", is_flag=True, help="Even where the node has saved something newer.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    *, folder: Path, state_dir: Path | None, network: str, force: bool, as_json: bool
) -> None:
    """Put the export of FOLDER into the state folder of a node that is not running.

    Every file is checked first. Started again, the node begins with those cells and weights: as
    the first of a swarm, with --new-swarm and the same --grid, or as one that joins it later.
    """
    from p2pmoe.identity import KeyPair, network_id, open_network_seed
    from p2pmoe.state import hold_folder

    target = state_dir or state_folder()
    authority = KeyPair.from_seed(open_network_seed(network)).public_key
    with hold_folder(target):
        uids = _import(folder, target, network_id(authority), force=force, quiet=as_json)
    if as_json:
        print(json.dumps({"state_dir": str(target), "experts": uids}))
    else:
        print(f"{len(uids)} experts are in {target}: start its node")


def _import(source: Path, target: Path, network: bytes, *, force: bool, quiet: bool) -> list[str]:
    """Check all, then take all in; the uids."""
    from rich.console import Console
    from rich.progress import Progress

    from p2pmoe.errors import ConfigurationError, StateError
    from p2pmoe.experts.exports import Import, checked

    with Progress(console=Console(stderr=True, quiet=quiet), transient=True) as bar:
        found = checked(source, target / "snapshots", network)
        *_, taken = bar.track(found, description="checking")
        assert isinstance(taken, Import)
        newer = taken.newer()
        if newer and not force:
            named = ", ".join(newer[:MOST_NAMED]) + (", ..." if len(newer) > MOST_NAMED else "")
            raise ConfigurationError(
                f"{len(newer)} experts were saved later here ({named}): --force removes those"
            )
        count = len(taken.manifest.experts)
        try:
            return list(bar.track(taken.run(), total=count, description="importing"))
        except OSError as error:
            raise StateError(f"cannot write to {target}: {error.strerror}") from None

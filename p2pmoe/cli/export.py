"""`p2pmoe export`: the newest saved state of every expert of a swarm, in a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from p2pmoe.cli.joining import Joining, joining_options
from p2pmoe.cli.verbs import Verb

if TYPE_CHECKING:
    from p2pmoe.experts.exports import ExportManifest

MOST_NAMED = 8  # experts that an error names; all of them stand in the manifest


@click.command("export", cls=Verb)
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--grid", "grids", multiple=True, metavar="NAME", help="Of this grid alone.")
@joining_options(timeout="30m")
def command(
    *,
    folder: Path,
    grids: tuple[str, ...],
    peers: tuple[str, ...],
    network: str,
    timeout: float,
    as_json: bool,
) -> None:
    """Save the newest state of every expert of a swarm in FOLDER, which may have an older export.

    It is the state that was saved last by its server (see --save-every of p2pmoe node), from there
    or from a peer that keeps a copy. What is there already is not fetched again.
    """
    manifest = _export(folder, grids, Joining(peers, network, timeout), quiet=as_json)
    if as_json:
        import msgspec

        print(json.dumps({"folder": str(folder)} | msgspec.to_builtins(manifest)))
    else:
        size = sum(each.bytes for each in manifest.experts)
        print(
            f"{len(manifest.experts)} experts of {len(manifest.grids)} grids in {folder}"
            f" ({size / 1e6:.1f} MB), {len(manifest.untrained)} have learned nothing"
        )
    if manifest.missing:
        raise _incomplete(manifest)


def _export(
    folder: Path, grids: tuple[str, ...], joining: Joining, *, quiet: bool
) -> ExportManifest:
    """Carry it out behind a bar of progress."""
    from rich.console import Console
    from rich.progress import Progress

    from p2pmoe.errors import P2PMoEError, StateError
    from p2pmoe.experts.exporting import Export

    with Progress(console=Console(stderr=True, quiet=quiet), transient=True) as bar:
        task = bar.add_task("exporting", total=None)

        def progress(done: int, count: int) -> None:
            bar.update(task, completed=done, total=count)

        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            return joining.run_node(lambda node: Export(node, folder, progress).run(grids))
        except P2PMoEError:
            raise
        except OSError as error:
            raise StateError(f"cannot write to {folder}: {error.strerror}") from None


def _incomplete(manifest: ExportManifest) -> Exception:
    from p2pmoe.errors import ExpertUnavailable

    named = [f"{each.uid}: {each.why}" for each in manifest.missing[:MOST_NAMED]]
    more = len(manifest.missing) - len(named)
    said = "; ".join([*named, f"and {more} more"] if more else named)
    return ExpertUnavailable(f"{len(manifest.missing)} experts are not in the export ({said})")

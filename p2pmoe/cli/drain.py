"""`p2pmoe drain`: asks the node of a state folder to leave in order, and waits for its end."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import click

from p2pmoe.cli.settings import state_folder
from p2pmoe.cli.units import DURATION, seconds_text
from p2pmoe.cli.verbs import Verb

LOOK = 0.1  # seconds between looks at the state folder


@click.command("drain", cls=Verb)
@click.option(
    "--state-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Of the node that is to leave; by default the user's state folder.",
)
@click.option("--timeout", type=DURATION, default="60s", help="Wait so long for its end.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end.")
def command(*, state_dir: Path | None, timeout: float, as_json: bool) -> None:
    """Ask this machine's node to leave: it saves its experts and hands them to other servers.

    It is what SIGTERM does. The node ends within its own --stop-within.
    """
    from p2pmoe.cli.app import NotRunning
    from p2pmoe.errors import CallTimeout
    from p2pmoe.state import running

    folder = state_dir or state_folder()
    pid = running(folder)
    if pid is None:
        raise NotRunning(f"no node uses {folder}: name its folder by --state-dir")
    began = time.monotonic()
    try:
        os.kill(pid, signal.SIGTERM)
    except PermissionError:
        raise NotRunning(f"the node of {folder}, process {pid}, belongs to another user") from None
    except ProcessLookupError:  # it ended meanwhile
        pass
    had = _wait(folder, pid, began + timeout, quiet=as_json)
    took = time.monotonic() - began
    if running(folder) == pid:
        raise CallTimeout(
            f"process {pid} has not ended after {seconds_text(took)}: look at its log,"
            " or send SIGTERM again to end it at once",
            stage="call",
        )
    if as_json:
        print(json.dumps({"pid": pid, "experts": had, "seconds": round(took, 2)}))
    else:
        print(f"the node has left after {seconds_text(took)}; it had {had} experts")


def _wait(folder: Path, pid: int, deadline: float, *, quiet: bool) -> int:
    """Watch the node leave; how many experts it had."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    had = 0
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    console = Console(stderr=True, quiet=quiet)
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(f"process {pid} leaves: experts given away", total=None)
        for had, left in _looks(folder, pid, deadline):
            bar.update(task, total=had or None, completed=had - left)
    return had


def _looks(folder: Path, pid: int, deadline: float) -> Iterator[tuple[int, int]]:
    """How many experts the node had and has, again and again until it has ended."""
    from p2pmoe.state import leaving, running

    had = left = 0
    while running(folder) == pid and time.monotonic() < deadline:
        had, left = leaving(folder) or (had, left)
        yield had, left
        time.sleep(LOOK)

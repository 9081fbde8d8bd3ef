"""`p2pmoe simulate`: thousands of peers in one thread, in virtual time, from one seed.

What can be simulated stands in `SIMULATIONS`; each is a file of this folder, `simulate_<name>.py`,
whose `command` is a `Simulator`. A result goes to stdout; a progress bar to stderr, if a person
looks at it.
"""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import click

from p2pmoe.cli.settings import PREFIX, Options, spelling
from p2pmoe.cli.verbs import Verb

SIMULATIONS = {
    "gossip": "Who notices, and how soon, that members crash, stall or leave.",
    "dht": "How long a search for experts takes, and what is found under churn and lies.",
}


class Simulator(click.Command):
    """A simulation of the table. Its options may come from the settings of `simulate`."""

    def __init__(self, *args: Any, **attributes: Any) -> None:
        attributes["context_settings"] = {"auto_envvar_prefix": PREFIX}
        super().__init__(*args, **attributes)


class Simulate(Verb, click.Group):
    """The verb. It knows the names of the simulations and loads one when it is called."""

    @property
    def options(self) -> Options:
        """The options that a file may set, of all simulations together."""
        found = [param for name in SIMULATIONS for param in load_simulation(name).params]
        return {spelling(str(o.name)): o for o in found if isinstance(o, click.Option)}

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  click's signature
        """In the order of the table."""
        return list(SIMULATIONS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command:
        """The simulation of this name, imported now; what a file sets is passed on to it."""
        if cmd_name not in SIMULATIONS:
            close = get_close_matches(cmd_name, SIMULATIONS, n=1) or list(SIMULATIONS)
            raise click.UsageError(f"no simulation {cmd_name!r}: there is {', '.join(close)}", ctx)
        if ctx.default_map is not None and cmd_name not in ctx.default_map:
            ctx.default_map = {cmd_name: ctx.default_map}
        return load_simulation(cmd_name)

    def format_commands(
        self,
        ctx: click.Context,  # noqa: ARG002  click's signature
        formatter: click.HelpFormatter,
    ) -> None:
        """List the simulations without importing them."""
        with formatter.section("Simulations"):
            formatter.write_dl(list(SIMULATIONS.items()))


def load_simulation(name: str) -> Simulator:
    """Import a simulation of the table."""
    simulator: Simulator = importlib.import_module(f"p2pmoe.cli.simulate_{name}").command
    return simulator


@click.group("simulate", cls=Simulate, no_args_is_help=False, subcommand_metavar="WHAT [OPTIONS]")
def command() -> None:
    """Run the real membership or DHT of many peers in virtual time. One seed, one trace."""


# ------------------------------------------------------------------ what simulations share
Progress = Callable[[float], None]  # so much of the whole is done, 0 to 1


@contextmanager
def open_progress(what: str) -> Iterator[Progress]:
    """A bar on stderr where that is a terminal, else nothing."""
    if not sys.stderr.isatty():
        yield lambda _done: None
        return
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=1.0)
        yield lambda done: bar.update(task, completed=done)


def part_of(progress: Progress, number: int, count: int) -> Progress:
    """The progress of one of so many runs, as that of the whole."""
    return lambda done: progress((number + done) / count)


def show(
    rows: Sequence[Mapping[str, Any]], *, as_json: bool, summary: Mapping[str, Any] | None = None
) -> None:
    """Print the summary and the rows, as one JSON object or as tables; a row is a line."""
    if as_json:
        finite = [_finite(each) for each in (summary or {}, *rows)]
        print(json.dumps({**finite[0], "rows": finite[1:]}))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if summary:
        facts = Table(box=box.SIMPLE, show_header=False)
        for name, value in summary.items():
            facts.add_row(name.replace("_", " "), _text(value))
        console.print(facts)
    if rows:
        table = Table(*(name.replace("_", " ") for name in rows[0]), box=box.SIMPLE)
        for row in rows:
            table.add_row(*map(_text, row.values()))
        console.print(table)


def _finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has neither infinity nor NaN: such a figure is null."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }


def _text(value: Any) -> str:
    return (
        f"{value:,.3g}"
        if isinstance(value, float) and value < 1000
        else (f"{value:,.0f}" if isinstance(value, float) else str(value))
    )


def write_plot(file: Path, svg: str) -> None:
    """Write a plot where the caller wants it."""
    from p2pmoe.errors import ConfigurationError

    try:
        file.write_text(svg, encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"cannot write {file}: {error.strerror}") from None

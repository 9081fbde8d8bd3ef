"""How `p2pmoe demo` shows what it does: a progress bar on a terminal, elsewhere lines.

Everything meanwhile goes to stderr; stdout is for the result.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, TextIO

import click
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from p2pmoe.cli.demo_training import DemoResult, View

EVERY = 5.0  # seconds between two lines where there is no terminal


class PlainView:
    """Lines on stderr."""

    def __init__(self, steps: int) -> None:
        self._steps, self._next = steps, 0.0

    def say(self, text: str) -> None:
        """One line."""
        click.echo(text, err=True)

    def progress(self, step: int, loss: float, experts_per_row: float) -> None:
        """A line, unless there was one just now."""
        if time.monotonic() >= self._next or step == self._steps:
            self._next = time.monotonic() + EVERY
            self.say(f"step {step}/{self._steps}  {_state(loss, experts_per_row)}")


class BarView:
    """A progress bar on stderr, and lines above it."""

    def __init__(self, steps: int, bar: Progress) -> None:
        self._bar = bar
        self._task = bar.add_task("", total=steps, state="starting")

    def say(self, text: str) -> None:
        """One line."""
        self._bar.console.print(text, highlight=False, markup=False)

    def progress(self, step: int, loss: float, experts_per_row: float) -> None:
        """Move the bar."""
        self._bar.update(self._task, completed=step, state=_state(loss, experts_per_row))


@contextmanager
def open_view(steps: int) -> Iterator[View]:
    """The view that suits where stderr goes."""
    if not sys.stderr.isatty():
        yield PlainView(steps)
        return
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        yield BarView(steps, bar)


def _state(loss: float, experts_per_row: float) -> str:
    return f"loss {loss:.3f}  {experts_per_row:.2f} experts a row"


def show_summary(result: DemoResult, stream: TextIO) -> None:
    """A table for people."""
    lost = "none" if not result.killed else f"{result.killed} by SIGKILL, half-way"
    rows = {
        "accuracy on held-out digits": f"{result.accuracy:.1%}",
        "  same model in plain torch": f"{result.accuracy_local:.1%}",
        "  experts never trained": f"{result.accuracy_frozen_experts:.1%}",
        "  no expert answers": f"{result.accuracy_without_experts:.1%}",
        "steps": f"{result.steps}, of which {result.failed_steps} failed",
        "servers": f"{result.peers}, killed: {lost}",
        "experts": f"{result.experts} in two grids",
        "updates an expert": f"{result.updates_per_expert:.0f}, at least {result.fewest_updates}",
        "experts a row, before the kill": f"{result.experts_per_row_before:.2f}",
        "experts a row, from 10 s after it": f"{result.experts_per_row_after:.2f}",
        "rows that no expert answered": f"{result.rows_without_survivors:.2%} of {result.rows:,}",
        "a step in the swarm": f"{result.milliseconds_per_step:.0f} ms",
        "all of it": f"{result.seconds:.0f} s",
    }
    table = Table(box=box.SIMPLE, show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    Console(file=stream).print(table)


def rounded(result: DemoResult) -> dict[str, float]:
    """The result as plain numbers, without digits that mean nothing."""
    return {name: round(value, 4) for name, value in asdict(result).items()}

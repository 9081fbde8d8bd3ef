"""`p2pmoe bench`: how fast it is here, by real processes on loopback, and compared to others.

What can be measured stands in `ITEMS`. Each prints one JSON line a run with `--json`, and a table
of its figures otherwise. `compare` reads two files of such lines, `table` makes the table of a page
of one; `baseline` measures how near the machine's own limits are, and what changed since.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from p2pmoe.cli.verbs import Verb

Line = dict[str, Any]
ITEMS = {
    "rpc": "One expert, callers in this process: latency, rows a second, megabytes a second.",
    "moe": "A mixture on two servers: training steps a second, and what choosing experts takes.",
    "beam": "Choosing experts alone.",
    "dht": "Peers of the DHT: storing and reading 1 KB values, also after a third was killed.",
    "footprint": "Memory and processes of an idle peer and of an idle server.",
    "startup": "Seconds from a server's start to its first answer.",
    "fault": "Training steps while one of two servers is killed, or one expert is slow.",
    "local": "The limits: the same work in plain torch, and a block behind nothing but TLS.",
}

ON_FILES = ("compare", "table", "baseline")


class Numbers(click.ParamType[tuple[int, ...]]):
    """Whole numbers with commas or crosses between them: `64,512`, `8x8`."""

    name = "N,N..."

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """The numbers; a usage error for anything else."""
        if isinstance(value, tuple):
            return value
        try:
            return tuple(int(part) for part in str(value).replace("x", ",").split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of whole numbers", param, ctx)


@click.command("bench", cls=Verb)
@click.argument("item", type=click.Choice([*ITEMS, *ON_FILES]), metavar="ITEM")
@click.argument("files", nargs=-1, type=click.Path(path_type=Path, dir_okay=False))
@click.option("--cls", type=click.Choice(["bench_nop", "bench_ffn"]), help="rpc: the expert.")
@click.option("--hidden", type=click.IntRange(min=1), help="Width of the rows.")
@click.option("--batch", type=click.IntRange(min=1), help="rpc, fault: rows of a large call.")
@click.option("--batches", type=Numbers(), help="moe, local: sizes of batches.")
@click.option("--concurrency", type=Numbers(), help="rpc: callers at once.")
@click.option("--grid", type=Numbers(), metavar="RxC", help="moe, beam, local: the experts.")
@click.option("--k", type=click.IntRange(min=1), help="Experts of a row.")
@click.option("--servers", type=click.IntRange(min=1), help="moe, fault: server processes.")
@click.option("--trainers", type=click.IntRange(min=1), help="moe: trainers at once.")
@click.option("--peers", type=click.IntRange(min=2), help="dht: peer processes.")
@click.option("--keys", type=click.IntRange(min=1), help="dht: values, and four times as many.")
@click.option("--width", type=click.IntRange(min=1), help="dht: operations at once.")
@click.option("--kill-third", type=click.Choice(["no", "both"]), help="dht: kill peers half-way.")
@click.option("--kill", type=click.Choice(["none", "tree"]), help="fault: kill a server.")
@click.option("--slow", type=float, help="fault: seconds that one expert sleeps at each call.")
@click.option("--before", type=float, help="fault: seconds before it.")
@click.option("--after", type=float, help="fault: seconds after it.")
@click.option("--experts", type=click.IntRange(min=1), help="footprint: of the server.")
@click.option("--threads", type=click.IntRange(min=1), help="local: of torch.")
@click.option("--seconds", type=float, help="Of one figure.")
@click.option("--beam", type=click.IntRange(min=1), help="moe, beam: single searches.")
@click.option(
    "--profile", type=click.Path(path_type=Path, dir_okay=False), help="moe: draw one step as SVG."
)
@click.option("--runs", type=click.IntRange(min=1), default=1, help="Lines to print.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line.")
@click.option("--plot", type=click.Path(path_type=Path), help="compare: draw the ratios as SVG.")
@click.option("--update", is_flag=True, help="baseline: keep what was measured.")
def command(
    *,
    item: str,
    files: tuple[Path, ...],
    runs: int,
    as_json: bool,
    plot: Path | None,
    update: bool,
    **options: Any,
) -> None:
    """Measure this installation on this machine.

    ITEM is rpc, moe, beam, dht, footprint, startup, fault or local. An item takes those of the
    options that its work has; without options it is the work that our figures are for. Or it is
    compare, table or baseline, which take files.

    \b
    p2pmoe bench rpc --json > ours.jsonl
    p2pmoe bench compare theirs.jsonl ours.jsonl
    p2pmoe bench table all.jsonl page.md
    p2pmoe bench baseline kept.json
    """  # noqa: D301  click wants the character itself
    given = {name: value for name, value in options.items() if value is not None}
    if item == "compare":
        _compare(files, as_json=as_json, plot=plot, refused=sorted(given))
        return
    if plot:
        raise click.UsageError(f"{item} draws nothing: only compare does")
    if item == "table":
        _table(files)
        return
    if item == "baseline":
        _baseline(files, given.get("seconds", 2.0), runs, update=update)
        return
    if files or update:
        raise click.UsageError(f"{item} takes no files: only {', '.join(ON_FILES)} do")
    for run in range(runs):
        for line in _run(item, given):
            _show(line, as_json=as_json)
        if run + 1 < runs and sys.stderr.isatty():
            print(f"run {run + 1} of {runs} is done", file=sys.stderr)


def _run(item: str, given: Mapping[str, Any]) -> Iterator[Line]:
    """The lines of one run of an item."""
    if item in {"footprint", "startup"}:
        from p2pmoe.bench import footprint

        extra = {} if item == "footprint" else {"skip_dht": True, "settle": 0.0}
        yield footprint.run(_params(footprint.FootprintParams, {**given, **extra}))
    elif item == "local":
        from p2pmoe.bench import bare, local, moe

        block = {name: given[name] for name in given if name != "grid" and name != "k"}
        yield local.run_block(_params(local.LocalParams, block))
        if batches := block.pop("batches", ()):
            block["batch"] = max(batches)
        yield bare.run(_params(bare.BareParams, block))
        layer = {
            name: given[name] for name in given if name not in {"threads", "hidden", "batches"}
        }
        yield local.run_mixture(_params(moe.MoeParams, layer), given.get("threads", 1))
    elif item in {"moe", "beam"}:
        from p2pmoe.bench import moe

        yield (moe.run if item == "moe" else moe.run_beam)(_params(moe.MoeParams, given))
    elif item == "rpc":
        from p2pmoe.bench import rpc

        yield rpc.run(_params(rpc.RpcParams, given))
    elif item == "dht":
        from p2pmoe.bench import dht

        yield dht.run(_params(dht.DhtParams, given))
    else:
        from p2pmoe.bench import fault

        yield fault.run(_params(fault.FaultParams, given))


def _params(kind: Callable[..., Any], given: Mapping[str, Any]) -> Any:
    """The work with these options; a usage error for those that it does not have."""
    known = kind.__dataclass_fields__  # type: ignore[attr-defined]  # every work is a dataclass
    if unknown := sorted(set(given) - set(known)):
        has = ", ".join("--" + name.replace("_", "-") for name in known)
        raise click.UsageError(f"this item has no --{unknown[0].replace('_', '-')}: it has {has}")
    return kind(**given)


def _show(line: Line, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(line), flush=True)
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table("", *_columns(line), box=box.SIMPLE, title=f"{line['bench']} by {line['system']}")
    for name, value in line["metrics"].items():
        cells = value if isinstance(value, dict) else {"": value}
        table.add_row(name, *(str(cells.get(column, "")) for column in _columns(line)))
    Console(highlight=False).print(table)


def _columns(line: Line) -> list[str]:
    """The names of figures, in the order in which they come."""
    rows = [value if isinstance(value, dict) else {"": value} for value in line["metrics"].values()]
    return list(dict.fromkeys(column for row in rows for column in row))


def _compare(
    files: tuple[Path, ...], *, as_json: bool, plot: Path | None, refused: list[str]
) -> None:
    from p2pmoe.bench.compare import bars, compare
    from p2pmoe.errors import ConfigurationError

    if len(files) != 2 or refused:
        raise click.UsageError("compare takes two files, of the other system and of ours")
    ratios = compare(*files)
    if not ratios:
        raise ConfigurationError(f"{files[0]} and {files[1]} have no figure in common")
    if plot:
        plot.write_text(bars(ratios), encoding="utf-8")
    for one in ratios:
        if as_json:
            fields = ("bench", "figure", "theirs", "ours", "better")
            print(json.dumps({name: getattr(one, name) for name in fields}))
        else:
            print(
                f"{one.better:10.3g} x  {one.bench}  {one.figure}  {one.theirs:g} -> {one.ours:g}"
            )


def _table(files: tuple[Path, ...]) -> None:
    from p2pmoe.bench.table import put, table

    match files:
        case (lines,):
            print(table(lines), end="")
        case (lines, page):
            put(lines, page)
        case _:
            raise click.UsageError("table takes a file of lines, and a page to put the table in")


def _baseline(files: tuple[Path, ...], seconds: float, runs: int, *, update: bool) -> None:
    from p2pmoe.bench import baseline

    if len(files) != 1:
        raise click.UsageError("baseline takes one file, of the ratios that were kept")
    kept = baseline.read(files[0])
    found = baseline.medians([baseline.measure(seconds) for _ in range(runs)])
    print("\n".join(baseline.differences(kept, found)))
    if update:
        baseline.write(files[0], found)

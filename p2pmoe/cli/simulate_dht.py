"""`p2pmoe simulate dht`: the real Kademlia of many peers; how long searches take, what is found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from p2pmoe.cli.simulate import Progress, Simulator, open_progress, part_of, show, write_plot
from p2pmoe.cli.units import DURATION, SECONDS, Quantity

if TYPE_CHECKING:
    from p2pmoe.testing.simulated_dht_churn import ChurnRun
    from p2pmoe.testing.simulator import Latency

ROUND_TRIP = Quantity("round trip", SECONDS, 0.001, "50ms or 300ms")  # a bare number: ms
REGIONS = ((0.2, 1.6, 2.8), (1.6, 0.3, 3.0), (2.8, 3.0, 0.4))  # of the mean round trip; a guess
SHOWN = ("nodes", "connections", "mean_ms", "sd_ms", "p99_ms", "hops", "messages", "dials", "found")
PARTS = (1 / 12, 1 / 4, 1.0)  # of the half-life that is given, in a chart of churn
CHARTS = {
    "time": ("Finding the best experts", "milliseconds", "mean_ms", 1.0),
    "hops": ("Hops of one read", "hops", "hops", 1.0),
    "found": ("How many of the best experts are found", "%", "found", 100.0),
}
CHURN_CHARTS = {
    "churn": ("Gets under churn", "% of gets", {"succeeded": 100.0, "fresh": 100.0}),
    "churn-time": ("Time of a get", "milliseconds", {"p50_ms": 1.0, "p99_ms": 1.0}),
    "churn-hops": ("Hops of a get", "hops", {"hops": 1.0}),
}
SMALLEST = 50  # peers, where a chart begins


class Share(click.ParamType):  # type: ignore[type-arg]  # generic only since click 8.5
    """A share of all: `30%`, or `0.3`."""

    name = "share"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """The share, below 1."""
        text = str(value).strip()
        try:
            share = float(text.removesuffix("%")) * (0.01 if text.endswith("%") else 1.0)
        except ValueError:
            share = -1.0
        if not 0 <= share < 1:
            self.fail(f"{text!r} is no share below all, such as 10% or 0.1", param, ctx)
        return share


SHARE = Share()


@click.command("dht", cls=Simulator)
@click.option("--nodes", type=click.IntRange(min=8), default=1000, help="How many peers.")
@click.option(
    "--experts",
    type=click.IntRange(min=1),
    default=4096,
    help="Cells of a square grid, all served.",
)
@click.option("--rtt", type=ROUND_TRIP, default="50ms", help="Mean round trip.")
@click.option(
    "--latency",
    type=click.Choice(["exponential", "lognormal", "regions", "constant"]),
    default="exponential",
    help="How round trips are distributed around their mean.",
)
@click.option("--dead", type=SHARE, default="0%", help="Share of table entries that are dead.")
@click.option("--adversaries", type=SHARE, default="0%", help="Share of peers that lie together.")
@click.option("--half-life", type=DURATION, help="Let peers come and go: half stay so long.")
@click.option(
    "--sessions",
    type=click.Choice(["exponential", "weibull", "lognormal"]),
    default="exponential",
    help="How long peers stay.",
)
@click.option("--searches", type=click.IntRange(min=1), default=100, help="For the best experts.")
@click.option("--gets", type=click.IntRange(min=1), default=200, help="Reads under churn, or lies.")
@click.option("--seed", type=int, default=1, help="The same seed gives the same answer.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write a chart (SVG) here, for 100, 1,000 and more peers, or several half-lives.",
)
@click.option(
    "--chart",
    type=click.Choice([*CHARTS, *CHURN_CHARTS]),
    default="time",
    help="What it shows: searches by peers, or gets by half-life (churn).",
)
def command(**options: Any) -> None:
    """Search a large grid for the best four experts, in a swarm whose peers know one another.

    Rows: with all connections up, and cold, with every dial charged. With adversaries or a
    half-life, also how many reads of records succeed.

    \b
    p2pmoe simulate dht --nodes 10000 --dead 10%
    p2pmoe simulate dht --nodes 1000 --adversaries 30% --half-life 1h
    """  # noqa: D301  click wants the character itself
    chart = options["chart"] if options["plot"] else ""
    if chart in CHURN_CHARTS:
        _churn(options)
        return
    sizes = _sizes(options["nodes"]) if chart else [options["nodes"]]
    with open_progress(f"{options['nodes']} peers") as progress:
        rows = _search_rows(options, sizes, part_of(progress, 0, 2))
        summary = _gets(options, part_of(progress, 1, 2))
    brief = rows if options["as_json"] else [{name: row[name] for name in SHOWN} for row in rows]
    show(brief, as_json=options["as_json"], summary=summary)
    if chart:
        write_plot(options["plot"], _chart(rows, chart))


def latency_of(kind: str, rtt: float) -> Latency:
    """The model of this name, `rtt` seconds there and back in the mean."""
    from p2pmoe.testing.simulator import Constant, Exponential, LogNormal, Regions

    match kind:
        case "constant":
            return Constant(rtt)
        case "lognormal":
            return LogNormal(rtt)
        case "regions":
            mean = sum(map(sum, REGIONS)) / 9
            return Regions([[each * rtt / mean for each in line] for line in REGIONS])
        case _:
            return Exponential(rtt)


def _search_rows(
    options: Mapping[str, Any], sizes: Sequence[int], progress: Progress
) -> list[dict[str, Any]]:
    from p2pmoe.testing.simulated_dht import Connections
    from p2pmoe.testing.simulated_dht_experts import SearchRun, measure

    latency, rows = latency_of(options["latency"], options["rtt"]), []
    kinds = [(size, kind) for size in sizes for kind in (Connections.UP, Connections.COLD)]
    for at, (size, kind) in enumerate(kinds):
        run = SearchRun(
            nodes=size,
            experts=options["experts"],
            latency=latency,
            dead=options["dead"],
            connections=kind,
            searches=options["searches"],
            seed=options["seed"],
        )
        figures = asdict(measure(run, part_of(progress, at, len(kinds))))
        rows.append({"nodes": figures.pop("nodes"), "connections": kind.value, **figures})
    return rows


def _gets(options: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """How reads of records fare among liars, and while peers come and go."""
    from p2pmoe.testing.simulated_dht_attacks import LiarsRun, measure_liars
    from p2pmoe.testing.simulated_dht_churn import measure

    found: dict[str, Any] = {}
    nodes, gets, seed = options["nodes"], options["gets"], options["seed"]
    if options["adversaries"]:
        share = options["adversaries"]
        paths = 2 if share <= 0.3 else 4  # hostile mode
        liars = LiarsRun(nodes=nodes, liars=share, paths=paths, gets=gets, seed=seed)
        among = asdict(measure_liars(liars, part_of(progress, 0, 2)))
        found |= {f"adversaries_{name}": value for name, value in among.items()}
    if options["half_life"]:
        under = asdict(measure(_churn_run(options), part_of(progress, 1, 2)))
        found |= {f"churn_{name}": value for name, value in under.items()}
    return found


def _churn_run(options: Mapping[str, Any]) -> ChurnRun:
    from p2pmoe.testing.simulated_dht_churn import ChurnRun

    return ChurnRun(
        nodes=options["nodes"],
        half_life=options["half_life"],
        kind=options["sessions"],
        records=min(options["gets"], 200),
        gets=options["gets"],
        duration=options["half_life"],
        latency=latency_of(options["latency"], options["rtt"]),
        seed=options["seed"],
    )


def _churn(options: Mapping[str, Any]) -> None:
    """Gets at several half-lives, up to the one that was given."""
    from p2pmoe.testing.plot import line_chart
    from p2pmoe.testing.simulated_dht_churn import measure

    longest, rows = options["half_life"] or 3600.0, []
    with open_progress(f"{options['nodes']} peers") as progress:
        for at, part in enumerate(PARTS):
            run = _churn_run({**options, "half_life": longest * part})
            figures = asdict(measure(run, part_of(progress, at, len(PARTS))))
            rows.append({"half_life": run.half_life, **figures})
    show(rows, as_json=options["as_json"])
    title, unit, columns = CHURN_CHARTS[options["chart"]]
    points = [(row["half_life"] / 60, {**row, "fresh": 1.0 - row["stale"]}) for row in rows]
    series = {
        name.replace("_ms", ""): [(minutes, row[name] * factor) for minutes, row in points]
        for name, factor in columns.items()
    }
    title = f"{title}, {options['nodes']:,} peers"
    chart = line_chart(series, title, "half-life of a session, minutes", unit, log_x=True)
    write_plot(options["plot"], chart)


def _sizes(nodes: int) -> list[int]:
    """50, 100, 200, 500 and so on up to so many peers, and so many."""
    sizes = [step * 10**power for power in range(1, 8) for step in (1, 2, 5)]
    return [size for size in sizes if SMALLEST <= size < nodes] + [nodes]


def _chart(rows: Sequence[Mapping[str, Any]], kind: str) -> str:
    from p2pmoe.testing.plot import line_chart

    title, unit, column, factor = CHARTS[kind]
    series = {
        f"connections {state}": [
            (row["nodes"], row[column] * factor) for row in rows if row["connections"] == state
        ]
        for state in ("up", "cold")
    }
    return line_chart(series, title, "peers", unit, log_x=True)

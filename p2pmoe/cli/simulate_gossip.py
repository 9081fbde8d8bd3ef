"""`p2pmoe simulate gossip`: the real membership machines of many peers, and what befalls them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from p2pmoe.cli.simulate import Simulator, open_progress, part_of, show, write_plot
from p2pmoe.cli.units import DURATION, SECONDS, Quantity

if TYPE_CHECKING:
    from p2pmoe.testing.simulated_gossip_runs import Outcome, Scenario

ROUND_TRIP = Quantity("round trip", SECONDS, 0.001, "2ms or 300ms")  # a bare number: ms
SHARE = click.FloatRange(0, 0.9)


@click.command("gossip", cls=Simulator)
@click.option("--nodes", type=click.IntRange(min=2), default=100, help="How many members.")
@click.option("--seed", type=int, default=1, help="Of the first run; the next has the next one.")
@click.option("--runs", type=click.IntRange(min=1), default=1, help="How many runs.")
@click.option(
    "--crash", type=click.IntRange(min=0), default=1, help="Processes that are killed, at once."
)
@click.option(
    "--silent", type=click.IntRange(min=0), default=0, help="Hosts that fall silent, at once."
)
@click.option("--loss", type=SHARE, default=0.0, help="Share of packets lost.")
@click.option("--rtt", type=ROUND_TRIP, default="2ms", help="Mean round trip.")
@click.option(
    "--starved", type=SHARE, default=0.0, help="Share of members that read only now and then."
)
@click.option(
    "--pause", type=DURATION, default="0s", help="Longest pause of a process now and then."
)
@click.option(
    "--link",
    type=click.Choice(["stream", "datagram"]),
    default="stream",
    help="Whether a lost packet is late or gone.",
)
@click.option("--no-lifeguard", is_flag=True, help="Plain SWIM, for comparison.")
@click.option("--warm-up", type=DURATION, default="6s", help="Before anything happens.")
@click.option("--seconds", type=DURATION, default="30s", help="What is simulated after that.")
@click.option("--spread", is_flag=True, help="Time one rumour instead: nobody crashes.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option(
    "--plot", type=click.Path(path_type=Path, dir_okay=False), help="Write a chart (SVG) here."
)
def command(**options: Any) -> None:
    """Run the membership of many peers, kill some, and see who notices, how soon, at what cost.

    A killed process is refused at once by its host; a silent host answers nothing. Times are until
    every live member knows.

    \b
    p2pmoe simulate gossip --nodes 100 --crash 1 --loss 0.01 --runs 20
    p2pmoe simulate gossip --nodes 1000 --crash 0 --seconds 60 --rtt 50ms
    p2pmoe simulate gossip --nodes 1000 --spread --loss 0.3
    """  # noqa: D301  click wants the character itself
    context, deaths = click.get_current_context(), options["crash"] + options["silent"]
    if deaths >= options["nodes"]:
        raise click.UsageError("somebody has to live on: more --nodes", context)
    if options["plot"] and not deaths and not options["spread"]:
        raise click.UsageError("--plot shows deaths: --crash or --silent; or --spread", context)
    (_time_spread if options["spread"] else _time_deaths)(options)


def scenario_of(options: dict[str, Any]) -> Scenario:
    """What the options describe."""
    from p2pmoe.gossip.membership import MembershipParams
    from p2pmoe.testing.links import LinkParams
    from p2pmoe.testing.simulated_gossip import SwarmParams
    from p2pmoe.testing.simulated_gossip_runs import Scenario, plain_swim
    from p2pmoe.testing.simulator import LogNormal

    links = LinkParams(
        latency=LogNormal(options["rtt"], 0.2),
        stream=options["link"] == "stream",
        loss=options["loss"],
    )
    membership = MembershipParams()
    if options["no_lifeguard"]:
        membership = plain_swim(membership)
    taken = {"nodes", "crash", "silent", "starved", "pause", "warm_up", "seconds"}
    return Scenario(
        swarm=SwarmParams(links=links, membership=membership),
        **{name: options[name] for name in taken},
    )


def _time_deaths(options: dict[str, Any]) -> None:
    from p2pmoe.testing.plot import line_chart
    from p2pmoe.testing.simulated_gossip_runs import known_shares, run, summary

    scenario, runs = scenario_of(options), options["runs"]
    with open_progress(f"{options['nodes']} members") as progress:
        outcomes = [
            run(scenario, options["seed"] + number, part_of(progress, number, runs))
            for number in range(runs)
        ]
    show(
        [_row(outcome) for outcome in outcomes],
        as_json=options["as_json"],
        summary=summary(outcomes),
    )
    if options["plot"]:
        title = f"Who knows of a death, {options['nodes']} members"
        chart = line_chart(known_shares(outcomes), title, "seconds after it", "% know")
        write_plot(options["plot"], chart)


def _row(outcome: Outcome) -> dict[str, Any]:
    """One run, for a line of a table."""
    from p2pmoe.testing.simulated_gossip_runs import share_below

    times = [death.everywhere for death in outcome.deaths]
    return {
        "seed": outcome.seed,
        "deaths": len(times),
        "known_median": share_below(times, 0.5),
        "known_most": max(times, default=0.0),
        "false_deaths": outcome.false_deaths,
        "suspicions": outcome.false_suspicions,
        "messages": outcome.messages,
        "bytes": outcome.bytes,
        "digest": outcome.digest[:8],
    }


def _time_spread(options: dict[str, Any]) -> None:
    from p2pmoe.testing.plot import line_chart
    from p2pmoe.testing.simulated_gossip_runs import share_below, spread

    scenario, runs, lines = scenario_of(options), options["runs"], {}
    with open_progress(f"{options['nodes']} members") as progress:
        for number in range(runs):
            seed = options["seed"] + number
            lines[seed] = spread(scenario.swarm, options["nodes"], seed)
            progress((number + 1) / runs)
    rows = [
        {"seed": seed, **{f"t{share}": share_below(times, share / 100) for share in (50, 99, 100)}}
        for seed, times in lines.items()
    ]
    show(rows, as_json=options["as_json"], summary={"members": options["nodes"], "runs": runs})
    if options["plot"]:
        shares = {
            f"seed {seed}": [
                (t, 100 * (at + 1) / len(times)) for at, t in enumerate(times) if t < 60
            ]
            for seed, times in lines.items()
        }
        write_plot(options["plot"], line_chart(shares, "How a rumour spreads", "seconds", "% know"))

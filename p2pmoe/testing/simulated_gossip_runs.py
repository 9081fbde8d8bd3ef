"""Experiments on a simulated swarm: who notices a death and when, how news spread, what it costs.

Each takes a seed and gives an outcome that is a value; many seeds are put together by `summary`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from p2pmoe.gossip.membership import MembershipParams, State
from p2pmoe.testing.simulated_gossip import SimulatedSwarm, Starved, SwarmParams

Progress = Callable[[float], None]  # so much of the whole is done, 0 to 1


def _quiet(_done: float) -> None:
    """Nobody watches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """What happens to a settled swarm. Seconds; shares between 0 and 1."""

    swarm: SwarmParams
    nodes: int = 100
    crash: int = 0  # processes killed, all at one moment after the warm-up
    silent: int = 0  # hosts that fall silent at that moment
    starved: float = 0.0  # share of members that read now and then only
    starving: Starved = field(default_factory=Starved)
    pause: float = 0.0  # the longest pause of a member now and then; 0: none
    warm_up: float = 6.0
    seconds: float = 30.0  # after the warm-up


@dataclass(frozen=True, slots=True)
class Death:
    """One death, and how long after it the live members took it for dead. Seconds."""

    subject: int
    silent: bool
    known: Sequence[float]  # when each live member knew, in order
    missing: int  # live members who did not know at the end

    @property
    def everywhere(self) -> float:
        """When the last one knew; `inf` if somebody never did."""
        return math.inf if self.missing else max(self.known, default=0.0)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one run gave. Rates are those of one member, a second, after the warm-up."""

    seed: int
    deaths: Sequence[Death]
    false_deaths: int  # of live members that read all the time, as Lifeguard counts them
    starved_deaths: int  # of starved members, which did not answer
    false_suspicions: int  # of both
    messages: float
    bytes: float
    dials: float
    disagreements: int
    digest: str


def run(scenario: Scenario, seed: int, progress: Progress = _quiet) -> Outcome:
    """One run of a scenario."""
    swarm = SimulatedSwarm(seed, scenario.swarm, scenario.nodes)
    dice = swarm.simulation.dice("victims")
    victims = dice.sample(range(scenario.nodes), scenario.crash + scenario.silent)
    others = [number for number in range(scenario.nodes) if number not in set(victims)]
    starved = dict.fromkeys(dice.sample(others, round(scenario.starved * scenario.nodes)))
    swarm.start_settled()
    total = scenario.warm_up + scenario.seconds
    _watch(swarm, scenario.warm_up, total, progress)
    tally = swarm.links.tally
    before = tally.messages, tally.bytes, tally.dials
    for number in starved:
        swarm.starve(number, scenario.starving, total)
    if scenario.pause:
        pause_now_and_then(swarm, scenario.pause, total)
    at = swarm.now + dice.random()
    for place, victim in enumerate(victims):
        swarm.simulation.at(at, swarm.members[victim].end, place >= scenario.crash)
    _watch(swarm, scenario.seconds, total, progress)
    deaths = [
        _death(swarm, victim, place >= scenario.crash, at) for place, victim in enumerate(victims)
    ]
    wrong = [seen for seen in swarm.seen if seen.wrong]
    dead = [seen for seen in wrong if seen.state is State.DEAD]
    per = scenario.nodes * scenario.seconds
    return Outcome(
        seed=seed,
        deaths=deaths,
        false_deaths=sum(seen.subject not in starved for seen in dead),
        starved_deaths=sum(seen.subject in starved for seen in dead),
        false_suspicions=sum(seen.state is State.SUSPECT for seen in wrong),
        messages=(tally.messages - before[0]) / per,
        bytes=(tally.bytes - before[1]) / per,
        dials=(tally.dials - before[2]) / per,
        disagreements=len(swarm.disagreements()),
        digest=swarm.digest(),
    )


def _watch(swarm: SimulatedSwarm, seconds: float, total: float, progress: Progress) -> None:
    """Run so long, in steps."""
    ends = swarm.now + seconds
    while swarm.now < ends:
        swarm.run(min(1.0, ends - swarm.now))
        progress(swarm.now / total)


def _death(swarm: SimulatedSwarm, victim: int, silent: bool, at: float) -> Death:
    known: dict[int, float] = {}
    for seen in swarm.seen:
        if seen.subject == victim and seen.state is State.DEAD and seen.when >= at:
            known.setdefault(seen.observer, seen.when - at)
    living = [member.index for member in swarm.living]
    times = sorted(known[number] for number in living if number in known)
    return Death(victim, silent, times, len(living) - len(times))


def pause_now_and_then(swarm: SimulatedSwarm, longest: float, until: float) -> None:
    """One member after the other stops for a moment, about one a second."""
    if swarm.now >= until:
        return
    number = swarm.dice.choice([member.index for member in swarm.living])
    length = swarm.dice.uniform(0, longest)
    swarm.pause(number, length)
    again = length + swarm.dice.expovariate(1.0)
    swarm.simulation.after(again, pause_now_and_then, swarm, longest, until)


def spread(params: SwarmParams, nodes: int, seed: int, seconds: float = 10.0) -> list[float]:
    """After how many seconds each other member has a record that one signs anew; `inf`: not yet.

    Packets get lost from that moment on: what losses of minutes do to a swarm is another matter.
    """
    links = replace(params.links, loss=0.0)
    swarm = SimulatedSwarm(seed, replace(params, links=links), nodes)
    swarm.start_settled()
    swarm.run(3.0)
    swarm.links.params = params.links
    subject = swarm.members[swarm.dice.randrange(nodes)]
    informed = dict[int, float]()
    order, begun = subject.renew(), swarm.now

    def look(number: int) -> None:
        core = swarm.members[number].core
        entry = core.member(subject.peer) if core else None
        if number not in informed and entry and entry.record.body.order >= order:
            informed[number] = swarm.now - begun

    swarm.after_reading = look
    while swarm.now < begun + seconds and len(informed) < nodes - 1:
        swarm.run(0.1)
    others = (number for number in range(nodes) if number != subject.index)
    return sorted(informed.get(number, math.inf) for number in others)


def plain_swim(params: MembershipParams) -> MembershipParams:
    """The same without Lifeguard: no local health, suspicions of one length, no buddy."""
    suspicion = replace(params.roster.suspicion, lifeguard=False)
    return replace(params, lifeguard=False, roster=replace(params.roster, suspicion=suspicion))


# ------------------------------------------------------------------------------------- summing up
def share_below(values: Sequence[float], share: float) -> float:
    """The value that this share of them does not exceed; NaN of none."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Figures of many runs together; times are until everybody knows, seconds."""
    deaths = [death for outcome in outcomes for death in outcome.deaths]
    count = len(outcomes)
    figures: dict[str, Any] = {"runs": count}
    for name, silent in (("killed", False), ("silent", True)):
        times = [death.everywhere for death in deaths if death.silent == silent]
        if times:
            first = [death.known[0] for death in deaths if death.silent == silent and death.known]
            figures |= {
                f"{name}_first_known": share_below(first, 0.5),
                f"{name}_median": share_below(times, 0.5),
                f"{name}_p99": share_below(times, 0.99),
                f"{name}_most": max(times),
            }
    return figures | {
        "false_deaths": sum(outcome.false_deaths for outcome in outcomes),
        "runs_with_false_deaths": sum(outcome.false_deaths > 0 for outcome in outcomes),
        "starved_deaths": sum(outcome.starved_deaths for outcome in outcomes),
        "false_suspicions": sum(outcome.false_suspicions for outcome in outcomes),
        "messages_per_member_second": sum(outcome.messages for outcome in outcomes) / count,
        "bytes_per_member_second": sum(outcome.bytes for outcome in outcomes) / count,
        "dials_per_member_second": sum(outcome.dials for outcome in outcomes) / count,
    }


def known_shares(outcomes: Sequence[Outcome]) -> Mapping[str, list[tuple[float, float]]]:
    """By kind of death, points (seconds, per cent of the live members who know)."""
    lines = {}
    for name, silent in (("killed process", False), ("silent host", True)):
        deaths = [d for o in outcomes for d in o.deaths if d.silent == silent]
        times = sorted(time for death in deaths for time in death.known)
        total = len(times) + sum(death.missing for death in deaths)
        if total:
            step = max(1, len(times) // 200)
            points = [(times[at], 100 * (at + 1) / total) for at in range(0, len(times), step)]
            last = [(times[-1], 100 * len(times) / total)] if times else []
            lines[name] = [(0.0, 0.0), *points, *last]
    return lines

"""The figures that the membership promises: how soon a death is known, what it costs, how news run.

Short ones here; those of the documentation, with their thousands of runs, are long profiles.
"""

from __future__ import annotations

from typing import Any

import pytest

from p2pmoe.gossip.membership import MembershipParams
from p2pmoe.testing.links import LinkParams
from p2pmoe.testing.simulated_gossip import Starved, SwarmParams
from p2pmoe.testing.simulated_gossip_runs import (
    Outcome,
    Scenario,
    known_shares,
    plain_swim,
    run,
    share_below,
    spread,
    summary,
)
from p2pmoe.testing.simulator import LogNormal


def swarm(rtt: float, *, loss: float = 0.01, lifeguard: bool = True) -> SwarmParams:
    links = LinkParams(latency=LogNormal(rtt, 0.2), loss=loss)
    plain = plain_swim(MembershipParams())
    return SwarmParams(links=links, membership=MembershipParams() if lifeguard else plain)


def scenario(rtt: float, *, lifeguard: bool = True, **facts: Any) -> Scenario:
    return Scenario(swarm=swarm(rtt, lifeguard=lifeguard), **facts)


def deaths_are_known_in_time(outcomes: list[Outcome], *, p99: float) -> None:
    figures = summary(outcomes)
    assert figures["false_deaths"] == 0
    assert figures["killed_median"] <= 4.0
    assert figures["killed_p99"] <= 8.0
    assert figures["silent_median"] <= 8.0
    assert figures["silent_p99"] <= p99


@pytest.mark.parametrize("rtt", [0.002, 0.3])
def test_a_killed_process_is_known_everywhere_within_seconds(rtt: float) -> None:
    story = scenario(rtt, nodes=50, crash=2, silent=1, warm_up=3.0, seconds=20.0)
    deaths_are_known_in_time([run(story, seed) for seed in range(2)], p99=20.0)


def test_messages_of_a_member_do_not_grow_with_the_swarm() -> None:
    small, large = (run(scenario(0.05, nodes=n, seconds=12.0), 1) for n in (50, 150))
    assert large.messages == pytest.approx(small.messages, rel=0.2)
    assert large.bytes < 10_000
    assert large.false_suspicions == 0


def test_a_rumour_is_everywhere_within_a_second() -> None:
    times = spread(swarm(0.05, loss=0.0), 200, 1)
    assert share_below(times, 0.99) < 1.0
    assert len(times) == 199


def test_who_reads_now_and_then_only_takes_nobody_for_dead_that_answers() -> None:
    starving = Starved(deaf=3.0, reads=0.5)
    with_and_without = [
        run(
            scenario(
                0.002,
                lifeguard=lifeguard,
                nodes=20,
                starved=0.1,
                starving=starving,
                warm_up=3.0,
                seconds=60.0,
            ),
            2,
        )
        for lifeguard in (True, False)
    ]
    assert [outcome.false_deaths > 0 for outcome in with_and_without] == [False, True]


def test_what_nobody_noticed_in_time_counts_as_never_known() -> None:
    outcome = run(scenario(0.002, nodes=6, silent=1, warm_up=1.0, seconds=2.0), 1)
    (death,) = outcome.deaths
    assert (death.known, death.missing, death.everywhere) == ([], 5, float("inf"))
    assert known_shares([outcome]) == {"silent host": [(0.0, 0.0)]}
    assert share_below([], 0.5) != share_below([], 0.5)


# ------------------------------------------------------------------------- those of the documents
@pytest.mark.soak
@pytest.mark.parametrize("rtt", [0.002, 0.3])
def test_among_a_hundred_a_thousand_deaths_are_known_in_time_and_nobody_dies_falsely(
    rtt: float,
) -> None:
    story = scenario(rtt, nodes=100, crash=1, silent=1, warm_up=3.0, seconds=20.0)
    deaths_are_known_in_time([run(story, seed) for seed in range(1000)], p99=20.0)


@pytest.mark.soak
def test_among_a_hundred_lifeguard_saves_nineteen_of_twenty() -> None:
    deaths = [
        sum(
            run(
                scenario(0.002, lifeguard=on, nodes=100, starved=0.1, seconds=40.0), seed
            ).false_deaths
            for seed in range(10)
        )
        for on in (True, False)
    ]
    assert 20 * deaths[0] <= deaths[1] > 0


@pytest.mark.soak
def test_from_fifty_to_two_thousand_members_messages_stay_the_same() -> None:
    found = [run(scenario(0.05, nodes=n, seconds=30.0), 1) for n in (50, 200, 1000, 2000)]
    for outcome in found[1:]:
        assert outcome.messages == pytest.approx(found[0].messages, rel=0.2)
    assert found[2].bytes <= 10_000


@pytest.mark.soak
@pytest.mark.parametrize(("loss", "limit"), [(0.0, 1.5), (0.3, 2.5)])
def test_a_rumour_reaches_nearly_all_of_a_thousand_in_time(loss: float, limit: float) -> None:
    assert share_below(spread(swarm(0.05, loss=loss), 1000, 1), 0.99) <= limit

"""The heap of actions in virtual time, and the latency models."""

from __future__ import annotations

import random
import statistics

import pytest

from p2pmoe.testing.simulator import Constant, Exponential, Latency, LogNormal, Regions, Simulation


def test_actions_run_in_the_order_of_time_and_then_of_asking() -> None:
    simulation, ran = Simulation(1), []
    for when, what in ((2.0, "c"), (1.0, "a"), (1.0, "b"), (0.5, "first")):
        simulation.at(when, ran.append, what)
    simulation.run(until=1.0)
    assert (ran, simulation.now) == (["first", "a", "b"], 1.0)
    simulation.at(0.1, ran.append, "late, so now")
    simulation.after(0.5, ran.append, "in between")
    simulation.run()
    assert ran == ["first", "a", "b", "late, so now", "in between", "c"]
    assert (simulation.now, simulation.events) == (2.0, 6)


def test_a_stream_of_chance_depends_on_the_seed_and_its_name_alone() -> None:
    first, again = Simulation(5).dice("links"), Simulation(5).dice("links")
    assert first.random() == again.random()
    assert Simulation(5).dice("other").random() != Simulation(6).dice("other").random()


@pytest.mark.parametrize(
    "latency", [Constant(0.2), Exponential(0.2), LogNormal(0.2), Regions([[0.2]], 0.5)]
)
def test_every_latency_model_has_the_round_trip_that_it_names(latency: Latency) -> None:
    dice = random.Random(1)
    trips = [latency.one_way(3, 4, dice) + latency.one_way(4, 3, dice) for _ in range(4000)]
    assert statistics.fmean(trips) == pytest.approx(0.2, rel=0.05)
    assert min(trips) > 0


def test_regions_are_near_themselves_and_far_from_others() -> None:
    latency, dice = Regions([[0.01, 0.2], [0.2, 0.01]]), random.Random(1)
    assert latency.one_way(0, 2, dice) < 0.02 < latency.one_way(0, 1, dice)

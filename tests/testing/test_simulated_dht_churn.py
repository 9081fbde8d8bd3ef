"""Records while peers come and go: found, fresh, and lost no more often than chance allows."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from p2pmoe.dht.search import SEARCH_LIMIT
from p2pmoe.testing.simulated_dht_churn import (
    ChurnFigures,
    ChurnRun,
    measure,
    residual,
    sessions,
    wilson,
)

HOUR = 3600.0
SOAK = ChurnRun(nodes=100, half_life=HOUR / 4, duration=5 / 16 * HOUR)  # of five announcements
SEEDS = range(1, 11)


def share_below(kind: str, limit: float) -> float:
    draw, dice = sessions(kind, 2 * HOUR), random.Random(1)
    return sum(draw(dice) <= limit for _ in range(4000)) / 4000


@pytest.mark.parametrize("kind", ["weibull", "lognormal"])
def test_fitted_sessions_go_through_both_published_points(kind: str) -> None:
    assert share_below(kind, 2 * HOUR) == pytest.approx(0.5, abs=0.03)
    assert share_below(kind, 8 * HOUR) == pytest.approx(0.8, abs=0.03)


def test_half_of_all_sessions_last_a_half_life() -> None:
    assert share_below("exponential", 2 * HOUR) == pytest.approx(0.5, abs=0.03)
    with pytest.raises(ValueError, match="forever"):
        sessions("forever", 1.0)


def test_who_is_there_at_first_stays_for_the_rest_of_a_long_session() -> None:
    dice = random.Random(2)
    draw = sessions("exponential", HOUR)
    left = [residual(draw, dice) for _ in range(2000)]
    assert sum(left) / len(left) == pytest.approx(HOUR / 0.6931, rel=0.1)  # no memory: a whole one


def test_an_interval_holds_the_share_and_tells_nothing_of_nothing() -> None:
    low, high = wilson(5, 100)
    assert low < 0.05 < high
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 100)[0] == 0.0


def assert_holds(figures: ChurnFigures) -> None:
    assert figures.succeeded >= 0.999
    assert figures.missed == 0
    assert figures.stale <= 0.01
    assert figures.slowest_ms <= SEARCH_LIMIT * 1000
    assert figures.lost_low <= 3 * figures.bound


@pytest.mark.parametrize("kind", ["lognormal"])
def test_records_are_found_while_peers_come_and_go(kind: str) -> None:
    run = ChurnRun(nodes=40, records=12, gets=150, half_life=600.0, duration=900.0, kind=kind)
    seen: list[float] = []
    figures = measure(run, seen.append)
    assert figures.gets == run.gets
    assert figures.joined > 10
    assert_holds(figures)
    assert seen == sorted(seen)


def assert_few_are_lost(runs: list[ChurnFigures]) -> None:
    """The upper end of the 95 % interval of all runs together decides."""
    lost, holdings = sum(run.lost for run in runs), sum(run.holdings for run in runs)
    low, high = wilson(lost, holdings)
    said = f"{lost} of {holdings} lost: {low:.1e} to {high:.1e}, bound {runs[0].bound:.1e}"
    print(*runs, said, sep="\n")  # noqa: T201  the figures
    assert high <= 3 * runs[0].bound, said


@pytest.mark.soak
def test_of_a_hundred_thousand_gets_under_churn_a_thousandth_fails_at_most() -> None:
    """By ten seeds, more than a half-life each; readers repair what they meet."""
    run = replace(SOAK, records=1000, gets=10_000)
    runs = [measure(replace(run, seed=seed)) for seed in SEEDS]
    for figures in runs:
        assert_holds(figures)
    assert_few_are_lost(runs)


@pytest.mark.soak
def test_without_a_reader_no_more_records_are_lost_than_the_bound_says() -> None:
    """Nobody reads, so nothing is repaired."""
    run = replace(SOAK, records=2000, gets=1)
    runs = [measure(replace(run, seed=seed)) for seed in SEEDS]
    assert sum(figures.holdings for figures in runs) >= 98_000
    assert_few_are_lost(runs)

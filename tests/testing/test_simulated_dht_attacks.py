"""Attacks on a simulated swarm: liars, ground ids, a crowd at the door, a flood."""

from __future__ import annotations

from dataclasses import replace

import pytest

from p2pmoe.testing.simulated_dht_attacks import (
    LiarsRun,
    measure_crowd,
    measure_flood,
    measure_ground_ids,
    measure_liars,
)

MEGABYTE = 1 << 20
THIRTY = LiarsRun(nodes=200, liars=0.3, paths=2, gets=40)
FIFTY = replace(THIRTY, liars=0.5, paths=4, gets=20)


def test_with_thirty_percent_liars_records_are_found_by_two_paths() -> None:
    seen: list[float] = []
    assert measure_liars(THIRTY, seen.append).succeeded >= 0.99
    assert seen[-1] == 1.0


def test_with_fifty_percent_liars_records_are_found_in_hostile_mode() -> None:
    figures = measure_liars(FIFTY)
    assert figures.succeeded >= 0.95  # one of 20 may lie among liars only
    assert figures.messages <= 4 * 32


@pytest.mark.parametrize("kind", ["silent", "poison"])
def test_among_silent_peers_and_poisoners_records_are_found_in_hostile_mode(kind: str) -> None:
    run = replace(THIRTY, liars=0.2, paths=4, gets=6, kind=kind)
    assert measure_liars(run).succeeded == 1.0


def test_a_record_is_found_behind_twenty_ids_ground_next_to_its_key() -> None:
    assert measure_ground_ids(LiarsRun(nodes=150, ground=20), keys=2).succeeded == 1.0


def test_poisoners_do_not_hide_a_dictionary_from_who_reads_by_two_paths() -> None:
    assert measure_liars(replace(THIRTY, kind="poison")).succeeded >= 0.97  # one of 40 may fail


@pytest.mark.parametrize("networks", [1, 16])
def test_a_crowd_of_fresh_ids_gets_few_places(networks: int) -> None:
    """However many networks it has, and although it names its own to every lookup."""
    figures = measure_crowd(nodes=1000, connections=500, networks=networks, seed=1)
    assert figures.honest_after == figures.honest_before
    assert figures.honest >= 0.9


def test_a_publisher_without_end_takes_little_room_and_keeps_nobody_out() -> None:
    figures = measure_flood(offers=3000, others=60, seed=1)
    assert figures.others >= 0.99
    assert 0 < figures.stored < figures.offered
    assert figures.grown < 32 * MEGABYTE


# ------------------------------------------------------------------------------- at full size
@pytest.mark.soak
@pytest.mark.parametrize(
    ("run", "bar"),
    [
        (LiarsRun(gets=1000), 0.99),
        (LiarsRun(gets=1000, liars=0.5, paths=4), 0.98),
        (LiarsRun(gets=1000, kind="poison"), 0.99),
    ],
    ids=["a third", "half", "a third poisons"],
)
def test_of_a_thousand_gets_among_liars_hardly_any_fails(run: LiarsRun, bar: float) -> None:
    figures = measure_liars(run)
    print(figures)  # noqa: T201  the figures
    assert figures.succeeded >= bar


@pytest.mark.soak
def test_of_two_hundred_keys_with_twenty_ground_ids_each_hardly_any_is_hidden() -> None:
    figures = measure_ground_ids(LiarsRun(ground=20), keys=200)
    print(figures)  # noqa: T201  the figures
    assert figures.succeeded >= 0.99


@pytest.mark.soak
@pytest.mark.parametrize("networks", [1, 16, 4096])
def test_of_ten_thousand_fresh_ids_few_get_a_place(networks: int) -> None:
    crowd = measure_crowd(nodes=1000, connections=10_000, networks=networks, seed=1)
    print(crowd, crowd.honest)  # noqa: T201  the figures
    assert crowd.honest >= 0.9


@pytest.mark.soak
def test_a_million_offers_of_one_publisher_take_little_room_and_keep_nobody_out() -> None:
    flood = measure_flood(offers=1_000_000, others=1000, seed=1)
    print(flood)  # noqa: T201  the figures
    assert flood.grown < 32 * MEGABYTE
    assert flood.others >= 0.99

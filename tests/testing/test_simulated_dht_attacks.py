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


@pytest.mark.soak
def test_at_full_size_the_bars_hold_against_every_attack() -> None:
    assert measure_liars(LiarsRun(gets=1000)).succeeded >= 0.99
    assert measure_liars(LiarsRun(gets=1000, liars=0.5, paths=4)).succeeded >= 0.98
    assert measure_ground_ids(LiarsRun(ground=20), keys=200).succeeded >= 0.99
    assert measure_liars(LiarsRun(gets=1000, kind="poison")).succeeded >= 0.99
    for networks in (1, 16, 4096):
        crowd = measure_crowd(nodes=1000, connections=10_000, networks=networks, seed=1)
        assert crowd.honest >= 0.9
    flood = measure_flood(offers=1_000_000, others=1000, seed=1)
    assert flood.grown < 32 * MEGABYTE
    assert flood.others >= 0.99

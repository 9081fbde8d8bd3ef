"""Hash rings: how many neighbours, who has whom, and what churn moves."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pmoe.gossip.neighbours import RINGS, Rings, places
from p2pmoe.identity import PeerId
from tests.gossip.people import people


def rings_of(own: PeerId, others: list[PeerId]) -> Rings:
    rings = Rings(own)
    for other in others:
        if other != own:
            rings.add(other)
    return rings


def graph(ids: list[PeerId]) -> dict[PeerId, tuple[PeerId, ...]]:
    return {own: rings_of(own, ids).neighbours() for own in ids}


IDS = [person.id for person in people(200)]


def test_whoever_is_alone_has_no_neighbours() -> None:
    assert Rings(IDS[0]).neighbours() == ()
    assert Rings(IDS[0]).peers() == []


@pytest.mark.parametrize("n", [2, 3, 8, 9, 10, 17, 18, 60, 200])
def test_everybody_has_between_eight_and_sixteen_neighbours_or_all(n: int) -> None:
    for own, found in graph(IDS[:n]).items():
        assert own not in found
        assert len(set(found)) == len(found)
        assert min(RINGS, n - 1) <= len(found) <= 2 * RINGS


def test_neighbours_are_neighbours_of_each_other() -> None:
    found = graph(IDS)
    assert all(own in found[other] for own in found for other in found[own])


def test_everybody_has_about_sixteen_monitors() -> None:
    watched = Counter(other for found in graph(IDS).values() for other in found)
    assert set(watched) == set(IDS)
    assert min(watched.values()) >= RINGS
    assert max(watched.values()) <= 2 * RINGS


def test_a_rumour_reaches_two_hundred_in_three_steps() -> None:
    found = graph(IDS)
    reached, edge = {IDS[0]}, {IDS[0]}
    for _ in range(3):
        edge = {other for own in edge for other in found[own]} - reached
        reached |= edge
    assert len(reached) == len(IDS)


@given(st.randoms(use_true_random=False), st.integers(2, 40))
@settings(max_examples=40)
def test_neighbours_depend_on_who_is_there_not_on_how_it_came_about(
    chance: random.Random, count: int
) -> None:
    ids = chance.sample(IDS[1:60], count)
    plain = rings_of(IDS[0], ids)
    history = Rings(IDS[0])
    for each in IDS[1:60]:
        history.add(each)
    for each in chance.sample(IDS[1:60], 59):
        if each not in ids:
            history.discard(each)
    assert set(history.neighbours()) == set(plain.neighbours())
    assert history.neighbours() == plain.neighbours()
    assert len(history) == count


def test_one_who_leaves_changes_at_most_sixteen_others() -> None:
    seen = {own: rings_of(own, IDS[:100]) for own in IDS[:100]}
    before = {own: set(rings.neighbours()) for own, rings in seen.items()}
    for gone in IDS[:16]:
        changed = 0
        for own in seen.keys() - {gone}:
            seen[own].discard(gone)
            after = set(seen[own].neighbours())
            changed += after != before[own]
            assert len(after - before[own]) <= RINGS
            seen[own].add(gone)
            assert set(seen[own].neighbours()) == before[own]
        assert RINGS <= changed <= 2 * RINGS


def test_who_was_not_there_can_be_discarded() -> None:
    rings = rings_of(IDS[0], IDS[1:5])
    rings.discard(IDS[9])
    assert len(rings) == 4


def test_places_are_eight_and_stay() -> None:
    assert len(set(places(IDS[0]))) == RINGS
    assert places(IDS[0]) == places(PeerId(IDS[0].raw))

"""How long a suspicion lasts: Lifeguard's formula with its published cases, and local health."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmoe.gossip.messages import Evidence
from p2pmoe.gossip.suspicion import (
    MAX_ACCUSERS,
    LocalHealth,
    Suspicion,
    SuspicionParams,
    shortest,
    timeout,
)
from tests.gossip.people import people

PEOPLE = people(MAX_ACCUSERS + 10)
SUBJECT = PEOPLE[0].record()


def suspicion(n: int = 100, refuted: float = 0.0, **params: float) -> Suspicion:
    claim = PEOPLE[1].accuse(SUBJECT)
    return Suspicion(SuspicionParams(**params), claim, n, refuted, now=0.0)


@pytest.mark.parametrize(
    ("confirmations", "elapsed", "left"),
    [(0, 0, 30), (1, 2, 14), (2, 3, 4.810), (3, 4, -2), (4, 5, -3), (5, 10, -8)],
)
def test_the_time_left_is_as_memberlist_has_it(
    confirmations: int, elapsed: float, left: float
) -> None:
    remaining = timeout(confirmations, 3, 2.0, 30.0) - elapsed
    assert math.floor(1000 * remaining) / 1000 == pytest.approx(left, abs=0.0011)


@pytest.mark.parametrize(
    ("n", "seconds"), [(0, 1), (5, 1), (10, 1), (50, 1.698), (100, 2), (500, 2.698), (1000, 3)]
)
def test_the_shortest_time_is_as_memberlist_has_it(n: int, seconds: float) -> None:
    params = SuspicionParams(mult=3.0)
    assert shortest(params, n) / 3 == pytest.approx(seconds, abs=0.001)


@pytest.mark.parametrize(
    ("n", "confirmations", "ms"),
    [(4, 0, 500), (5, 0, 1000), (6, 0, 1000), (6, 1, 750), (6, 2, 604), (6, 3, 500), (6, 4, 500)],
)
def test_confirmations_shorten_it_as_memberlist_has_it(
    n: int, confirmations: int, ms: float
) -> None:
    held = suspicion(n, mult=5.0, max_mult=2.0, interval=0.1)
    for person in PEOPLE[1 : confirmations + 2]:
        held.accuse(person.id, "silent")
    assert held.deadline * 1000 == pytest.approx(ms, abs=1)


def test_an_accuser_counts_once_and_says_so() -> None:
    held = suspicion()
    assert held.accuse(PEOPLE[1].id, "silent")
    assert not held.accuse(PEOPLE[1].id, "silent")
    assert held.accuse(PEOPLE[2].id, "silent")
    assert held.accuse(PEOPLE[2].id, "refused")  # it found out more
    assert not held.accuse(PEOPLE[2].id, "silent")
    assert held.accusers == {PEOPLE[1].id: "silent", PEOPLE[2].id: "refused"}


def test_hearsay_is_never_counted() -> None:
    held = suspicion()
    assert not any(held.accuse(person.id, "hearsay") for person in PEOPLE[:9])
    assert held.accusers == {}
    assert held.deadline == 24.0  # 6 * 2 * log10(100)


def test_who_comes_after_those_that_count_is_not_passed_on() -> None:
    held = suspicion()
    assert [held.accuse(person.id, "silent") for person in PEOPLE[1:7]] == [True] * 4 + [False] * 2


@pytest.mark.parametrize(("n", "needed"), [(2, 1), (3, 2), (4, 3), (100, 3)])
def test_refused_by_as_many_as_there_are_or_three_it_lasts_one_period(n: int, needed: int) -> None:
    held = suspicion(n)
    for person in PEOPLE[1 : needed + 1]:
        assert held.deadline > 1.0
        assert held.accuse(person.id, "refused")
    assert held.deadline == 1.0


def test_once_enough_were_refused_nobody_else_is_passed_on() -> None:
    held = suspicion()
    assert held.accuse(PEOPLE[1].id, "silent")
    assert all(held.accuse(person.id, "refused") for person in PEOPLE[2:5])
    assert not any(held.accuse(person.id, "silent") for person in PEOPLE[5:7])
    assert not any(held.accuse(person.id, "refused") for person in (PEOPLE[1], *PEOPLE[7:9]))
    assert held.deadline == 1.0


def test_accusers_that_are_remembered_are_bounded() -> None:
    held = suspicion()
    for person in PEOPLE:
        held.accuse(person.id, "silent")
    assert len(held.accusers) == MAX_ACCUSERS


def test_who_refuted_of_late_gets_more_time_unless_it_is_refused() -> None:
    assert suspicion(100, 2.5).deadline == 24.0 * 3.5
    held = suspicion(100, 2.5)
    for person in PEOPLE[1:5]:
        held.accuse(person.id, "silent")
    assert held.deadline == 4.0 * 3.5
    for person in PEOPLE[1:4]:
        held.accuse(person.id, "refused")
    assert held.deadline == 1.0


def test_without_lifeguard_it_has_one_length() -> None:
    held = suspicion(100, 2.5, lifeguard=False)
    assert held.deadline == 4.0
    for person in PEOPLE[1:4]:
        held.accuse(person.id, "silent")
    assert held.deadline == 4.0


def test_who_was_deaf_begins_later() -> None:
    held = suspicion()
    held.delay(3.0)
    assert held.deadline == 27.0


EVIDENCE = st.sampled_from(["silent", "refused", "hearsay"])


@given(st.lists(st.tuples(st.integers(0, 9), EVIDENCE)), st.integers(1, 5000))
def test_accusations_in_any_order_only_ever_shorten_it(
    accusations: list[tuple[int, Evidence]], n: int
) -> None:
    one, other = suspicion(n), suspicion(n)
    deadline = one.deadline
    for number, evidence in accusations:
        one.accuse(PEOPLE[number].id, evidence)
        assert one.deadline <= deadline
        deadline = one.deadline
    for number, evidence in reversed(accusations):
        other.accuse(PEOPLE[number].id, evidence)
    assert one.deadline == other.deadline
    assert deadline >= 1.0


def test_local_health_stays_between_its_bounds() -> None:
    health = LocalHealth(lifeguard=True)
    health.add(-1)
    assert (health.score, health.stretch) == (0, 1)
    health.add(30)
    assert (health.score, health.stretch) == (7, 8)
    health.add(-3)
    assert health.stretch == 5


def test_without_lifeguard_health_is_no_matter() -> None:
    health = LocalHealth(lifeguard=False)
    health.add(3)
    assert health.stretch == 1

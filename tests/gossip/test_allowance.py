"""Token buckets: so many at once, then at a rate, and a table that does not grow."""

from __future__ import annotations

from p2pmoe.gossip.allowance import Allowance
from tests.gossip.people import people

A, B, C = (person.id for person in people(3))


def test_a_burst_and_then_the_rate() -> None:
    allowance = Allowance(3, 0.5, size=8)
    assert [allowance.take(A, 0.0) for _ in range(4)] == [True, True, True, False]
    assert not allowance.take(A, 1.9)
    assert allowance.take(A, 2.0)
    assert not allowance.take(A, 3.9)
    assert allowance.take(A, 4.0)


def test_asking_in_vain_costs_nothing() -> None:
    allowance = Allowance(1, 0.1, size=8)
    allowance.take(A, 0.0)
    assert not any(allowance.take(A, at / 10) for at in range(1, 100))
    assert allowance.take(A, 10.0)


def test_two_are_never_closer_than_the_spacing() -> None:
    allowance = Allowance(10, 1.0, spacing=1.0, size=8)
    assert [allowance.take(A, at / 4) for at in range(9)] == [True, False, False, False] * 2 + [
        True
    ]


def test_everybody_has_an_allowance_of_their_own() -> None:
    allowance = Allowance(1, 0.0, size=8)
    assert allowance.take(A, 0.0)
    assert allowance.take(B, 0.0)
    assert not allowance.take(A, 0.0)


def test_the_least_recently_seen_is_forgotten() -> None:
    allowance = Allowance(1, 0.0, size=2)
    for key in (A, B, A, C):
        allowance.take(key, 0.0)
    assert len(allowance) == 2
    assert not allowance.take(A, 0.0)
    assert allowance.take(B, 0.0)

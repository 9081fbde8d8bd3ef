"""A second expert is asked when the first is late, and never for more than a share of the rows."""

import math

from hypothesis import given
from hypothesis import strategies as st

from p2pmoe.moe.hedging import MOST_SAVED, MULTIPLE, SOONEST, HedgeBudget, Lateness


def test_a_part_is_late_after_a_multiple_of_its_experts_usual_time() -> None:
    parts = Lateness({0: 1.0, 1: 0.001, 2: math.inf}, now=10.0)
    assert parts.next_deadline() == 10.0 + SOONEST
    assert parts.late(10.0) == []
    assert parts.late(10.0 + SOONEST) == [1]
    assert parts.next_deadline() == 10.0 + MULTIPLE
    assert parts.late(10.0 + MULTIPLE) == [0]
    assert parts.late(1e9) == []
    assert parts.next_deadline() == math.inf


def test_one_that_failed_is_late_at_once_and_told_once() -> None:
    parts = Lateness({0: 1.0, 1: 1.0}, now=0.0)
    parts.failed(1)
    assert parts.next_deadline() == -math.inf
    assert parts.late(0.0) == [1]
    parts.failed(1)
    assert parts.late(0.0) == []


def test_one_that_is_answered_is_never_late() -> None:
    parts = Lateness({0: 1.0}, now=0.0)
    parts.answered(0)
    parts.answered(0)
    parts.failed(0)
    assert parts.late(1e9) == []


@given(
    st.floats(0, 1),
    st.lists(st.tuples(st.booleans(), st.integers(1, 500)), max_size=80),
)
def test_no_more_than_the_share_and_one_part_is_ever_asked_again(
    share: float, events: list[tuple[bool, int]]
) -> None:
    budget, asked, again, largest = HedgeBudget(share), 0, 0, 0
    for first, rows in events:
        if first:
            budget.earn(rows)
            asked += rows
        elif budget.take(rows):
            again += rows
            largest = max(largest, rows)
    assert again <= share * asked + largest + 1e-6


def test_a_good_while_saves_up_so_much_and_no_more() -> None:
    budget = HedgeBudget(0.5)
    assert not budget.take(1)
    budget.earn(10**9)
    assert budget.rows == MOST_SAVED
    assert budget.take(MOST_SAVED)
    assert not budget.take(1)

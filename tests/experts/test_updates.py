"""An update is applied once: its id is remembered for a while, and what is older is not new."""

from hypothesis import given
from hypothesis import strategies as st

from p2pmoe.experts.updates import CALLERS, AppliedUpdates


def key(number: int, caller: object = "a") -> tuple[object, bytes]:
    return caller, number.to_bytes(16, "big")


def test_an_applied_update_is_known_one_by_one_until_its_lifetime_ends() -> None:
    applied = AppliedUpdates(lifetime=600.0)
    assert not applied.knows(key(1), now=0.0)
    applied.add(key(1), now=0.0)
    assert applied.knows(key(1), now=599.9)
    assert not applied.knows(key(0), now=599.9)
    assert len(applied) == 1
    assert applied.knows(key(1), now=600.0)
    assert len(applied) == 0


def test_an_update_added_again_lives_from_then_on() -> None:
    applied = AppliedUpdates(lifetime=10.0)
    applied.add(key(1), now=0.0)
    applied.add(key(2), now=5.0)
    applied.add(key(1), now=9.0)
    applied.add(key(3), now=16.0)
    assert len(applied) == 2
    assert not applied.knows(key(4), now=16.0)


def test_what_is_older_than_a_forgotten_update_of_its_caller_is_not_new() -> None:
    applied = AppliedUpdates(capacity=2)
    for number in (5, 7, 6, 9):
        applied.add(key(number), now=0.0)
    assert [number for number in range(12) if applied.knows(key(number), 1e9)] == [*range(10)]
    assert not applied.knows(key(1, "b"), now=1e9)
    applied.add(key(1, "b"), now=1e9)
    assert applied.knows(key(1, "b"), now=1e9)


def test_a_caller_that_starts_again_has_new_ids_by_its_epoch() -> None:
    applied = AppliedUpdates(capacity=1)
    for number in range(3):
        applied.add(key((1 << 64) + number), now=0.0)
    assert applied.knows(key(2**63), now=0.0)
    assert not applied.knows(key(2 << 64), now=0.0)


def test_callers_that_come_and_go_leave_a_bounded_memory_behind() -> None:
    applied = AppliedUpdates(capacity=1)
    for caller in range(3 * CALLERS):
        applied.add(key(1, caller), now=0.0)
    assert len(applied) == 1
    assert len(applied._forgotten) == CALLERS
    assert applied.knows(key(1, 3 * CALLERS - 2), now=0.0)
    assert not applied.knows(key(1, 0), now=0.0)


@given(st.permutations(range(40)), st.integers(1, 40), st.lists(st.integers(0, 39), max_size=60))
def test_whatever_order_repeats_and_memory_no_update_is_new_twice(
    order: list[int], capacity: int, repeats: list[int]
) -> None:
    applied, learnt = AppliedUpdates(capacity), []
    for now, number in enumerate([*order, *repeats]):
        if not applied.knows(key(number), float(now)):
            learnt.append(number)
            applied.add(key(number), float(now))
        assert len(applied) <= capacity
    assert len(learnt) == len(set(learnt))
    assert capacity < 40 or sorted(learnt) == list(range(40))

"""An update is applied once: its id is remembered for a while, and no longer."""

from hypothesis import given
from hypothesis import strategies as st

from p2pmoe.experts.updates import AppliedUpdates


def test_an_applied_update_is_known_until_its_lifetime_ends() -> None:
    applied = AppliedUpdates(lifetime=600.0)
    assert not applied.knows("a", now=0.0)
    applied.add("a", now=0.0)
    assert applied.knows("a", now=599.9)
    assert not applied.knows("a", now=600.0)


def test_an_update_added_again_lives_from_then_on() -> None:
    applied = AppliedUpdates(lifetime=10.0)
    applied.add("a", now=0.0)
    applied.add("b", now=5.0)
    applied.add("a", now=9.0)
    applied.add("c", now=16.0)
    assert applied.knows("a", now=18.0)
    assert not applied.knows("b", now=16.0)
    assert len(applied) == 2


@given(st.lists(st.integers(0, 30), max_size=60))
def test_the_memory_never_holds_more_than_its_capacity_and_keeps_the_newest(
    keys: list[int],
) -> None:
    applied = AppliedUpdates(capacity=5)
    for now, key in enumerate(keys):
        applied.add(key, now=float(now))
        assert len(applied) <= 5
    newest = list(dict.fromkeys(reversed(keys)))[:5]
    assert all(applied.knows(key, now=float(len(keys))) for key in newest)
